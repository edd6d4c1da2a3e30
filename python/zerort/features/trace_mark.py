"""Marks in the trace: the end of each step, and the loss scale where there is one."""

from __future__ import annotations

from zerort.features.site import Site
from zerort.step.events import Crossing, Feature
from zerort.step.precision import LossScale
from zerort.trace import TraceSink

__all__ = ["TraceMark"]


class TraceMark(Feature):
    """Tells the sink of each step; last of all, because a sink may sum up what the others did."""

    name = "trace"

    def __init__(self, sink: TraceSink, loss_scale: LossScale) -> None:
        self._sink = sink
        self._loss_scale = loss_scale

    @classmethod
    def open(cls, site: Site) -> TraceMark:
        """Always: who profiles hears of steps too."""
        return cls(site.parts.sink, site.parts.boundary.loss_scale)

    def crossed(self, crossing: Crossing) -> None:
        """A step has ended."""
        scale = self._loss_scale.scale
        if self._sink.enabled and scale != 1.0:
            self._sink.counter("loss scale", self._sink.now(), scale)
        self._sink.step(crossing.steps)
