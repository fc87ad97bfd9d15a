"""Checks that a ComfyUI and its node packs go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.doctor.facts import Facts, Host, Layout, Pack, PackKind, RotaryUse
from qwenlora.doctor.finding import Finding, Severity
from qwenlora.doctor.mend import Mend, Move, Run
from qwenlora.doctor.version import release_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["CHECKS"]

_NUNCHAKU_NODES = "https://github.com/nunchux-ai/ComfyUI-nunchaku"
_OLDEST = (0, 3, 75)
_ROTARY_BACK = "0.25.0"


def _hosts(facts: Facts) -> Iterator[Finding]:
    if not facts.hosts:
        yield Finding(
            severity=Severity.NOTE,
            code="comfyui-none",
            text="no ComfyUI is found nearby: `qwenlora doctor --comfyui PATH` looks at one",
        )
    for host in facts.hosts:
        if host.version is not None and release_of(host.version) < _OLDEST:
            yield Finding(
                severity=Severity.NOTE,
                code="comfyui-old",
                text=f"ComfyUI {host.version} in {host.root} is older than 0.3.75, the oldest that"
                " the nodes are tested in",
                mends=_updating_host(host),
            )
        if not host.is_own_python:
            yield Finding(
                severity=Severity.NOTE,
                code="comfyui-python",
                text=f"no Python lies beside {host.root}: it is taken to run in {host.python}. If"
                " it does not, run this command with its own: `PYTHON -m qwenlora doctor`",
            )


def _rotary(facts: Facts) -> Iterator[Finding]:
    for host in facts.hosts:
        needing = [p for p in host.packs if p.is_enabled and p.rotary is RotaryUse.NEEDS]
        supplying = [p for p in host.packs if p.is_enabled and p.rotary is RotaryUse.SUPPLIES]
        if host.has_rotary is not False or not needing:
            continue
        what = (
            f"{_named(needing[0])} imports `apply_rotary_emb`, which ComfyUI {_version(host)} in"
            f" {host.root} has not: it went with 0.23.0 and came back with {_ROTARY_BACK}"
        )
        if supplying:
            text = f"{what}; its Qwen loader works because {supplying[0].path.name} puts it back"
            yield Finding(severity=Severity.NOTE, code="rotary", text=text)
        else:
            yield Finding(
                severity=Severity.PROBLEM,
                code="rotary",
                text=f"{what}. `Nunchaku Qwen Image DiT Loader` is missing",
                mends=_updating_host(host),
            )


def _forward(facts: Facts) -> Iterator[Finding]:
    for host in facts.hosts:
        for pack in host.enabled(PackKind.COMFYUI_NUNCHAKU):
            if None in (host.takes_guidance, pack.takes_guidance):
                continue
            if pack.takes_guidance and not host.takes_guidance:
                yield Finding(
                    severity=Severity.PROBLEM,
                    code="forward",
                    text=f"{_named(pack)} is made for ComfyUI before 0.6: in {_version(host)} the"
                    " reference images of Qwen-Image-Edit land in the place of another argument,"
                    " without a message",
                    mends=_updating_pack(pack),
                )
            elif host.takes_guidance and not pack.takes_guidance:
                yield Finding(
                    severity=Severity.PROBLEM,
                    code="forward",
                    text=f"{_named(pack)} is made for ComfyUI 0.6 and newer, but {host.root} is"
                    f" {_version(host)}: sampling with its Qwen-Image models fails",
                    mends=_updating_host(host),
                )


def _packs(facts: Facts) -> Iterator[Finding]:
    for host in facts.hosts:
        ours = host.enabled(PackKind.QWENLORA)
        loaders = host.enabled(PackKind.COMFYUI_NUNCHAKU)
        if ours and not loaders:
            yield Finding(
                severity=Severity.PROBLEM,
                code="no-loader",
                text=f"{host.root} has qwenlora's nodes but no ComfyUI-nunchaku, whose loader"
                " loads the model that they work on",
                mends=(_clone(host.root / "custom_nodes" / "ComfyUI-nunchaku"),),
            )
        elif loaders and not ours:
            yield Finding(
                severity=Severity.NOTE,
                code="no-nodes",
                text=f"{host.root} has no nodes of qwenlora: `comfy/README.md` in its repository"
                " says how to install them",
            )
        elif ours:
            packs = ", ".join(_named(p) for p in (*ours, *loaders))
            yield Finding(severity=Severity.OK, code="comfyui", text=f"{host.root}: {packs}")


def _doubles(facts: Facts) -> Iterator[Finding]:
    for host in facts.hosts:
        for kind in (PackKind.QWENLORA, PackKind.COMFYUI_NUNCHAKU):
            first, *others = host.enabled(kind) or (None,)
            if first is not None and others:
                where = ", ".join(str(p.path) for p in (first, *others))
                yield Finding(
                    severity=Severity.PROBLEM,
                    code="pack-twice",
                    text=f"{kind.value} is there {1 + len(others)} times, and the one that is"
                    f" loaded last wins: {where}",
                    mends=tuple(_disabling(p) for p in others),
                )


def _other_loader(facts: Facts) -> Iterator[Finding]:
    for host in facts.hosts:
        others = host.enabled(PackKind.OTHER_LOADER)
        if others and host.enabled(PackKind.QWENLORA):
            yield Finding(
                severity=Severity.PROBLEM,
                code="other-loader",
                text=f"{_named(others[0])} registers the node names that qwenlora's nodes keep for"
                " saved workflows: the pack that is loaded last gets them, and it changes"
                " Nunchaku's classes for all",
                mends=tuple(_disabling(p) for p in others),
            )


def _named(pack: Pack) -> str:
    return f"{pack.path.name} {pack.version or 'of unknown version'}"


def _version(host: Host) -> str:
    return host.version or "of unknown version"


def _disabling(pack: Pack) -> Mend:
    return Move(pack.path, pack.path.with_name(f"{pack.path.name}.disabled"))


def _clone(path: Path) -> Mend:
    return Run(("git", "clone", _NUNCHAKU_NODES, str(path)))


def _updating_host(host: Host) -> tuple[Mend, ...]:
    if host.updater is not None:
        return (Run((str(host.updater),)),)
    if host.is_git and host.layout is not Layout.BASE:
        return (Run(("git", "-C", str(host.root), "pull")),)
    return ()


def _updating_pack(pack: Pack) -> tuple[Mend, ...]:
    if pack.is_git:
        return (Run(("git", "-C", str(pack.path), "pull")),)
    return (_disabling(pack), _clone(pack.path))


CHECKS = (_hosts, _rotary, _forward, _packs, _doubles, _other_loader)
