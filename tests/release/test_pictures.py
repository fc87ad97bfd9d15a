"""The pictures that the registry shows are those that the program draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

image = pytest.importorskip("PIL.Image", reason="needs Pillow: make setup")

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs" / "pictures"
SIZES = {"icon.png": (400, 400), "banner.png": (1260, 540)}


def pixels(path: Path, size: tuple[int, int]) -> np.ndarray:
    with image.open(path) as picture:
        assert picture.size == size
        return np.asarray(picture.convert("RGBA"), dtype=np.float64)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    subprocess.run([sys.executable, ROOT / "release" / "pictures.py", folder], check=True)
    return folder


@pytest.mark.parametrize("name", SIZES)
def test_the_kept_picture_is_the_drawn_one(drawn: Path, name: str) -> None:
    """But for what another Pillow draws otherwise: the edges of letters and corners."""
    kept, anew = (pixels(folder / name, SIZES[name]) for folder in (KEPT, drawn))
    assert np.abs(kept - anew).mean() < 0.5
    assert (KEPT / name).stat().st_size < 50_000


def test_the_registry_takes_their_sizes() -> None:
    """A square icon of at most 400 pixels, a banner of 21:9."""
    width, height = SIZES["icon.png"]
    assert width == height <= 400
    width, height = SIZES["banner.png"]
    assert 9 * width == 21 * height
