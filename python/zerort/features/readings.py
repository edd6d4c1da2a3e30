"""What there is to read of an engine's features, under DeepSpeed's names; None or empty where a
feature is off.
"""

from __future__ import annotations

from zerort.features.eigenvalue import BlockEigenvalue
from zerort.features.layer_drop import LayerDrop
from zerort.features.monitors.monitor import Monitor
from zerort.features.monitors.reporting import OFF, Monitored
from zerort.features.stopwatch import Stopwatches
from zerort.features.timers import Timers
from zerort.step.events import Events

__all__ = ["FeatureReadings"]


_NO_TIMERS = Stopwatches(enabled=False)


class FeatureReadings:
    """Getters over the features."""

    _events: Events

    def get_pld_theta(self) -> float | None:
        """The share of layers that progressive layer drop keeps in this window; None when off."""
        drop = self._events.find(LayerDrop)
        return None if drop is None else drop.theta

    @property
    def monitor(self) -> Monitor:
        """What events of the user's own are written to; on ranks other than 0, and where no monitor
        is on, it takes them and does nothing.
        """
        found = self._events.find(Monitored)
        return OFF if found is None else found.monitor

    @property
    def block_eigenvalue(self) -> dict[str, tuple[float, int]] | None:
        """By parameter name, the eigenvalue of its block relative to the largest, and the block's
        number, as of the last boundary where they were computed; None before, and when off.
        """
        feature = self._events.find(BlockEigenvalue)
        return None if feature is None else feature.values

    def get_wall_clock_timers(self) -> dict[str, float]:
        """Milliseconds as of the last `step`: `fwd`, `bwd`, `bwd_inner`, `bwd_allreduce` and `step`
        of the window, and with `_microstep` behind the name of the micro-batch. Empty without
        `wall_clock_breakdown`, and before the first step.
        """
        timers = self._events.find(Timers)
        return {} if timers is None else dict(timers.shown)

    @property
    def timers(self) -> Stopwatches:
        """Timers by name, the engine's and any of the user's: `engine.timers("load").start()`.
        Without `wall_clock_breakdown` they do nothing.
        """
        timers = self._events.find(Timers)
        return _NO_TIMERS if timers is None else timers.stopwatches
