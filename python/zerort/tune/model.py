"""Predicts a step from what was measured, and finds the setting with which it is shortest.

What it guarantees: a function of its arguments, so ranks that have the same figures come to the
same setting. What it does not do: it measures nothing; the simulation itself is the core's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    @property
    def machine(self) -> _core.Machine:
        """What it runs on. Packing is in the backward, which was timed with it."""
        wire, profile, plan = self.wire, self.profile, self.measured
        width = [form.shard_bytes(_LONG) / _LONG for form in FORMATS.values()]
        trained = [bucket for bucket in plan.buckets if bucket.group is not None]
        arrived = sum(bucket.numel * width[bucket.wire] for bucket in trained)
        parts = plan.shards if plan.shards_optimizer else 1
        owned = sum(bucket.numel for bucket in trained) / parts
        return _core.Machine(
            _link(wire.reduce),
            _link(wire.gather),
            control=_core.Link(0.5e9 * wire.vote, 0.0, "measured"),
            lanes=wire.lanes,
            blocks=self.blocks,
            sums_pieces=self.sums_pieces,
            overlap=self.overlap and (1e9 * self.overlap.seconds, self.overlap.share),
            sum_byte_ns=1e9 * profile.sums / arrived if arrived else 0.0,
            update_element_ns=1e9 * profile.update / owned if owned else 0.0,
            wires=width,
        )


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
    return Best(Setting(nbytes, window, wire), prediction.total_ns / 1e9)


def _link(line: Line) -> _core.Link:
    return _core.Link(1e9 * line.alpha, 1e9 * line.beta, "measured")


def _ns(seconds: float) -> int:
    return max(0, round(1e9 * seconds))
