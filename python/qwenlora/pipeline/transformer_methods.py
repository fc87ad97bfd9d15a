"""diffusers' LoRA methods of a model, as an attached transformer has them.

Names, order and defaults of arguments are diffusers' (`diffusers.loaders.peft.PeftAdapterMixin`).
A call that changes something returns the report where the change is composed at once.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from qwenlora.errors import AdapterNameError, NothingToFuseError, UnsupportedAdapterError
from qwenlora.pipeline.adapters import NO_ADAPTERS, names_in, once_each
from qwenlora.pipeline.files import Request
from qwenlora.pipeline.roster import roster_of
from qwenlora.pipeline.saved import save_adapter
from qwenlora.pipeline.weight import one_for_each, weight_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch import nn

    from qwenlora.report import ComposeReport

__all__ = ["TRANSFORMER_METHODS"]

_log = logging.getLogger("qwenlora")

_PREFIX = "transformer"
_NAMELESS = "default"


def load_lora_adapter(
    transformer: nn.Module,
    pretrained_model_name_or_path_or_dict: Any,
    prefix: str | None = _PREFIX,
    hotswap: bool = False,
    **kwargs: Any,
) -> ComposeReport | None:
    """Load a LoRA under a name, which alone becomes active.

    A file is planned here and read when it is composed: it must stay where it is. A state dict is
    copied. Any spelling of keys is read, with a prefix or without.

    Args:
        transformer: The attached transformer.
        pretrained_model_name_or_path_or_dict: A safetensors file, a folder, a PEFT folder, the name
            of a repository on the Hub, or a state dict.
        prefix: `"transformer"` or None.
        hotswap: Whether it takes the place of the adapter of its name, which must be there. It gets
            weight 1, and is active where that one was. Ranks and layers need not be alike.
        **kwargs: `adapter_name` (by default `default_0`, `default_1`, ...), `weight_name`,
            `subfolder`, and what `huggingface_hub` is told: `cache_dir`, `force_download`,
            `local_files_only`, `token`, `revision`. Without a meaning here: `use_safetensors`,
            `low_cpu_mem_usage`, `proxies`.

    Raises:
        AdapterNameError: The name is taken, or with `hotswap` not known.
        LoraReadError: There is no such file, or it cannot be read.
        LoraFileError: The file is malformed, or a pickle.
        OtherModelError: It is another model's.
        NothingToApplyError: Nothing of it can be applied.
        UnsupportedAdapterError: `network_alphas` or `metadata` is given.
        TypeError: An argument is not known.
    """
    roster = roster_of(transformer)
    name = kwargs.pop("adapter_name", None)
    request = Request.taken(pretrained_model_name_or_path_or_dict, kwargs)
    kwargs.pop("_pipeline", None)
    for apart in ("network_alphas", "metadata"):
        if kwargs.pop(apart, None):
            raise UnsupportedAdapterError(
                f"`{apart}` beside the tensors is not read: the scale stands in the file"
                "\nhint: load the file itself; of a pipeline that is not attached, attach it, too"
            )
    if kwargs:
        raise TypeError(f"load_lora_adapter has no argument {sorted(kwargs)}")
    if prefix not in (None, _PREFIX):
        raise AdapterNameError(f"prefix is {prefix!r}: it is {_PREFIX!r} or None")
    before = roster.adapters
    if hotswap:
        # Also without a name, which names none.
        before.require_known([str(name)] if name is None else names_in([name]))
    elif name is not None:
        before.require_free(*names_in([name]))
    adapter = roster.plan(transformer, name or before.free_name(), request.found())
    if hotswap:
        return roster.change(transformer, lambda adapters: adapters.with_swapped(adapter))

    def loaded(adapters: Any) -> Any:
        if name is not None or adapter.name not in adapters.loaded:
            return adapters.with_loaded(adapter)
        # Another thread was faster.
        free = adapters.free_name()
        spec = replace(adapter.spec, name=free)
        return adapters.with_loaded(replace(adapter, name=free, spec=spec))

    return roster.change(transformer, loaded)


def set_adapters(
    transformer: nn.Module, adapter_names: list[str] | str, weights: Any = None
) -> ComposeReport | None:
    """Make adapters the active ones, in this order; none of them: the base.

    While LoRAs are turned off by `disable_lora`, they stay so.

    Args:
        transformer: The attached transformer.
        adapter_names: One name or several.
        weights: A weight for all of them, or a list with one for each. A weight is a number, None
            for 1, or a dict from parts of layers' paths to numbers. A layer gets the first entry
            whose key is anywhere in its path, else 1.

    Raises:
        AdapterNameError: A name is not known, or there twice.
        AdapterWeightError: Their number is another than that of the names, one is not finite, or
            layers would get different weights that factors by block and kind do not tell apart.
        TypeError: A weight is of no accepted form.
    """
    roster = roster_of(transformer)
    names = once_each(names_in(adapter_names))
    given = one_for_each(names, weights)
    read = {name: weight_of(name, one) for name, one in zip(names, given, strict=True)}
    return roster.change(transformer, lambda adapters: adapters.activated(read))


def set_adapter(transformer: nn.Module, adapter_name: str | list[str]) -> ComposeReport | None:
    """Make adapters the active ones, with the weights that they have.

    Raises:
        AdapterNameError: A name is not known, or nothing is loaded.
    """
    names = once_each(names_in(adapter_name))
    return roster_of(transformer).change(transformer, lambda adapters: adapters.chosen(names))


def active_adapters(transformer: nn.Module) -> list[str]:
    """Names of the active adapters, in their order, also while they are turned off.

    Raises:
        AdapterNameError: Nothing is loaded.
    """
    adapters = roster_of(transformer).adapters
    adapters.require_any()
    return list(adapters.active)


def enable_lora(transformer: nn.Module) -> ComposeReport | None:
    """Turn the active adapters on again."""
    return roster_of(transformer).change(transformer, lambda adapters: adapters.turned(on=True))


def disable_lora(transformer: nn.Module) -> ComposeReport | None:
    """Turn all adapters off: the base, bit for bit. Which are active stays."""
    return roster_of(transformer).change(transformer, lambda adapters: adapters.turned(on=False))


def enable_adapters(transformer: nn.Module) -> ComposeReport | None:
    """Turn the active adapters on again.

    Raises:
        AdapterNameError: Nothing is loaded.
    """
    roster_of(transformer).adapters.require_any()
    return enable_lora(transformer)


def disable_adapters(transformer: nn.Module) -> ComposeReport | None:
    """Turn all adapters off.

    Raises:
        AdapterNameError: Nothing is loaded.
    """
    roster_of(transformer).adapters.require_any()
    return disable_lora(transformer)


def delete_adapters(transformer: nn.Module, adapter_names: list[str] | str) -> ComposeReport | None:
    """Forget adapters; a name that is not known is passed over, as PEFT does.

    Where none of the active ones is left, the first of the others by name becomes active, with the
    weight that it has, as PEFT does.
    """
    names = names_in(adapter_names)
    return roster_of(transformer).change(transformer, lambda adapters: adapters.without(names))


def unload_lora(transformer: nn.Module) -> ComposeReport | None:
    """Forget all adapters: the base, bit for bit."""
    return roster_of(transformer).change(transformer, lambda adapters: NO_ADAPTERS)


def save_lora_adapter(
    transformer: nn.Module,
    save_directory: str | os.PathLike[str],
    adapter_name: str = _NAMELESS,
    upcast_before_saving: bool = False,
    safe_serialization: bool = True,
    weight_name: str | None = None,
) -> None:
    """Write an adapter as it was loaded: its own tensors, keys and metadata, without its weight.

    Args:
        transformer: The attached transformer.
        save_directory: The folder; it is made where it is not there.
        adapter_name: Its name.
        upcast_before_saving: Whether tensors become float32.
        safe_serialization: True: no pickle is written.
        weight_name: Name of the file; by default `pytorch_lora_weights.safetensors`.

    Raises:
        AdapterNameError: There is no such adapter.
        UnsupportedAdapterError: `safe_serialization` is False.
        OutputError: It cannot be written.
        LoraReadError: The file that was loaded is not there any more, or is another.
    """
    adapters = roster_of(transformer).adapters
    adapters.require_known([adapter_name])
    if not safe_serialization:
        raise UnsupportedAdapterError("no pickle is written\nhint: safe_serialization=True")
    save_adapter(
        adapters.loaded[adapter_name],
        save_directory,
        weight_name=weight_name,
        save_function=None,
        upcast=upcast_before_saving,
    )


def fuse_lora(
    transformer: nn.Module,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: list[str] | None = None,
) -> NoReturn:
    """Refuse: composed LoRAs run inside the layers already, and 4-bit weights cannot hold them.

    It is an error, since a script that fuses counts on what a fused LoRA does: it keeps
    `lora_scale`, and stays when `unload_lora_weights` follows. Passing the call over would silently
    make other pictures.

    Raises:
        NothingToFuseError: Always.
    """
    del transformer, safe_fusing
    chosen = "" if adapter_names is None else f"{adapter_names!r}, "
    raise NothingToFuseError(
        "nothing needs fusing: composed LoRAs run inside the layers, at the speed of fused ones"
        "\nhint: leave fuse_lora out, and an unload_lora_weights after it, too; instead of"
        f" `lora_scale` say set_adapters({chosen}{lora_scale})"
    )


def unfuse_lora(transformer: nn.Module) -> None:
    """Do nothing, as diffusers does where nothing is fused."""
    del transformer


def enable_lora_hotswap(
    transformer: nn.Module, target_rank: int = 128, check_compiled: str = "error"
) -> None:
    """Do nothing: any adapter can take the place of any other, whatever their ranks.

    A compiled model is traced again only where a layer gets or loses a side branch.
    """
    del transformer, target_rank, check_compiled
    _log.info("hot swapping needs no preparation: ranks need not be alike")


def add_adapter(
    transformer: nn.Module, adapter_config: object, adapter_name: str = _NAMELESS
) -> NoReturn:
    """Refuse: that makes an adapter for training, and nothing trains here.

    Raises:
        UnsupportedAdapterError: Always.
    """
    del transformer, adapter_config, adapter_name
    raise UnsupportedAdapterError(
        "add_adapter makes an adapter for training, which 4-bit layers cannot"
        "\nhint: load a trained one with load_lora_weights"
    )


TRANSFORMER_METHODS: dict[str, Callable[..., Any]] = {
    method.__name__: method
    for method in (
        load_lora_adapter,
        set_adapters,
        set_adapter,
        active_adapters,
        enable_lora,
        disable_lora,
        enable_adapters,
        disable_adapters,
        delete_adapters,
        unload_lora,
        save_lora_adapter,
        fuse_lora,
        unfuse_lora,
        enable_lora_hotswap,
        add_adapter,
    )
}
"""What `qwenlora.attach` binds on a pipeline's transformer."""
