"""diffusers' LoRA methods of a pipeline, as an attached one has them.

Names, order and defaults of arguments are diffusers' (`diffusers.loaders.lora_base.LoraBaseMixin`
and `QwenImageLoraLoaderMixin`). A call that changes something returns the report where the change
is composed at once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from qwenlora.errors import AdapterNameError, UnsupportedAdapterError
from qwenlora.pipeline import transformer_methods as inner
from qwenlora.pipeline.adapters import names_in
from qwenlora.pipeline.roster import roster_of
from qwenlora.pipeline.saved import save_adapter
from qwenlora.pipeline.weight import one_for_each

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    import torch

    from qwenlora.pipeline.saved import SaveFunction
    from qwenlora.report import ComposeReport

__all__ = ["PIPELINE_METHODS"]

_log = logging.getLogger("qwenlora")

_COMPONENT = "transformer"


def load_lora_weights(
    pipeline: Any,
    pretrained_model_name_or_path_or_dict: Any,
    adapter_name: str | None = None,
    hotswap: bool = False,
    **kwargs: Any,
) -> ComposeReport | None:
    """Load a LoRA under a name, which alone becomes active.

    A file is planned here and read when it is composed: it must stay where it is. A state dict is
    copied. What of it belongs to another component, such as a text encoder, is left out, and named
    in the log and in `pipeline.qwenlora.reports`.

    Args:
        pipeline: The attached pipeline.
        pretrained_model_name_or_path_or_dict: A safetensors file, a folder, a PEFT folder, the name
            of a repository on the Hub, or a state dict.
        adapter_name: Its name; by default `default_0`, `default_1`, ...
        hotswap: Whether it takes the place of the adapter of its name, which must be there. It gets
            weight 1, and is active where that one was. Ranks and layers need not be alike.
        **kwargs: `weight_name`, `subfolder`, and what `huggingface_hub` is told: `cache_dir`,
            `force_download`, `local_files_only`, `token`, `revision`.

    Raises:
        AdapterNameError: The name is taken, or with `hotswap` not known.
        LoraReadError: There is no such file, or it cannot be read.
        LoraFileError: The file is malformed, or a pickle.
        OtherModelError: It is another model's.
        NothingToApplyError: Nothing of it can be applied.
        TypeError: An argument is not known.
    """
    return inner.load_lora_adapter(
        pipeline.transformer,
        pretrained_model_name_or_path_or_dict,
        hotswap=hotswap,
        adapter_name=adapter_name,
        **kwargs,
    )


def unload_lora_weights(pipeline: Any) -> ComposeReport | None:
    """Forget all adapters: the base, bit for bit."""
    return inner.unload_lora(pipeline.transformer)


def set_adapters(
    pipeline: Any, adapter_names: list[str] | str, adapter_weights: Any = None
) -> ComposeReport | None:
    """Make adapters the active ones, in this order; none of them: the base.

    Args:
        pipeline: The attached pipeline.
        adapter_names: One name or several.
        adapter_weights: A weight for all of them, or a list with one for each. A weight is a
            number, None for 1, or a dict with the weight of each component, of which
            `"transformer"` is the only one here: a number, or a dict from parts of layers' paths to
            numbers. A layer gets the first entry whose key is anywhere in its path, else 1.

    Raises:
        AdapterNameError: A name is not known, or there twice.
        AdapterWeightError: Their number is another than that of the names, one is not finite, or
            layers would get different weights that factors by block and kind do not tell apart.
        TypeError: A weight is of no accepted form.
    """
    names = names_in(adapter_names)
    weights = [_of_transformer(weight) for weight in one_for_each(names, adapter_weights)]
    return inner.set_adapters(pipeline.transformer, names, weights)


def get_active_adapters(pipeline: Any) -> list[str]:
    """Names of the active adapters, in their order, also while they are turned off."""
    return list(roster_of(pipeline.transformer).adapters.active)


def get_list_adapters(pipeline: Any) -> dict[str, list[str]]:
    """Names of all adapters by component, in the order in which they were loaded."""
    loaded = roster_of(pipeline.transformer).adapters.loaded
    return {_COMPONENT: list(loaded)} if loaded else {}


def enable_lora(pipeline: Any) -> ComposeReport | None:
    """Turn the active adapters on again."""
    return inner.enable_lora(pipeline.transformer)


def disable_lora(pipeline: Any) -> ComposeReport | None:
    """Turn all adapters off: the base, bit for bit. Which are active stays."""
    return inner.disable_lora(pipeline.transformer)


def delete_adapters(pipeline: Any, adapter_names: list[str] | str) -> ComposeReport | None:
    """Forget adapters; a name that is not known is passed over, as PEFT does.

    Where none of the active ones is left, the first of the others by name becomes active, with the
    weight that it has, as PEFT does.
    """
    return inner.delete_adapters(pipeline.transformer, adapter_names)


def save_lora_weights(
    pipeline: Any,
    save_directory: str | os.PathLike[str],
    transformer_lora_layers: Mapping[str, torch.Tensor] | None = None,
    is_main_process: bool = True,
    weight_name: str | None = None,
    save_function: SaveFunction | None = None,
    safe_serialization: bool = True,
    transformer_lora_adapter_metadata: dict[str, Any] | None = None,
    *,
    adapter_name: str | None = None,
) -> None:
    """Write layers that are given, as the pipeline's class does, or else a loaded adapter.

    A loaded adapter is written as it was loaded: its own tensors, keys and metadata, without its
    weight.

    Args:
        pipeline: The attached pipeline.
        save_directory: The folder; it is made where it is not there.
        transformer_lora_layers: Layers to write. With them, all that follows means what it means to
            the pipeline's class.
        is_main_process: Whether this process writes.
        weight_name: Name of the file; by default `pytorch_lora_weights.safetensors`.
        save_function: What writes the tensors instead, given a dict and a path.
        safe_serialization: True: no pickle of an adapter is written.
        transformer_lora_adapter_metadata: Of the layers that are given.
        adapter_name: Which adapter; by default the only one that is loaded.

    Raises:
        AdapterNameError: There is no such adapter, or there are several and none is named.
        UnsupportedAdapterError: `safe_serialization` is False, or metadata has no layers.
        OutputError: It cannot be written.
        LoraReadError: The file that was loaded is not there any more, or is another.
    """
    if transformer_lora_layers:
        type(pipeline).save_lora_weights(
            save_directory,
            transformer_lora_layers=transformer_lora_layers,
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
            transformer_lora_adapter_metadata=transformer_lora_adapter_metadata,
        )
        return
    if not safe_serialization or transformer_lora_adapter_metadata:
        raise UnsupportedAdapterError(
            "a loaded adapter is written with its own metadata, and never as a pickle"
            "\nhint: safe_serialization=True, and no transformer_lora_adapter_metadata"
        )
    loaded = roster_of(pipeline.transformer).adapters
    if adapter_name is None:
        if len(loaded.loaded) != 1:
            raise AdapterNameError(
                f"of the adapters {list(loaded.loaded)} one must be named"
                "\nhint: save_lora_weights(folder, adapter_name=...)"
            )
        (adapter_name,) = loaded.loaded
    loaded.require_known([adapter_name])
    if is_main_process:
        save_adapter(
            loaded.loaded[adapter_name],
            save_directory,
            weight_name=weight_name,
            save_function=save_function,
            upcast=False,
        )


def fuse_lora(
    pipeline: Any,
    components: Sequence[str] = (_COMPONENT,),
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: list[str] | None = None,
    **kwargs: Any,
) -> NoReturn:
    """Refuse, as the transformer's own `fuse_lora` does: nothing needs fusing.

    Raises:
        NothingToFuseError: Always.
    """
    del components, kwargs
    inner.fuse_lora(pipeline.transformer, lora_scale, safe_fusing, adapter_names)


def unfuse_lora(pipeline: Any, components: Sequence[str] = (_COMPONENT,), **kwargs: Any) -> None:
    """Do nothing, as diffusers does where nothing is fused."""
    del pipeline, components, kwargs


def set_lora_device(pipeline: Any, adapter_names: list[str], device: Any) -> None:
    """Do nothing: an adapter that is not active has no tensors in the model.

    What composing keeps of it stays within `ComposeOptions.cache_bytes` on the host, and
    `device_cache_bytes` on a GPU. The active ones are where their layers are.
    """
    del pipeline
    _log.info(
        "%s: LoRAs are where their layers are, and are not moved to %s",
        names_in(adapter_names),
        device,
    )


def enable_lora_hotswap(pipeline: Any, **kwargs: Any) -> None:
    """Do nothing: any adapter can take the place of any other, whatever their ranks."""
    inner.enable_lora_hotswap(pipeline.transformer, **kwargs)


def _of_transformer(weight: object) -> object:
    """The transformer's part of a weight that is given for each component."""
    if not isinstance(weight, Mapping):
        return weight
    others = sorted(str(name) for name in weight if name != _COMPONENT)
    if others:
        _log.warning("weights of %s are left out: LoRAs are on the `%s` alone", others, _COMPONENT)
    return weight.get(_COMPONENT)


PIPELINE_METHODS: dict[str, Callable[..., Any]] = {
    method.__name__: method
    for method in (
        load_lora_weights,
        unload_lora_weights,
        set_adapters,
        get_active_adapters,
        get_list_adapters,
        enable_lora,
        disable_lora,
        delete_adapters,
        save_lora_weights,
        fuse_lora,
        unfuse_lora,
        set_lora_device,
        enable_lora_hotswap,
    )
}
"""What `qwenlora.attach` binds on a pipeline."""
