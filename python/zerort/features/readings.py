"""What there is to read of an engine's features, under DeepSpeed's names; None or empty where a
feature is off.
"""

from __future__ import annotations

from typing import Any

from zerort.features.communication import Communication
from zerort.features.eigenvalue import BlockEigenvalue
from zerort.features.layer_drop import LayerDrop
from zerort.features.monitors.monitor import Monitor
from zerort.features.monitors.reporting import OFF, Monitored
from zerort.features.stopwatch import Stopwatches
from zerort.features.throughput import Throughput, ThroughputTimer
from zerort.features.timers import Timers
from zerort.step.accumulation import Counters
from zerort.step.events import Events

__all__ = ["FeatureReadings"]


_NO_TIMERS = Stopwatches(enabled=False)
_NO_SPEED = ThroughputTimer(Counters(), 0, None, enabled=False)


class FeatureReadings:
    """Getters over the features."""

    _events: Events

    def get_pld_theta(self) -> float | None:
        """The share of layers that progressive layer drop keeps in this window; None when off."""
        drop = self._events.find(LayerDrop)
        return None if drop is None else drop.theta

    @property
    def progressive_layer_drop(self) -> LayerDrop | None:
        """What `get_theta()` and `get_state()` are asked of; None when off."""
        return self._events.find(LayerDrop)

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

    @property
    def tput_timer(self) -> ThroughputTimer:
        """Samples a second, from boundary to boundary; one that stands still where
        `timers.throughput` is off.
        """
        found = self._events.find(Throughput)
        return _NO_SPEED if found is None else found.timer

    def communication_summary(self) -> dict[str, Any]:
        """What this rank's planned collectives have taken since the start, by operation and bytes
        of a rank's part: counts, latencies in ms and bandwidths in Gbit/s. Empty without
        `comms_logger`.

        `{"summary": {operation: {bytes: {"count", "total_latency_ms", "avg_latency_ms",
        "tput_avg_gbps", "busbw_avg_gbps", "msg_size_bytes", "msg_size_str"}}},
        "straggler_analysis": None, "metadata": {"world_size", "rank", "timestamp"}}`
        """
        found = self._events.find(Communication)
        return {} if found is None else found.summary()
