"""Draws the icon and the banner that ComfyUI's registry shows: `make pictures`.

    python release/pictures.py [FOLDER]

Both are what `qwenlora map` draws: cells whose colour is a strength. The icon is a LoRA of rank 1,
a column, a row and their product. The banner is a map of blocks by layers behind the name. They
need Pillow 10.1.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from qwenlora.map.png import to_image
from qwenlora.map.scale import color_at
from qwenlora.map.scene import Rect, Scene, Text

if TYPE_CHECKING:
    from qwenlora.map.scale import Color

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
WHITE: Color = (240, 242, 245)
_VISIBLE = 0.3
"""How bright a factor's cell of strength 0 is."""
CORNER = 76
"""Radius of the icon's corners, in pixels."""
SHARPER = 4
"""Corners are cut in a mask that is this many times larger."""
COLORS = 255

UP = (0.42, 1.0, 0.68)
DOWN = (0.62, 1.0, 0.36)
"""The icon's column and row."""


def icon() -> Image.Image:
    """400 pixels square, with transparent corners."""
    margin, cell, gap, apart = 49, 66, 9, 20
    first = margin + cell + apart
    places = [first + at * (cell + gap) for at in range(len(UP))]
    scene = Scene(width=400, height=400)

    def put(x: int, y: int, color: Color) -> None:
        scene.shapes.append(Rect(x, y, cell, cell, color))

    for x, down in zip(places, DOWN, strict=True):
        put(x, margin, _faded(WHITE, scene.ground, _VISIBLE + (1 - _VISIBLE) * down))
        for y, up in zip(places, UP, strict=True):
            put(x, y, color_at(up * down))
    for y, up in zip(places, UP, strict=True):
        put(margin, y, _faded(WHITE, scene.ground, _VISIBLE + (1 - _VISIBLE) * up))
    picture = to_image(scene, scale=1).convert("RGBA")
    picture.putalpha(_rounded(400, 400))
    return picture


def banner() -> Image.Image:
    """1260 by 540 pixels, 21:9."""
    pitch, cell = 30, 26
    scene = Scene(width=1260, height=540)
    noise = random.Random(4)
    for row in range(18):
        for column in range(42):
            x, y = column * pitch + 2, row * pitch + 2
            scene.shapes.append(
                Rect(x, y, cell, cell, _strength(column, row, noise.uniform(-1, 1)))
            )
    scene.shapes.append(Text(78, 304, "qwenlora", 124, WHITE))
    return to_image(scene, scale=1)


def _strength(column: int, row: int, noise: float) -> Color:
    """The colour of a banner's cell: the later blocks have most, the layers differ."""
    near = math.exp(-(((column - 34) / 8) ** 2))
    layer = (1, 0.9, 0.8, 1, 0.55, 0.5)[row % 6]
    place = near * layer * (1 + 0.2 * noise)
    return _faded(color_at(place), Scene().ground, min(1.0, 0.12 + 2.2 * near))


def _faded(color: Color, ground: Color, share: float) -> Color:
    """A share of a colour on the ground."""
    red, green, blue = (
        round(back + share * (own - back)) for own, back in zip(color, ground, strict=True)
    )
    return red, green, blue


def _rounded(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width * SHARPER, height * SHARPER))
    box = (0, 0, width * SHARPER - 1, height * SHARPER - 1)
    ImageDraw.Draw(mask).rounded_rectangle(box, CORNER * SHARPER, fill=255)
    return mask.resize((width, height), Image.Resampling.LANCZOS)


def main() -> None:
    """Write both."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    icon().save(folder / "icon.png", optimize=True)
    # Few colours: half of the size.
    few = banner().quantize(COLORS, method=Image.Quantize.MAXCOVERAGE)
    few.save(folder / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
