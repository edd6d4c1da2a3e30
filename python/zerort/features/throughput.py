"""`engine.tput_timer`: samples a second, from boundary to boundary.

One reading of the host's clock a step, and no synchronisation: the host's clock is that of a whole
run, whatever the device does between two boundaries. The first two steps are not timed: they
allocate, compile and learn the order of gradients.
"""

from __future__ import annotations

import time

from zerort.features.site import Site
from zerort.step.accumulation import Counters
from zerort.step.events import Crossing, Feature

__all__ = ["Throughput", "ThroughputTimer"]

START_STEP = 2
"""Steps that are not timed."""


class ThroughputTimer:
    """What DeepSpeed's has that users call. The engine drives it; `stop` and `start` leave out what
    is between them, an evaluation say.
    """

    def __init__(
        self, counters: Counters, batch_size: int, steps_per_output: int | None, *, enabled: bool
    ) -> None:
        self.batch_size = batch_size
        """Samples of the last step, over all ranks."""
        self.steps_per_output = steps_per_output
        self.tokens_per_sample: float | None = None
        """Set by who knows it: then lines of progress have tokens a second."""
        self.enabled = enabled
        self.epoch_count = 0
        self.global_step_count = 0
        """Boundaries that it has seen."""
        self.total_elapsed_time = 0.0
        """Seconds of the steps that were timed."""
        self.current: float | None = None
        """Samples a second of the last step that was timed."""
        self._counters = counters
        self._micro_steps = counters.micro_steps
        self._samples, self._seen = 0, counters.global_samples
        self._since: float | None = time.perf_counter()
        self._taken = 0.0

    @property
    def micro_step_count(self) -> int:
        """Micro-batches of the epoch."""
        return self._counters.micro_steps - self._micro_steps

    def update_epoch_count(self) -> None:
        """An epoch is over."""
        self.epoch_count += 1
        self._micro_steps = self._counters.micro_steps

    def start(self) -> None:
        """Time counts again; nothing where it does."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """From here to `start` no time counts. Steps are counted by the engine, and reported in its
        line of progress.
        """
        if self._since is not None:
            self._taken += time.perf_counter() - self._since
            self._since = None

    def avg_samples_per_sec(self) -> float:
        """Over all steps that were timed; -inf before there is one."""
        if not self.total_elapsed_time:
            return float("-inf")
        return self._samples / self.total_elapsed_time

    def crossed(self, crossing: Crossing) -> None:
        """A boundary."""
        now = time.perf_counter()
        took = self._taken + (0.0 if self._since is None else now - self._since)
        self._taken = 0.0
        if self._since is not None:
            self._since = now
        self.global_step_count += 1
        samples = crossing.samples - self._seen
        self._seen = crossing.samples
        if self.global_step_count > START_STEP and samples > 0 and took > 0:
            self.batch_size = samples
            self._samples += samples
            self.total_elapsed_time += took
            self.current = samples / took

    def restored(self) -> None:
        """The counters are another run's."""
        self._seen = self._counters.global_samples
        self._micro_steps = self._counters.micro_steps


class Throughput(Feature):
    """Times the steps of one engine, on every rank."""

    name = "timers.throughput"

    def __init__(self, timer: ThroughputTimer) -> None:
        self.timer = timer

    @classmethod
    def open(cls, site: Site) -> Throughput | None:
        """Unless the configuration turns it off."""
        config = site.config
        if not config.timers.throughput.enabled:
            return None
        timer = ThroughputTimer(
            site.counters, site.parts.batch.train, config.steps_per_print, enabled=True
        )
        return cls(timer)

    def crossed(self, crossing: Crossing) -> None:
        """A step more."""
        self.timer.crossed(crossing)

    def restored(self) -> None:
        """A checkpoint has been loaded."""
        self.timer.restored()
