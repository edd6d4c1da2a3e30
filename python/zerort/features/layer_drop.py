"""Progressive layer drop (Zhang and He 2020, arXiv 2010.13369): the module is told in its forward
with which probability it keeps its layers.

theta(t) = (1 - theta) exp(-gamma t) + theta falls from 1 to `theta` with the steps t. It is a
function of the counter of steps: a checkpoint holds nothing of it, and a resumed run has the values
of one that was not interrupted. What a module does with it is the module's own; where ranks drop
different layers, the gradients of dropped ones count as zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from zerort.config.features import ProgressiveLayerDrop
from zerort.features.site import Site
from zerort.step.accumulation import Counters
from zerort.step.events import Feature

__all__ = ["LayerDrop"]


class LayerDrop(Feature):
    """`progressive_layer_drop`: two keyword arguments of each forward in training. Mirrors
    DeepSpeed's ProgressiveLayerDrop, whose theta is that of the step before: the first two windows
    train with 1.
    """

    name = "progressive_layer_drop"

    def __init__(
        self, settings: ProgressiveLayerDrop, module: nn.Module, counters: Counters
    ) -> None:
        self._settings = settings
        self._module = module
        self._counters = counters

    @classmethod
    def open(cls, site: Site) -> LayerDrop | None:
        """Where the configuration asks for it."""
        settings = site.config.progressive_layer_drop
        return cls(settings, site.module, site.counters) if settings.enabled else None

    @property
    def theta(self) -> float:
        """Of the window under way."""
        steps, lowest = self._counters.global_steps, self._settings.theta
        if steps == 0:
            return 1.0
        return (1.0 - lowest) * math.exp(-self._settings.gamma * (steps - 1)) + lowest

    def get_theta(self) -> float:
        """`theta`, by DeepSpeed's name."""
        return self.theta

    def get_state(self) -> dict[str, Any]:
        """The keyword arguments that a forward in training gets."""
        return {"progressive_layer_drop": True, "pld_theta": self.theta}

    def keywords(self) -> Mapping[str, Any]:
        """`progressive_layer_drop=True` and `pld_theta`, while the module trains."""
        return self.get_state() if self._module.training else {}
