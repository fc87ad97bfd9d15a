"""Every call into ComfyUI, behind small functions."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import sys
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP

from qwenlora import ComfyQwenImageWrapper, ComposeOptions, LoraSet, blocks
from qwenlora.compose.structure import composed_bytes
from qwenlora.errors import LoraNotFoundError, UnsupportedModelError
from qwenlora.model.families import FAMILIES
from qwenlora.model.lock import lock_of
from qwenlora.model.modules import inner_of, modules_of
from qwenlora.model.state import read_state
from qwenlora.runtime import OPTIONS_KEY

from .course import resolved
from .names import nearest, same_name
from .rivals import rival_of
from .rows import InputError

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from PIL.Image import Image
    from torch import nn

__all__ = [
    "announced_bytes",
    "branch_of",
    "check_prefix",
    "checkpoint_names",
    "checkpoint_path",
    "compose_options",
    "count_blocks",
    "file_identity",
    "find_lora",
    "listed_name",
    "lora_names",
    "lora_path",
    "new_output",
    "offloads_blocks",
    "patches_notice",
    "preview",
    "progress",
    "put_set",
    "running_prompts",
    "set_of",
    "spare_bytes",
    "take_out",
    "transformer_of",
    "warn_of_rivals",
    "warn_once",
    "with_set",
]

_log = logging.getLogger("qwenlora")

_KEY = "qwenlora"
_ENABLE = "`Enable LoRA nodes (Nunchaku)`"
_LORAS = "loras"
_OPTIONS = "transformer_options"
_MODELS = "diffusion_models"
_LOADERS = "`Nunchaku Qwen Image DiT Loader` or `Nunchaku Z-Image DiT Loader`"

_PINNED_BYTES = 1 << 30
"""Most bytes of deltas that are kept in host memory, pinned where the model is on a GPU."""

_EVENTS = 1024
_PROGRESS_STEPS = 50
_SPARE_SHARE = 4
"""A divisor of free host memory: text encoders and other models are being read at the same time."""


# ---- files ----


def lora_names() -> list[str]:
    """The files that the host offers as LoRAs."""
    return list(folder_paths.get_filename_list(_LORAS))


def lora_path(name: str) -> str:
    """The path of a file that the host lists, whichever system's separators its name has.

    Raises:
        LoraNotFoundError: There is none.
    """
    path = find_lora(name)
    if path is None:
        raise LoraNotFoundError(
            f"LoRA {name!r} is in none of ComfyUI's folders for `{_LORAS}`\nhint: {_instead(name)}"
        )
    return path


def listed_name(name: str) -> str:
    """A file's name as the host lists it, by any spelling; the spelling where it has no file."""
    path = find_lora(name)
    return name if path is None else _name_in_folders(path) or name


def find_lora(name: str) -> str | None:
    """The path of a file by its name in any spelling, or by its path in one of the folders."""
    inside = _name_in_folders(name) if os.path.isabs(name) else None
    name = inside or name
    for spelling in (name, name.replace("\\", "/"), name.replace("/", "\\")):
        path = folder_paths.get_full_path(_LORAS, spelling)
        if path is not None:
            return str(path)
    return None


def _name_in_folders(path: str) -> str | None:
    """A file's name in the folder that it lies in; None where that is none of the host's."""
    for folder in folder_paths.get_folder_paths(_LORAS):
        # Other drives have no way from one to the other.
        with contextlib.suppress(ValueError):
            name = os.path.relpath(path, folder)
            if name.split(os.sep)[0] != os.pardir:
                return name
    return None


def _instead(name: str) -> str:
    """The advice where a name is missing: what to do, or which name to take instead."""
    there = lora_names()
    if not there:
        folders = ", ".join(map(str, folder_paths.get_folder_paths(_LORAS)))
        return f"there is no LoRA at all in {folders}: put the file there"
    if any(same_name(name, other) for other in there):
        return "ComfyUI lists it, but its file is gone: put it back, or choose another"
    alike = ", ".join(map(repr, nearest(name, there)))
    if not alike:
        return "no name there is like it: choose one from the list, or put the file there"
    return f"the nearest: {alike}"


def checkpoint_names() -> list[str]:
    """The files that the host offers as models."""
    return list(folder_paths.get_filename_list(_MODELS))


def checkpoint_path(name: str) -> str:
    """The path of a model's file that the host lists.

    Raises:
        InputError: There is none.
    """
    path = folder_paths.get_full_path(_MODELS, name)
    if path is None:
        raise InputError(f"the model {name!r} is in none of ComfyUI's folders for `{_MODELS}`")
    return str(path)


def check_prefix(prefix: str) -> None:
    """Check the beginning of a name of a file that is to be saved.

    Raises:
        InputError: It names no file in the output folder.
    """
    path = PurePosixPath(prefix.replace("\\", "/"))
    is_outside = path.is_absolute() or PureWindowsPath(prefix).drive or os.pardir in path.parts
    if is_outside or not path.name:
        raise InputError(
            f"the file name {prefix!r} leads out of ComfyUI's output folder, or is none"
            "\nhint: a name like `loras/merged`"
        )


def new_output(prefix: str) -> Path:
    """A path in the output folder where no file is yet; its folder is made.

    Raises:
        InputError: The prefix names no file in the output folder.
    """
    check_prefix(prefix)
    folder, name, counter, *_ = folder_paths.get_save_image_path(
        prefix.replace("\\", "/"), folder_paths.get_output_directory()
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder, f"{name}_{counter:05}_.safetensors")


def file_identity(name: str) -> tuple[int, int]:
    """Size and time of change: another pair is another file.

    Raises:
        LoraNotFoundError: There is none.
    """
    stat = os.stat(lora_path(name))
    return stat.st_size, stat.st_mtime_ns


def spare_bytes() -> int:
    """Host memory that files may take besides what else is read."""
    free: int = comfy.model_management.get_free_memory(torch.device("cpu"))
    return free // _SPARE_SHARE


# ---- models ----


def transformer_of(model: ModelPatcher) -> nn.Module:
    """The transformer of a MODEL.

    Raises:
        UnsupportedModelError: It is no Nunchaku model that is known, or another pack's wrapper is
            in its place.
    """
    transformer = getattr(getattr(model, "model", None), "diffusion_model", None)
    kind = type(model if transformer is None else transformer)
    _refuse_rivals(kind)
    inner = inner_of(transformer) if isinstance(transformer, torch.nn.Module) else None
    is_packed = inner is not None and any(hasattr(part, "proj_down") for part in inner.modules())
    if is_packed and _is_known(inner):
        return inner  # type: ignore[return-value]
    way_out = "use `Load LoRA` for models that are not Nunchaku's"
    if is_packed:
        way_out = "use the LoRA nodes that come with this model's own loader"
    raise UnsupportedModelError(
        "this LoRA loader only works with Nunchaku Qwen-Image and Z-Image models, but got"
        f" {kind.__name__}\nhint: load the model with {_LOADERS}, or {way_out}"
    )


def _refuse_rivals(kind: type) -> None:
    """See that no other pack has put a wrapper of its own in the transformer's place.

    Raises:
        UnsupportedModelError: One has.
    """
    rival = rival_of(kind)
    if rival is not None:
        raise UnsupportedModelError(
            f"this model was wrapped by another LoRA loader, of {rival.pack} (`{kind.__module__}`),"
            " which undoes what others compose, and stays in the loaded model"
            f"\nhint: {rival.instead}, then unload the models and clear the cache (Edit > Unload"
            " Models and Execution Cache), or restart ComfyUI"
        )


def _is_known(transformer: nn.Module) -> bool:
    """Tell by its first blocks if a transformer is one of the models that LoRAs are composed on."""
    paths = {path for path, _ in modules_of(transformer)}
    lists = (own for family in FAMILIES for own in family.lists.items())
    return any(
        bool(names) and all(f"{blocks}.0.{name}" in paths for name in names)
        for blocks, names in lists
    )


def count_blocks(transformer: nn.Module) -> int:
    """The numbered blocks of a transformer."""
    return blocks.count_blocks(path for path, _ in modules_of(transformer))


def offloads_blocks(transformer: nn.Module) -> bool:
    """Tell if a transformer has a block offload of its own; others are ComfyUI's to place."""
    return hasattr(transformer, "set_offload")


def patches_notice(model: ModelPatcher) -> str:
    """Say what becomes of the patches that ComfyUI's own nodes gave a model; empty without any.

    The log gets it, too, once for each change of them, where they do not do what they should.
    """
    patches = getattr(model, "patches", None)
    if not patches:
        return ""
    if _joins_patches(model):
        return (
            "this model also carries patches of ComfyUI's own LoRA loaders or merging nodes: its"
            " loader joins them with the quantized layers, besides these LoRAs"
        )
    reach = "have no effect on it"
    if type(model).load is comfy.model_patcher.ModelPatcher.load:
        reach = "reach its plain layers alone"
    text = (
        "this Nunchaku model carries patches of ComfyUI's own LoRA loaders or merging nodes, which"
        f" {reach}: put {_ENABLE} between the model loader and LoRA loaders"
    )
    warn_once(text, model.patches_uuid)
    return text


def set_of(model: ModelPatcher) -> LoraSet | None:
    """The stack that a MODEL carries already."""
    found = model.model_options.get(_OPTIONS, {}).get(OPTIONS_KEY)
    return found if isinstance(found, LoraSet) else None


def compose_options() -> ComposeOptions:
    """The options of the stacks that nodes ask for.

    The host plans its device's memory without what we would keep there besides the model, and an
    offloaded model leaves little host memory to pin.
    """
    return ComposeOptions(progress=progress, device_cache_bytes=0, cache_bytes=_PINNED_BYTES)


def with_set(
    model: ModelPatcher, wanted: LoraSet, transformer: nn.Module, added_bytes: int
) -> ModelPatcher:
    """A clone that asks for a stack and announces its memory; the model itself is unchanged.

    ComfyUI's own LoRA nodes work on it.

    Args:
        model: What is cloned.
        wanted: The whole stack, that of nodes before included.
        transformer: The model's transformer.
        added_bytes: What the whole stack adds to the model.
    """
    clone = branch_of(model, transformer)
    put_set(clone, wanted, added_bytes)
    return clone


def put_set(clone: ModelPatcher, wanted: LoraSet, added_bytes: int) -> None:
    """Have a clone that nobody runs yet ask for a stack and announce its memory."""
    clone.model_options.setdefault(_OPTIONS, {})[OPTIONS_KEY] = wanted
    # The host frees this much before it samples; a clone hands its size on to its own clones.
    clone.size += added_bytes - announced_bytes(clone)
    clone.set_attachments(_KEY, added_bytes)


def announced_bytes(model: ModelPatcher) -> int:
    """Bytes that a model's stack adds to its size."""
    return int(model.get_attachment(_KEY) or 0)


def branch_of(model: ModelPatcher, transformer: nn.Module) -> ModelPatcher:
    """A clone that composes what it asks for, and on which ComfyUI's own LoRA nodes work."""
    from .native.patcher import make_enabled  # it imports this

    _measure(model, transformer)
    clone = model.clone()
    make_enabled(clone)
    # Graphs that were compiled before the first LoRA do not run the hook on the transformer. First
    # is outermost: before a wrapper of ComfyUI's puts compiled modules in their places.
    wrappers = clone.wrappers.setdefault(WrappersMP.APPLY_MODEL, {})
    others = {key: found for key, found in wrappers.items() if key != _KEY}
    wrappers.clear()
    wrappers.update({_KEY: [_reconcile], **others})
    if _joins_patches(clone):
        _leave_between_runs(clone)
    # The hook serves the branches without a set, which have no wrapper.
    ComfyQwenImageWrapper.of(transformer)
    return clone


def _joins_patches(model: ModelPatcher) -> bool:
    """Tell if a patcher writes ComfyUI's patches into weights in a way of its own.

    That of Nunchaku's Z-Image joins them with the packed factors when it loads the model, and keeps
    the factors that were there to put them back.
    """
    host = comfy.model_patcher.ModelPatcher
    return type(model).patch_weight_to_device is not host.patch_weight_to_device


def _leave_between_runs(clone: ModelPatcher) -> None:
    """Have what a clone composed taken out before the patcher of any clone writes to its factors.

    Such a patcher takes what is in place for the base: what we had composed would stay for good.
    Patches come and go when a model is loaded, unloaded or made room of. Between runs that may be
    of a clone that is not ours, within a run it is of this one, which is ejected first.
    """
    clone.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, _KEY)
    clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, _KEY, _leave)
    clone.set_injections(_KEY, [PatcherInjection(inject=_keep, eject=_leave)])


def _leave(model: ModelPatcher) -> None:
    """Take out what this clone has composed; ComfyUI's patches stay."""
    from .native.patcher import last_sets  # it imports this

    transformer = inner_of(model.model.diffusion_model)
    # Clones that are let go are ejected, too, at any time: also while another one runs.
    stack = read_state(transformer).stack
    own = [wanted for wanted in last_sets(model) if stack is None or wanted.passes(stack)]
    if not own:
        return
    take_out(transformer, own[0].options)


def take_out(transformer: nn.Module, options: ComposeOptions) -> None:
    """Bring a transformer to its base, now; the next forward composes what it asks for."""
    bare = LoraSet.of(options=replace(options, progress=None, offload=False))
    ComfyQwenImageWrapper.of(transformer).reconcile({OPTIONS_KEY: bare})


def _keep(model: ModelPatcher) -> None:
    """What is to be composed, the next forward asks for."""
    del model


def _measure(model: ModelPatcher, transformer: nn.Module) -> None:
    """Let the host measure a model that it has not measured yet, as the bare model that it is.

    The host measures what is loaded, once, at the latest when it clones: LoRAs that are composed at
    that moment would count for good, and for every branch.
    """
    if model.size:
        return
    with lock_of(transformer):
        model.size = model.model_size() - composed_bytes(transformer)


def _reconcile(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Compose what a forward asks for, outside of compiled code, and run it."""
    from .native.patcher import running_set  # it imports this

    model = executor.class_obj
    # A node behind ours may have put one there: it wraps what all clones share.
    _refuse_rivals(type(model.diffusion_model))
    patcher = getattr(model, "current_patcher", None)
    if patcher is not None:
        patches_notice(patcher)
        wanted = running_set(patcher)
        if wanted is not None:
            args, kwargs = _asking_for(wanted, args, kwargs)
    options = _options_of(args, kwargs)
    if options is not None:
        options = resolved(model, args[1] if len(args) > 1 else kwargs.get("t"), options)
        args, kwargs = _asking_for(options.get(OPTIONS_KEY), args, kwargs)
    ComfyQwenImageWrapper.of(model.diffusion_model).reconcile(options)
    return executor(*args, **kwargs)


def _options_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any] | None:
    """A forward's options: their position has changed between versions, but they come last."""
    options = kwargs.get(_OPTIONS)
    if options is None:
        options = next((arg for arg in reversed(args) if isinstance(arg, Mapping)), None)
    return options


def _asking_for(
    wanted: LoraSet | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward's arguments with a set in its options; None leaves them as they are."""
    options = _options_of(args, kwargs)
    if wanted is None or (options is not None and options.get(OPTIONS_KEY) is wanted):
        return args, kwargs
    asking = {**(options or {}), OPTIONS_KEY: wanted}
    if options is None or kwargs.get(_OPTIONS) is options:
        return args, {**kwargs, _OPTIONS: asking}
    return tuple(asking if arg is options else arg for arg in args), kwargs


# ---- what the person sees ----


def progress(phase: str, done: int, total: int) -> None:
    """Show how far composing is, on the node that runs; end it where the person pressed stop."""
    del phase
    comfy.model_management.throw_exception_if_processing_interrupted()
    if done % max(1, total // _PROGRESS_STEPS) == 0:
        comfy.utils.ProgressBar(total).update_absolute(done)


def running_prompts() -> list[Mapping[str, Any]]:
    """The graphs that the server runs at this moment; none without a server."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    queue = getattr(getattr(server, "instance", None), "prompt_queue", None)
    if queue is None:
        return []
    running = getattr(queue, "get_current_queue_volatile", queue.get_current_queue)()[0]
    # Number, id and graph; what follows has changed between versions.
    return [item[2] for item in running]


def preview(image: Image, prefix: str) -> dict[str, str]:
    """Save a picture in the host's folder for temporary files, and name it as the host draws it.

    Args:
        image: The picture.
        prefix: The beginning of its file's name.
    """
    folder = folder_paths.get_temp_directory()
    os.makedirs(folder, exist_ok=True)
    name = f"{prefix}_{secrets.token_hex(8)}.png"
    # It is shown on this machine, once: time counts, size does not.
    image.save(os.path.join(folder, name), compress_level=1)
    return {"filename": name, "subfolder": "", "type": "temp"}


@functools.lru_cache(maxsize=_EVENTS)
def warn_once(text: str, event: Hashable = None) -> None:
    """Log a line the first time only; where it is of an event, the first time for that event."""
    del event
    _log.warning("%s", text)


def warn_of_rivals() -> None:
    """Say which of our ids another pack has registered, too: the pack loaded last has them."""
    from .registry import NODE_CLASS_MAPPINGS as ours  # it imports the nodes, which import this

    registered = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    rivals: dict[str, list[str]] = {}
    for node_id, node in ours.items():
        other = registered.get(node_id, node)
        if other is not node:
            pack = getattr(other, "RELATIVE_PYTHON_MODULE", other.__module__)
            rivals.setdefault(pack, []).append(node_id)
    for pack, ids in rivals.items():
        what = "a node of the same name" if len(ids) == 1 else "nodes of the same names"
        warn_once(
            f"`{pack}` registers {what} as qwenlora ({', '.join(sorted(ids))}):"
            " the one loaded last is used; remove one of the two packs from custom_nodes"
        )
