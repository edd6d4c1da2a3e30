"""A subject on so many ranks: planned anew, and its step predicted.

Beside the bucket size that the cost model would choose stand the fixed ones that people use, DDP's
and DeepSpeed's. Those are simulated in this runtime too, with their bucket sizes and nothing else
of them: what differs is what the size costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zerort import _core
from zerort.config import Config, load_part
from zerort.errors import ConfigError
from zerort.forecast.commands import SECTIONS
from zerort.simulate.quantities import Wire
from zerort.simulate.subject import FORMATS, Subject
from zerort.start.caps import Cap
from zerort.step.overlap import Wish, threshold
from zerort.wire import FORMATS as WIRES
from zerort.wire import format_of, number_of
from zerort.zero.estimates import Counted, rank_bytes

__all__ = ["FIXED", "Cluster", "Fixed", "Point", "at"]

DDP_BYTES = 25 << 20
DEEPSPEED_ELEMENTS = 500_000_000
_DEVICE_WINDOW = 4
_WINDOWS = (1, 2, 3, 4, 6, 8)
_LONG = 1 << 20
_WIRE_BYTES = [form.shard_bytes(_LONG) / _LONG for form in WIRES.values()]
"""Of an element, by the number of the wire format."""


@dataclass(frozen=True)
class Fixed:
    """A bucket size that somebody has written down."""

    name: str
    cap_bytes: int | None = None
    cap_elements: int | None = None


# DDP's and DeepSpeed's.
FIXED = (
    Fixed("25 MiB", cap_bytes=DDP_BYTES),
    Fixed("5e8 elements", cap_elements=DEEPSPEED_ELEMENTS),
)


@dataclass(frozen=True)
class Cluster:
    """What the ranks are, and how they are connected."""

    wire: Wire
    """Between hosts; between all ranks where there is one host or each has its own."""
    inner: Wire | None = None
    """Within a host."""
    hosts: int | None = None
    wire_format: str | None = None
    """Of gradients; None as they lie in memory."""
    publish: Wish = "auto"
    """Who waits for updated parameters."""

    def machine(self, subject: Subject, ranks: int, room: int) -> _core.Machine:
        """Of so many ranks, each with `room` elements that may be whole at stage 3. Raises
        `ConfigError` where they cannot be spread over the hosts.
        """
        scatter, gather = ("flat", "broadcasts") if subject.blocks else ("best", "best")
        inner = self.inner or self.wire
        overlap = threshold(self.publish, timed=subject.blocks)
        return _core.Machine(
            self.wire.link(scatter),
            self.wire.link(gather),
            lanes=2 if subject.blocks else 1,
            inner=inner.link(scatter),
            inner_gather=inner.link(gather),
            inner_lanes=2 if subject.blocks else 1,
            hosts=self._hosts(ranks),
            control=self.wire.link("best"),
            sum_byte_ns=subject.sum_byte_ns,
            update_element_ns=subject.update_element_ns,
            blocks=subject.blocks,
            sums_pieces=subject.blocks,
            overlap=overlap and (1e9 * overlap.seconds, overlap.share),
            wires=_WIRE_BYTES,
            room=room,
        )

    def _hosts(self, ranks: int) -> int:
        if self.hosts is None or ranks <= 1:
            return 0
        hosts = min(self.hosts, ranks)
        if ranks % hosts:
            raise ConfigError(
                f"--hosts {self.hosts}: {ranks} ranks cannot be spread evenly over {hosts} hosts"
            )
        return hosts


@dataclass(frozen=True)
class Point:
    """A step on so many ranks, in ms and bytes; the chosen bucket size first."""

    ranks: int
    step_ms: float
    exposed_ms: float
    """Standing still for gradients, and at stage 3 for parameters."""
    vote_ms: float
    publish_ms: float
    """Standing still for updated parameters, in the step or, where `overlapped`, in the next
    forward.
    """
    overlapped: bool
    memory_nbytes: int
    """States of a rank, and what is in flight; no activations."""
    sent_nbytes: int
    bucket_nbytes: int
    """The longest bucket."""
    buckets: int
    window: int | None
    fixed: Mapping[str, float]
    """ms of a step with each of the sizes that people write down."""

    @property
    def lost_ms(self) -> Mapping[str, float]:
        """By how much each of those is slower."""
        return {name: step - self.step_ms for name, step in self.fixed.items()}


def at(subject: Subject, cluster: Cluster, ranks: int, stage: int) -> Point:
    """Predicts a step. Raises `ConfigError`, `PlanError`."""
    settings, work = _settings(subject, stage), subject.workload()
    zero = settings.zero_optimization
    units, largest = None, 1
    default = Cap.of(settings, subject.specs(None), ranks)
    if zero.shards_parameters:
        units = subject.units(default.numel(subject.item))
        largest = subject.largest(units)
    room = max(largest, settings.room(subject.numel, largest))
    machine = cluster.machine(subject, ranks, room)
    planning = _Planning(subject, cluster, ranks, stage, units)
    fixed = {}
    for size in FIXED:
        plan = planning.plan(size.cap_bytes, size.cap_elements, planning.window)
        plan = plan.reordered(work.observed)
        fixed[size.name] = _core.simulate(plan, work, machine).total_ns / 1e6
    base = planning.plan(default.nbytes, default.elements, planning.window)
    gathers_sums = not zero.shards_optimizer
    windows = [planning.window, *(w for w in _WINDOWS if gathers_sums or not subject.blocks)]
    cap_bytes, cap_elements, window, step = _core.choose_buckets(
        base, work, machine, cap_bytes=DDP_BYTES, windows=windows
    )
    chosen = planning.plan(cap_bytes, cap_elements, window)
    counted = Counted(subject.numel, largest)
    return Point(
        ranks,
        step.total_ns / 1e6,
        (step.exposed_ns + step.gather_ns) / 1e6,
        step.vote_ns / 1e6,
        step.publish_ns / 1e6,
        step.overlapped,
        rank_bytes(settings, counted, ranks)[0] + step.peak_in_flight + _fed_back(settings, chosen),
        step.sent_bytes,
        max((bucket.nbytes for bucket in step.buckets), default=0),
        len(chosen.buckets),
        window,
        fixed,
    )


def _fed_back(settings: Config, plan: _core.Plan) -> int:
    """Bytes that formats keep of what they have rounded off."""
    if not settings.wire_feedback:
        return 0
    return sum(
        format_of(spec.wire).kept_bytes(
            spec.shard_numel, plan.world, gathers=not plan.shards_optimizer
        )
        for spec in plan.buckets
    )


@dataclass(frozen=True)
class _Planning:
    subject: Subject
    cluster: Cluster
    ranks: int
    stage: int
    units: list[int] | None

    @property
    def window(self) -> int | None:
        """What the runtime takes by itself."""
        return None if self.subject.blocks and self.units is None else _DEVICE_WINDOW

    def plan(
        self, cap_bytes: int | None, cap_elements: int | None, window: int | None
    ) -> _core.Plan:
        name = self.cluster.wire_format
        wire = None if name is None else number_of(name)
        return _core.Plan(
            self.subject.specs(wire),
            world=self.ranks,
            stage=self.stage,
            cap_bytes=cap_bytes,
            cap_elements=cap_elements,
            window=window,
            units=self.units,
        )


def _settings(subject: Subject, stage: int) -> Config:
    """With Adam; low precision where most of the subject is."""
    counts = {
        dtype: sum(n for n, d in zip(subject.numels, subject.dtypes, strict=True) if d == dtype)
        for dtype in FORMATS
    }
    most = max(counts, key=lambda dtype: counts[dtype])
    data: dict[str, object] = {"zero_optimization": {"stage": stage}}
    if most in ("bf16", "f16"):
        data["bf16" if most == "bf16" else "fp16"] = {"enabled": True}
    return load_part(data, SECTIONS)
