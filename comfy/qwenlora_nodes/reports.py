"""Reports of past runs, by what their nodes' results depended on.

A node whose result is cached does not run, and a page that was reloaded has forgotten what it
showed. Both ask here. A report is found by all that led to it: the classes and values of its node
and of all nodes before it, and the LoRA files named there as they are now. So a report of other
inputs is never given. A node with the same inputs and another id has it, too: it shares the cached
result.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qwenlora.errors import LoraNotFoundError

from . import host

if TYPE_CHECKING:
    from aiohttp import web

__all__ = ["PATH", "Reports", "Signatures", "add_route", "answer", "keep"]

PATH = "/qwenlora/reports"
_MOST = 512
_ENVELOPE = "__value__"

Prompt = Mapping[str, Any]
Shown = dict[str, Any]


class Reports:
    """The last reports, as many as `most`; safe to use from several threads."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Shown] = OrderedDict()

    def put(self, prompt: Prompt, node_id: str, shown: Shown) -> None:
        """Keep the report of a node that has just run."""
        key = Signatures(prompt).of(node_id)
        if key is None:
            return
        with self._lock:
            self._kept[key] = shown
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)

    def of(self, prompt: Prompt, classes: Collection[str]) -> dict[str, Shown]:
        """The reports of a prompt's nodes of these classes, by the nodes' ids."""
        signatures = Signatures(prompt)
        keys = {
            node_id: signatures.of(node_id)
            for node_id, node in prompt.items()
            if isinstance(node, Mapping) and node.get("class_type") in classes
        }
        with self._lock:
            return {
                node_id: self._kept[key]
                for node_id, key in keys.items()
                if key is not None and key in self._kept
            }


class Signatures:
    """Digests of all that the results of a prompt's nodes depend on.

    Ids of nodes are no part of them.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._listed = {name.replace("\\", "/") for name in host.lora_names()}
        self._known: dict[str, str | None] = {}

    def of(self, node_id: str) -> str | None:
        """That of one node; None where something before it is malformed or leads round."""
        path, opened = [node_id], set[str]()
        while path:
            own = path[-1]
            ahead = [] if own in self._known else self._unknown_before(own)
            if not ahead:
                path.pop()
                self._known.setdefault(own, self._digest(own))
            elif opened.intersection([own, *ahead]):
                return None
            else:
                opened.add(own)
                path.extend(ahead)
        return self._known[node_id]

    def _inputs(self, node_id: str) -> Mapping[str, Any] | None:
        node = self._prompt.get(node_id)
        inputs = node.get("inputs") if isinstance(node, Mapping) else None
        return inputs if isinstance(inputs, Mapping) else None

    def _unknown_before(self, node_id: str) -> list[str]:
        values = (self._inputs(node_id) or {}).values()
        return [value[0] for value in values if _is_link(value) and value[0] not in self._known]

    def _digest(self, node_id: str) -> str | None:
        inputs = self._inputs(node_id)
        if inputs is None:
            return None
        row: list[Any] = [self._prompt[node_id].get("class_type")]
        for name, value in sorted(inputs.items()):
            if not _is_link(value):
                row.append((name, _plain(value), list(_files(value, self._listed))))
            elif (before := self._known[value[0]]) is not None:
                row.append((name, before, value[1]))
            else:
                return None
        return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


_reports = Reports()


def keep(shown: Shown) -> None:
    """Keep the report of the node that runs now, where the host tells which it is."""
    context = _executing()
    if context is None:
        return
    prompt = _running(context.prompt_id)
    # Nodes that others put into a running workflow are on nobody's canvas.
    if context.node_id in prompt:
        _reports.put(prompt, context.node_id, shown)


def add_route() -> None:
    """Let pages ask for reports, where there is a server."""
    server = _server()
    if server is None or any(getattr(own, "path", None) == PATH for own in server.routes):
        return
    server.routes.post(PATH)(answer)


async def answer(request: web.Request) -> web.Response:
    """Answer a page: `{"prompt": ...}` to `{"reports": {node id: report}}`."""
    from aiohttp import web

    from .registry import NODE_CLASS_MAPPINGS  # it imports the nodes, which import this

    try:
        found = _reports.of((await request.json())["prompt"], NODE_CLASS_MAPPINGS)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return web.json_response({"error": "needs `prompt`, a graph in API format"}, status=400)
    return web.json_response({"reports": found})


def _is_link(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], (int, float))
    )


def _plain(value: Any) -> Any:
    """A value without what the host changes in it when it takes a prompt."""
    if isinstance(value, Mapping):
        if value.keys() == {_ENVELOPE}:
            return _plain(value[_ENVELOPE])
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _files(value: Any, listed: set[str]) -> Iterator[tuple[int, int] | None]:
    """The identities of LoRA files that a value names, in its order; None for one that is gone."""
    if isinstance(value, Mapping):
        for _, own in sorted(value.items()):
            yield from _files(own, listed)
    elif isinstance(value, (list, tuple)):
        for own in value:
            yield from _files(own, listed)
    elif isinstance(value, str) and value.replace("\\", "/") in listed:
        try:
            yield host.file_identity(value)
        except LoraNotFoundError:
            yield None


# ---- the host ----


def _server() -> Any:
    """The host's server; None where there is none, as in scripts that import its nodes."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _executing() -> Any:
    """The prompt and node that run in this thread, with `prompt_id` and `node_id`, or None."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None
    return get_executing_context()


def _running(prompt_id: str) -> Prompt:
    """The prompt that runs under an id; empty where the host does not tell."""
    queue = getattr(_server(), "prompt_queue", None)
    if queue is None:
        return {}
    running, _ = queue.get_current_queue_volatile()
    return next((item[2] for item in running if item[1] == prompt_id), {})
