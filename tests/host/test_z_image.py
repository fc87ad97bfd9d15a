"""Z-Image in a real ComfyUI: the emulated model, and our nodes on it."""

from __future__ import annotations

import pytest

from qwenlora.emulation import SVDQW4A4Linear

EXACT = 1e-5
"""Between the emulated model in exact precision and the dense one, relative, float32."""


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def dense(graph, z_image):
    return z_image.small_z_image()


# ---- the emulated model ----


@pytest.mark.parametrize("dense_refiners", [False, True])
def test_the_emulated_model_computes_what_the_dense_one_does(
    dense, z_image, nunchaku_z_image, dense_refiners
):
    made = nunchaku_z_image.emulated_z_image(dense, dense_refiners=dense_refiners)
    packed = [m for m in made.model.modules() if isinstance(m, SVDQW4A4Linear)]
    assert len(packed) == 4 * (2 if dense_refiners else 4)
    for batch in (1, 2):
        expected = z_image.forward(dense, batch=batch)
        found = z_image.forward(made, batch=batch)
        assert error(found, expected) < EXACT
    assert all(
        not module._forward_pre_hooks for module in made.model.diffusion_model.layers.modules()
    )
