"""A picture in pixels, drawn by Pillow."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any

from qwenlora.errors import OutputError
from qwenlora.map.scene import Line, Rect

if TYPE_CHECKING:
    from PIL.Image import Image

    from qwenlora.map.scene import Scene, Text

__all__ = ["to_image", "to_png"]

_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}
_FONTS = (
    "msyh.ttc",
    "malgun.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "DroidSansFallbackFull.ttf",
    "wqy-microhei.ttc",
    "DejaVuSans.ttf",
)
"""Fonts of systems for names that are not Latin, which Pillow's own has no letters for."""
_LAST_LATIN = 0x24F


def to_image(scene: Scene, *, scale: int = 2) -> Image:
    """The picture as RGB, `scale` pixels to a unit.

    Raises:
        OutputError: Pillow is not installed, or too old.
    """
    drawing, image_of = _pillow()
    image: Image = image_of("RGB", (scene.width * scale, scene.height * scale), scene.ground)
    draw = drawing(image)
    for shape in scene.shapes:
        if isinstance(shape, Rect):
            x, y = round(shape.x * scale), round(shape.y * scale)
            far = (shape.x + shape.width) * scale, (shape.y + shape.height) * scale
            draw.rectangle((x, y, round(far[0]) - 1, round(far[1]) - 1), fill=shape.fill)
        elif isinstance(shape, Line):
            ends = [own * scale for own in (shape.x, shape.y, shape.to_x, shape.to_y)]
            draw.line(ends, fill=shape.color, width=round(shape.width * scale))
        else:
            _write(draw, shape, scale)
    return image


def to_png(scene: Scene, *, scale: int = 2) -> bytes:
    """The picture as a PNG file.

    Raises:
        OutputError: Pillow is not installed, or too old.
    """
    file = io.BytesIO()
    to_image(scene, scale=scale).save(file, "PNG", optimize=True)
    return file.getvalue()


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise OutputError(f"a picture in pixels needs Pillow: {error}\n{_HINT}") from error
    if not hasattr(ImageFont, "FreeTypeFont") or not _has_sizes(ImageFont):
        raise OutputError(f"this Pillow is older than 10.1, or has no FreeType\n{_HINT}")
    return ImageDraw.Draw, Image.new


_HINT = "hint: `pip install qwenlora[map]` brings it; an .svg and the terminal's map do without"


def _has_sizes(fonts: Any) -> bool:
    """Tell if the font that Pillow brings comes in sizes."""
    try:
        fonts.load_default(10)
    except (TypeError, ImportError, OSError):
        return False
    return True


def _write(draw: Any, shape: Text, scale: int) -> None:
    font = _font(shape.size * scale, is_latin=all(ord(c) <= _LAST_LATIN for c in shape.text))
    at = (shape.x * scale, shape.y * scale)
    draw.text(at, shape.text, fill=shape.color, font=font, anchor=_ANCHORS[shape.anchor])


@functools.lru_cache(maxsize=32)
def _font(size: int, *, is_latin: bool) -> Any:
    from PIL import ImageFont

    for name in () if is_latin else _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
