"""The saved nodes of `tests/data/workflows`, and a workflow that runs all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data" / "workflows"
DEFAULTS = {"cpu_offload": "disable", "apply_awq_mod": True, "stack_enabled": True}
_COLUMNS = 9
_SPACING = (1200, 900)
_SAMPLER = [
    ("model", "MODEL"),
    ("positive", "CONDITIONING"),
    ("negative", "CONDITIONING"),
    ("latent_image", "LATENT"),
]
_EMPTY: dict[str, Any] = {"groups": [], "extra": {}, "version": 0.4}


@dataclass(frozen=True)
class SavedNode:
    """A node as a file has it, and what it must show.

    Attributes:
        by: Who wrote it so.
        rows: Name, strength and switch of the rows in use.
        settings: Values of other widgets.
        node: The file's node.
        unused: Rows after those in use.
    """

    by: str
    rows: list[tuple[str, float, bool]]
    settings: dict[str, Any]
    node: dict[str, Any] = field(repr=False)
    unused: list[tuple[str, float, bool]] = field(default_factory=list)

    @property
    def type(self) -> str:
        """The node's id."""
        kind: str = self.node["type"]
        return kind


@cache
def saved_nodes() -> tuple[SavedNode, ...]:
    """All of them."""
    found = []
    for path in sorted(DATA.glob("*.json")):
        for entry in json.loads(path.read_text()):
            rows = [tuple(row) for row in entry["rows"]]
            unused = [tuple(row) for row in entry.get("unused", [])]
            found.append(SavedNode(entry["by"], rows, entry["settings"], entry["node"], unused))
    return tuple(found)


@dataclass
class AllBranches:
    """A workflow with a branch for each node, from one model to what shows the node's latent.

    The nodes of Z-Image get the same model: they take whatever their LoRAs are for.

    Attributes:
        graph: The workflow.
        ids: The id of each node under test.
        shown: The id of what shows each latent.
    """

    graph: dict[str, Any] = field(default_factory=lambda: {**_EMPTY, "nodes": [], "links": []})
    ids: list[int] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, nodes: tuple[SavedNode, ...], *, sampled: bool = True) -> AllBranches:
        """Build it; not `sampled` are the nodes alone, with their model."""
        made = cls()
        latent = made._add("EmptySD3LatentImage", (-2400, 0), [], ["LATENT"], [64, 64, 1])
        model = made._add("EmulatedModel", (-2400, 300), [], ["MODEL"], ["qwen-image"])
        positive, negative = (made._text(seed) for seed in (1, 2))
        for index, saved in enumerate(nodes):
            place = (index % _COLUMNS * _SPACING[0], index // _COLUMNS * _SPACING[1])
            own = made._put(json.loads(json.dumps(saved.node)), place)
            made.ids.append(own)
            made._link(model, own, 0, "MODEL")
            if not sampled:
                continue
            sampler = made._add(
                "KSampler",
                (place[0] + 450, place[1]),
                _SAMPLER,
                ["LATENT"],
                [5, "fixed", 1, 2.0, "euler", "simple", 1.0],
            )
            shown = made._add("LatentHash", (place[0] + 800, place[1]), [("samples", "LATENT")], [])
            made._link(own, sampler, 0, "MODEL")
            made._link(positive, sampler, 1, "CONDITIONING")
            made._link(negative, sampler, 2, "CONDITIONING")
            made._link(latent, sampler, 3, "LATENT")
            made._link(sampler, shown, 0, "LATENT")
            made.shown.append(shown)
        made.graph["last_node_id"] = len(made.graph["nodes"])
        made.graph["last_link_id"] = len(made.graph["links"])
        return made

    def _text(self, seed: int) -> int:
        values = [seed, "fixed", "qwen-image"]
        return self._add("EmulatedText", (-2400, 450 + 150 * seed), [], ["CONDITIONING"], values)

    def _add(
        self,
        kind: str,
        place: tuple[int, int],
        inputs: list[tuple[str, str]],
        outputs: list[str],
        values: list[Any] | None = None,
    ) -> int:
        node = {
            "type": kind,
            "size": [300, 100],
            "inputs": [{"name": name, "type": of, "link": None} for name, of in inputs],
            "outputs": [{"name": of, "type": of, "links": None} for of in outputs],
            "properties": {},
            "widgets_values": values or [],
        }
        return self._put(node, place)

    def _put(self, node: dict[str, Any], place: tuple[int, int]) -> int:
        number = len(self.graph["nodes"]) + 1
        self.graph["nodes"].append(
            {"id": number, "pos": list(place), "flags": {}, "order": number, "mode": 0, **node}
        )
        return number

    def _link(self, giver: int, taker: int, slot: int, kind: str) -> None:
        number = len(self.graph["links"]) + 1
        self.graph["links"].append([number, giver, 0, taker, slot, kind])
        out = self.graph["nodes"][giver - 1]["outputs"][0]
        out["links"] = [*(out["links"] or []), number]
        self.graph["nodes"][taker - 1]["inputs"][slot]["link"] = number
