"""Sections of what an engine does beside gradients (`zerort.features`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from zerort.config.section import Section

__all__ = ["ProgressiveLayerDrop"]


class ProgressiveLayerDrop(Section):
    """`progressive_layer_drop`: how often the module is asked to keep its layers."""

    enabled: bool = False
    theta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """What the share of layers that are kept falls to."""
    gamma: Annotated[float, Field(ge=0)] = 0.001
    """How fast it falls, per step."""
