"""`steps_per_print`: a line of log on rank 0 every so many steps."""

from __future__ import annotations

import logging

from zerort.features.flops import FlopsProfile
from zerort.features.site import Site
from zerort.features.throughput import Throughput
from zerort.step.boundary import Boundary
from zerort.step.events import Crossing, Feature
from zerort.step.readings import momentum

__all__ = ["ProgressLine"]

_log = logging.getLogger("zerort")


class ProgressLine(Feature):
    """Logs counters, rates and the gradient's norm `every` so many steps."""

    name = "steps_per_print"

    def __init__(self, every: int, site: Site) -> None:
        self._every = every
        self._counters = site.counters
        self._boundary: Boundary = site.parts.boundary
        self._throughput = site.find(Throughput)
        self._site = site

    @classmethod
    def open(cls, site: Site) -> ProgressLine | None:
        """On rank 0, where the configuration asks for it."""
        every = site.config.steps_per_print
        return cls(every, site) if every and site.is_first else None

    def crossed(self, crossing: Crossing) -> None:
        """Logs at every so many steps."""
        if crossing.steps % self._every:
            return
        groups = self._boundary.optimizer.optimizer.param_groups
        _log.info(
            "step=%d, skipped=%d, lr=%s, mom=%s, norm=%s%s",
            crossing.steps,
            self._counters.skipped_steps,
            [group["lr"] for group in groups],
            [momentum(group) for group in groups],
            self._boundary.norm,
            self._speed(),
        )

    def _speed(self) -> str:
        """Samples a second, once a step has been timed; tokens too where their number is known, and
        the share of the devices' peak behind a step that was profiled.
        """
        timer = None if self._throughput is None else self._throughput.timer
        if timer is None or timer.current is None:
            return ""
        speed = f", samples/s={timer.current:.1f} (average {timer.avg_samples_per_sec():.1f})"
        if timer.tokens_per_sample is not None:
            speed += f", tokens/s={timer.current * timer.tokens_per_sample:.1f}"
        flops = self._site.find(FlopsProfile)
        if flops is not None and flops.utilisation is not None:
            speed += f", MFU={timer.current * flops.utilisation:.1%}"
        return speed
