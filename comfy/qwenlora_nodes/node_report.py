"""What a node tells of its last run, shown on the node itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import reports

if TYPE_CHECKING:
    from qwenlora.report import ComposeReport

__all__ = ["UI_KEY", "NodeReport", "with_report"]

UI_KEY = "qwenlora"
"""The key of a node's `ui` that the page of ComfyUI does not draw by itself."""


@dataclass(frozen=True)
class NodeReport:
    """What a node tells of its last run.

    Attributes:
        line: One line; what matters most stands first.
        text: The whole.
        complete: False where something that was asked for is left out.
    """

    line: str
    text: str
    complete: bool = True

    @classmethod
    def of(cls, report: ComposeReport, text: str) -> NodeReport:
        """That of a stack.

        Args:
            report: The report of the whole stack.
            text: The whole for a person, the report's own text included.
        """
        return cls(report.headline(), text, report.complete)


def with_report(report: NodeReport, *outputs: Any, **ui: list[Any]) -> dict[str, Any]:
    """A node's outputs, as the host takes them where there is something to show as well.

    Args:
        report: What the node tells.
        *outputs: The outputs.
        **ui: What else is shown on the node, in the host's own kinds: `images`, `text`.
    """
    shown = asdict(report)
    reports.keep(shown)
    return {"ui": {UI_KEY: [shown], **ui}, "result": outputs}
