"""A picture as SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from qwenlora.map.scale import hex_of
from qwenlora.map.scene import Line, Rect

if TYPE_CHECKING:
    from qwenlora.map.scene import Scene, Shape

__all__ = ["to_svg"]


def to_svg(scene: Scene) -> str:
    """The picture as a document of its own."""
    size = f'width="{scene.width}" height="{scene.height}"'
    box = f'viewBox="0 0 {scene.width} {scene.height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box}'
        ' font-family="Segoe UI, Helvetica, Arial, sans-serif">',
        f'<rect width="100%" height="100%" fill="{hex_of(scene.ground)}"/>',
        *map(_element, scene.shapes),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _element(shape: Shape) -> str:
    if isinstance(shape, Rect):
        place = f'x="{shape.x:g}" y="{shape.y:g}"'
        size = f'width="{shape.width:g}" height="{shape.height:g}"'
        return f'<rect {place} {size} fill="{hex_of(shape.fill)}"/>'
    if isinstance(shape, Line):
        ends = f'x1="{shape.x:g}" y1="{shape.y:g}" x2="{shape.to_x:g}" y2="{shape.to_y:g}"'
        return f'<line {ends} stroke="{hex_of(shape.color)}" stroke-width="{shape.width:g}"/>'
    look = f'font-size="{shape.size}" fill="{hex_of(shape.color)}" text-anchor="{shape.anchor}"'
    return f'<text x="{shape.x:g}" y="{shape.y:g}" {look}>{escape(shape.text)}</text>'
