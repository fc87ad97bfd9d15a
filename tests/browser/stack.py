"""The rows of a stack on the page, for a person's hands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Locator

    from .workbench import Workbench


def row(name: str, strength: float = 1.0, enabled: bool = True) -> dict[str, Any]:
    """One row as it is saved; `name` without its ending."""
    full = f"{name}.safetensors" if name else ""
    return {"lora_name": full, "strength": strength, "enabled": enabled}


@dataclass
class Stack:
    """One `QwenLoraStack`, the only one on the page or in the place that is named.

    Attributes:
        bench: The page.
        node: Its id.
        place: A selector of what the rows are looked for in.
    """

    bench: Workbench
    node: Any
    place: str = "body"

    @classmethod
    def add(cls, bench: Workbench, *rows: dict[str, Any]) -> Stack:
        """Put one on the canvas."""
        values = {"loras": list(rows)} if rows else {}
        return cls(bench, bench.add("QwenLoraStack", (300, 200), **values))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Its value."""
        return self.bench.values(self.node)["loras"]

    @property
    def shown(self) -> list[tuple[str, str, bool]]:
        """What a person reads: the file, its strength, its switch."""
        lines = self.element.locator(".qwenlora-line")
        return [
            (
                line.locator(".qwenlora-file").text_content() or "",
                line.locator(".qwenlora-strength").input_value(),
                line.locator(".qwenlora-switch").get_attribute("aria-checked") == "true",
            )
            for line in lines.all()
        ]

    @property
    def element(self) -> Locator:
        """All of it; the first on the page may be hidden, that of a node of before."""
        return self.bench.page.locator(self.place).locator("qwenlora-rows:visible").first

    @property
    def all(self) -> Locator:
        """The switch of all rows."""
        return self.element.locator(".qwenlora-heading .qwenlora-switch")

    def line(self, index: int) -> Locator:
        """One row."""
        return self.element.locator(".qwenlora-line").nth(index)

    def part(self, index: int, name: str) -> Locator:
        """A part of a row: grip, switch, file, strength, arrows, remove."""
        return self.line(index).locator(f".qwenlora-{name}")

    def click(self, index: int, name: str) -> None:
        """Click a part of a row."""
        self.part(index, name).click()
        self.bench.settle()

    def choose(self, text: str) -> None:
        """Type into the list of files that is open, and take the first."""
        self.keys(*text, "Enter")

    def add_row(self) -> None:
        """Click "Add LoRA"; its list of files is then open."""
        self.element.locator(".qwenlora-add").click()
        self.bench.settle()

    def keys(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            self.bench.page.keyboard.press(key)
        self.bench.settle()

    def drag(self, index: int, to: int) -> None:
        """Drag a row by its grip onto another."""
        mouse = self.bench.page.mouse
        start, end = self.part(index, "grip").bounding_box(), self.line(to).bounding_box()
        assert start is not None
        assert end is not None
        x = start["x"] + start["width"] / 2
        mouse.move(x, start["y"] + start["height"] / 2)
        mouse.down()
        mouse.move(x + 3, end["y"] + end["height"] / 2, steps=4)
        mouse.up()
        self.bench.settle()
