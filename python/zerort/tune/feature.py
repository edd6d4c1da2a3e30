"""Tuning within a run: a feature of the engine.

```text
warm-up ── observed steps ── at the next boundary, before the vote: all ranks measure the wire, hear
                             the slowest rank's profile, and come to one proposal
```

`engine.tune` logs it. A run that `zerort tune` has started writes it for that command, and ends
there. With `"zerort": {"tune": true}` the first window is observed, and the model is put into the
proposed buckets before the first update.

What it guarantees: without one of these nothing is observed; a boundary at which some rank has
failed is passed over. What it does not do: the format on the wire is never changed within a run,
because that changes results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from zerort import _core
from zerort.device import device_for
from zerort.step.events import Crossing, Feature
from zerort.step.readings import Components
from zerort.tune.findings import Findings
from zerort.tune.model import Best, Predictor, Setting, best
from zerort.tune.profile import Observer, slowest
from zerort.tune.relocate import refusal, relocate
from zerort.tune.wire import measure_wire
from zerort.wire import number_of

__all__ = ["WARM_UP", "FirstWindow", "Tuning", "unfit"]

_log = logging.getLogger("zerort")

WARM_UP = 6
"""Steps before those that are observed: memory is touched, launches are reordered, and ranks agree
whether updated parameters are waited for in the step or in the next forward.
"""
_GAIN = 0.03
"""What a setting has to save of a step to be proposed."""

Found = Callable[[Findings], None]


def unfit(parts: Components) -> str | None:
    """Why this engine cannot be tuned; None where it can."""
    if not device_for(parts.mesh.device).blocks:
        return "on an accelerator the host's times say nothing of the device's"
    if parts.reduction.plan.shards_parameter:
        return (
            "at stage 3 units of parameters are cut by their buckets' size when the engine starts"
        )
    return None


class Tuning(Feature):
    """Observes `steps` steps, then calls `found` on every rank with the same findings, once.

    `ends` says that the run is over with that: the step then raises `SystemExit` on all ranks.
    """

    name = "tune"

    def __init__(
        self,
        parts: Components,
        steps: int,
        found: Found,
        *,
        ends: bool = False,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._parts = parts
        self._steps = steps
        self._found = found
        self._ends = ends
        self._progress = progress
        self._warm = WARM_UP
        self._count = 0
        self._observer: Observer | None = None
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether it has reported what it has found, or has been closed."""
        return self._is_over

    def crossed(self, crossing: Crossing) -> None:
        """A step is over."""
        if self._is_over:
            if self._ends:
                raise SystemExit(0)
            return
        self._count += 1
        if self._observer is not None:
            self._observer.crossed()
        elif self._count >= self._warm:
            self._observer = Observer(self._parts)
        self._progress(self._count)

    def before_vote(self, *, failed: bool) -> None:
        """All ranks are here, and nothing is under way."""
        observer = self._observer
        if self._is_over or observer is None or len(observer.steps) < self._steps:
            return
        if any_failed(self._parts, failed):
            return
        predictor = measured(self._parts, observer)
        observer.close()
        self._is_over = True
        self._found(findings(self._parts, predictor, len(observer.steps)))

    def close(self) -> None:
        """Takes its hooks off."""
        if self._observer is not None:
            self._observer.close()
        self._is_over = True


class FirstWindow(Feature):
    """Puts the model into other buckets before its first update, where that is predicted to be
    faster and nothing speaks against it.
    """

    name = "tune"

    def __init__(self, parts: Components) -> None:
        self._parts = parts
        self._observer: Observer | None = Observer(parts)
        self._observer.await_forward()

    def restored(self) -> None:
        """A checkpoint has been loaded: its state stays where it is."""
        self._stay("a checkpoint has been loaded before the first step")

    def before_vote(self, *, failed: bool) -> None:
        """The first boundary at which no rank has failed."""
        observer = self._observer
        if observer is None:
            return
        if any_failed(self._parts, failed):
            observer.await_forward()
            return
        reasons = self._parts.mesh.control.gather_objects(refusal(self._parts))
        if any(reasons):
            self._stay(next(filter(None, reasons)))
            return
        observer.crossed()
        predictor = measured(self._parts, observer)
        self.close()
        proposed = proposal(self._parts, predictor, ())
        present = predictor.seconds(self._parts.reduction.plan)
        if proposed.setting == present_setting(self._parts):
            self._say("no other buckets are predicted to be faster than %.1f ms", 1000 * present)
            return
        try:
            relocate(self._parts, plan_of(self._parts, proposed.setting))
        except BaseException as error:
            self._parts.boundary.half_updated = (
                f"{type(error).__name__} while the model was put into other buckets: {error}; "
                'start again without "zerort": {"tune": true}'
            )
            raise
        self._say_moved(proposed, present)

    def close(self) -> None:
        """Takes its hooks off."""
        if self._observer is not None:
            self._observer.close()
            self._observer = None

    def _stay(self, reason: str) -> None:
        self.close()
        self._say("buckets stay as they are: %s", reason)

    def _say_moved(self, proposed: Best, present: float) -> None:
        setting = proposed.setting
        self._say(
            "from here on buckets have at most %d bytes, and the window is %s: a step is predicted "
            'to take %.1f ms instead of %.1f. Write "bucket_bytes" and "window" into the '
            "configuration to begin so",
            setting.bucket_bytes,
            "all" if setting.window is None else setting.window,
            1000 * proposed.seconds,
            1000 * present,
        )

    def _say(self, text: str, *values: object) -> None:
        if self._parts.mesh.rank == 0:
            _log.info(f"zerort.tune: {text}", *values)


def any_failed(parts: Components, failed: bool) -> bool:
    """Whether some rank has; all ranks ask together."""
    flag = torch.tensor([float(failed)])
    parts.mesh.control.all_reduce(flag)
    return bool(flag.item())


def measured(parts: Components, observer: Observer) -> Predictor:
    """What all ranks know alike: the wire, and the profile of the slowest of them."""
    wire = measure_wire(parts.mesh)
    mine = observer.profile(), parts.boundary.overlap.threshold
    profiles, thresholds = zip(*parts.mesh.control.gather_objects(mine), strict=True)
    comm, plan = parts.mesh.shard, parts.reduction.plan
    return Predictor(
        wire,
        slowest(profiles),
        plan,
        blocks=device_for(parts.mesh.device).blocks,
        sums_pieces=comm.pieces(adds=True) > 1,
        overlap=None if None in thresholds else thresholds[0],
    )


def findings(parts: Components, predictor: Predictor, steps: int) -> Findings:
    """The present setting beside the best one."""
    narrow = ("bf16",) if _sends_fp32(parts) else ()
    proposed, plan = proposal(parts, predictor, narrow), parts.reduction.plan
    return Findings(
        predictor.wire,
        steps,
        present_setting(parts),
        predictor.seconds(plan),
        predictor.profile.wall,
        proposed.setting,
        proposed.seconds,
    )


def proposal(parts: Components, predictor: Predictor, wires: tuple[str, ...]) -> Best:
    """The best setting; the present one where that saves too little."""

    def plan_for(wire: str | None) -> _core.Plan:
        return plan_of(parts, present_setting(parts), wire)

    found = best(predictor, plan_for, wires)
    present = predictor.seconds(parts.reduction.plan)
    if found.seconds > (1 - _GAIN) * present:
        return Best(present_setting(parts), present)
    return found


def present_setting(parts: Components) -> Setting:
    """As the engine is planned."""
    plan = parts.reduction.plan
    cap = plan.cap_bytes
    if cap is None:
        widest = max(parameter.itemsize for parameter in parts.boundary.flat.params)
        assert plan.cap_elements is not None
        cap = plan.cap_elements * widest
    launched = sum(kind == "launch" for kind, _ in plan.schedule)
    return Setting(cap, plan.window if plan.window < launched else None)


def plan_of(parts: Components, setting: Setting, wire: str | None = None) -> _core.Plan:
    """The model's plan by a setting, its gradients sent by `wire`."""
    assert parts.relocation is not None
    number = None if wire is None else number_of(wire)
    return parts.relocation.plan_of(setting.applied(parts.config), number)


def _sends_fp32(parts: Components) -> bool:
    """Whether all gradients are, by default: no other format was asked for."""
    config, fp32 = parts.config, number_of("fp32")
    buckets = parts.boundary.flat.trained
    asked = config.communication_data_type is not None or config.zerort.wire is not None
    return not asked and all(bucket.spec.wire == fp32 for bucket in buckets)
