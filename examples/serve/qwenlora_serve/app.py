"""The application as Ray Serve builds it: `serve run qwenlora_serve.app:build folder=...`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .gate import Gate
from .painter import Painter
from .settings import Settings

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["build"]


def build(settings: Settings) -> Application:
    """Put the deployments together."""
    painter = Painter.options(
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.waiting,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    application: Application = Gate.bind(painter.bind(settings), settings)
    return application
