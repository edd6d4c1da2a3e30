"""Predicts a step from what was measured, and finds the setting with which it is shortest.

What it guarantees: a function of its arguments, so ranks that have the same figures come to the
same setting. What it does not do: it measures nothing; the simulation itself is the core's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zerort import _core
from zerort.config import Config
from zerort.step.overlap import Threshold
from zerort.tune.fit import Line
from zerort.tune.profile import Profile
from zerort.tune.wire import Wire
from zerort.wire import FORMATS

__all__ = ["Best", "Predictor", "Setting", "best"]

_WINDOWS: Sequence[int | None] = (None, 2, 4)
_LONG = 1 << 20
"""Elements over which what a format adds to each is spread."""
_ANY = 1e-9
"""Seconds: any will do where only one figure is to be found from what was measured."""
_DOUBTED = 4.0
"""How much less is known of a bucket's price than of a byte's before a step has been measured."""
_WORTH = 0.1
"""By how much a narrower wire has to be faster to be proposed: it rounds gradients."""


@dataclass(frozen=True)
class Setting:
    """What is tuned."""

    bucket_bytes: int
    window: int | None
    """None is all."""
    wire: str | None = None
    """None is as configured."""

    def applied(self, config: Config) -> Config:
        """`config` with it."""
        changes: dict[str, Any] = {
            "bucket_bytes": self.bucket_bytes,
            "window": self.window or "all",
        }
        if self.wire is not None:
            changes["wire"] = self.wire
        zero = config.zero_optimization.model_copy(update={"reduce_bucket_size": None})
        runtime = config.zerort.model_copy(update=changes)
        return config.model_copy(update={"zero_optimization": zero, "zerort": runtime})


@dataclass(frozen=True)
class Predictor:
    """A machine and a rank's work on it, both measured with the plan `measured`."""

    wire: Wire
    profile: Profile
    measured: _core.Plan
    blocks: bool
    """Whether waiting for a collective blocks the host."""
    sums_pieces: bool
    """Whether every rank's piece arrives and is summed here."""
    overlap: Threshold | None = None
    """From when on updated parameters are waited for in the next forward."""

    def seconds(self, plan: _core.Plan) -> float:
        """A step with this plan takes so long."""
        return self.prediction(plan).total_ns / 1e9

    def prediction(self, plan: _core.Plan) -> _core.Prediction:
        """All parts of it; launches are in the order in which gradients come."""
        work = self.work
        return _core.simulate(plan.reordered(work.observed), work, self.machine)

    @property
    def work(self) -> _core.Workload:
        """Of one rank in a step."""
        profile = self.profile
        return _core.Workload(
            _ns(profile.forward),
            _ns(profile.backward),
            [min(_ns(at), _ns(profile.backward)) for at in profile.arrivals],
            micro_batches=profile.micro_batches,
            other_ns=_ns(profile.other),
        )

    @cached_property
    def machine(self) -> _core.Machine:
        """What it runs on. With it the plan that was measured takes as much work as was measured;
        how that is shared out between buckets and bytes follows from what the host was tried for.
        """
        profile, tried = self.profile, self._tried
        buckets, lengths = (self._spent(work) for work in (tried.of_buckets, tried.of_lengths))
        reduce = _factors(profile.reducing, buckets[0], lengths[0])
        together = profile.host.update is not None
        updated = profile.update + (profile.publishing if together else 0.0)
        update = tried.update.times(*_factors(updated, buckets[1], lengths[1]))
        return self._machine(
            Work(
                tried.pack.times(*reduce),
                tried.sums.times(*reduce),
                update if together else update.beyond(self._publishes_each),
            )
        )

    @property
    def _publishes_each(self) -> float:
        """Seconds around a bucket's publication alone."""
        profile, plan = self.profile, self.measured
        if not profile.update:  # so nothing has been published
            return self.wire.start_gather if plan.shards_optimizer else 0.0
        trained = sum(bucket.group is not None for bucket in plan.buckets)
        return profile.publishing / trained if trained else 0.0

    @property
    def _tried(self) -> Work:
        """By itself, outside of any step. An update that cannot be tried counts by its elements."""
        host, wire, plan = self.profile.host, self.wire, self.measured
        update = host.update or Line(0.0, _ANY if self.profile.update else 0.0)
        publishes = host.update is not None and plan.shards_optimizer
        return Work(
            host.pack.beyond(wire.start_reduce),
            host.sums,
            update.beyond(wire.start_gather if publishes else 0.0),
        )

    def _spent(self, work: Work) -> tuple[float, float]:
        """Seconds of a step with the measured plan around reductions, and around the update."""
        plan = self.measured.reordered(self.work.observed)
        step = _core.simulate(plan, self.work, self._machine(work))
        return (step.pack_ns + step.sum_ns) / 1e9, step.update_ns / 1e9

    def _machine(self, work: Work) -> _core.Machine:
        wire = self.wire
        return _core.Machine(
            _link(wire.reduce),
            _link(wire.gather),
            control=_core.Link(0.5e9 * wire.vote, 0.0, "measured"),
            lanes=wire.lanes,
            blocks=self.blocks,
            sums_pieces=self.sums_pieces,
            overlap=self.overlap and (1e9 * self.overlap.seconds, self.overlap.share),
            launch_ns=1e9 * work.pack.alpha,
            pack_byte_ns=1e9 * work.pack.beta,
            sum_ns=1e9 * work.sums.alpha,
            sum_byte_ns=1e9 * work.sums.beta,
            update_ns=1e9 * work.update.alpha,
            update_element_ns=1e9 * work.update.beta,
            wires=[form.shard_bytes(_LONG) / _LONG for form in FORMATS.values()],
        )


@dataclass(frozen=True)
class Work:
    """Of a host, in seconds for each bucket and for each byte or element."""

    pack: Line
    """And starting a reduction."""
    sums: Line
    update: Line
    """And publishing what has been updated."""

    @property
    def of_buckets(self) -> Work:
        """Without what grows with their length."""
        return self._times(1.0, 0.0)

    @property
    def of_lengths(self) -> Work:
        """Nothing but that."""
        return self._times(0.0, 1.0)

    def _times(self, alpha: float, beta: float) -> Work:
        lines = (self.pack, self.sums, self.update)
        return Work(*(line.times(alpha, beta) for line in lines))


def _factors(measured: float, buckets: float, lengths: float) -> tuple[float, float]:
    """How much longer in a step everything takes that was tried to take so many seconds for its
    buckets and for their lengths: as long, where no step had it.

    What has taken more than was tried is put down to buckets rather than to lengths: around each
    there is work of the engine that was not tried, in caches that others have used since, while a
    byte takes about as long as it does.
    """
    if not measured or not buckets + lengths:
        return 1.0, 1.0
    more = measured - buckets - lengths
    if more <= 0:
        return (measured / (buckets + lengths),) * 2
    share = more / (_DOUBTED * buckets + lengths)
    return 1 + _DOUBTED * share, 1 + share


@dataclass(frozen=True)
class Best:
    """The setting that is proposed, and its step; and what a wire that rounds more would bring."""

    setting: Setting
    seconds: float


def best(
    predictor: Predictor, plan_for: Callable[[str | None], _core.Plan], wires: Sequence[str] = ()
) -> Best:
    """The fastest setting over the configured wire and `wires`, of which one is only taken where it
    is faster by a tenth; `plan_for` makes a plan whose gradients are sent by a wire.
    """
    found = _best_of(predictor, plan_for(None), None)
    for wire in wires:
        other = _best_of(predictor, plan_for(wire), wire)
        if other.seconds < (1 - _WORTH) * found.seconds:
            found = other
    return found


def _best_of(predictor: Predictor, plan: _core.Plan, wire: str | None) -> Best:
    work = predictor.work
    total = sum(bucket.numel * 4 for bucket in plan.buckets)
    nbytes, elements, window, prediction = _core.choose_buckets(
        plan, work, predictor.machine, cap_bytes=max(total, 1), windows=_WINDOWS
    )
    assert nbytes is not None and elements is None
    if window is not None and window >= len(prediction.buckets):
        window = None
    return Best(Setting(nbytes, window, wire), prediction.total_ns / 1e9)


def _link(line: Line) -> _core.Link:
    return _core.Link(1e9 * line.alpha, 1e9 * line.beta, "measured")


def _ns(seconds: float) -> int:
    return max(0, round(1e9 * seconds))
