"""Traces of runs that never were: ranks whose forward, backward, buckets and wire are given, so
that a test knows what a report of them must say.

Times are milliseconds. All ranks are worked out together: a bucket is on the wire when the last
rank has launched it and the bucket before it has left, and a vote ends when the last rank has come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zerort import _core

Times = Callable[[int, int], float]
"""Milliseconds by rank and step."""


def _at(times: Times | float, rank: int, step: int) -> float:
    return times(rank, step) if callable(times) else times


@dataclass(frozen=True)
class Load:
    """A bucket: when in the backward it has all but its last gradient, and all, as shares of it."""

    size: int = 1_000_000
    prior: float = 0.5
    full: float = 0.6
    first: float | None = None
    """The first gradient, where that is not the last but one."""
    last: str = "weight"
    params: int = 4
    dtype: str = "f32"


@dataclass(frozen=True)
class Scene:
    """A run."""

    ranks: int = 2
    steps: int = 12
    forward: Times | float = 20.0
    backward: Times | float = 60.0
    optimizer: Times | float = 3.0
    outside: Times | float = 1.0
    loads: Sequence[Load] = (Load(prior=0.2, full=0.3), Load(prior=0.5, full=0.6))
    alpha: float = 0.1
    rate: float = 1e6
    """Bytes a millisecond."""
    publish: float = 1.0
    arrives: float = 0.0
    """What each forward stands still for a bucket that the step before has updated and sent."""
    micro_batches: int = 1
    every: bool = False
    """Whether each micro-batch is reduced."""
    gathers: float = 0.0
    """What each forward stands still for a unit's parameters."""
    roll_call: float = 0.0
    on_device: bool = False
    """No spans of collectives, and one wait for all sums."""
    held: Times | float = 0.0
    """For how long a step's forward stands still for a collective."""
    stall: float = 0.0
    """For how long each bucket is waited for at the end, however long ago it was complete."""
    window: int = 64
    """How many buckets may be launched and not retired; retired ones are so at once."""
    stage: int = 2
    name: str = "scene"
    clock: Times | float = 0.0
    """By how much a rank's clock is ahead."""
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> list[Path]:
        """Writes the files of all ranks."""
        folder.mkdir(parents=True, exist_ok=True)
        writers = [_Writer(self, rank) for rank in range(self.ranks)]
        for step in range(1, self.steps + 1):
            self._step(writers, step)
        paths = [folder / f"trace-{rank}.json" for rank in range(self.ranks)]
        for writer, path in zip(writers, paths, strict=True):
            writer.ring.write(str(path))
        return paths

    def _step(self, writers: Sequence[_Writer], step: int) -> None:
        for writer in writers:
            writer.begin(step)
            writer.at += _at(self.outside, writer.rank, step)
        for micro in range(self.micro_batches):
            reduces = self.every or micro == self.micro_batches - 1
            self._pass(writers, step, reduces, last=micro == self.micro_batches - 1)
        came = max(writer.at for writer in writers) + 0.1
        for writer in writers:
            writer.outer(
                "step", writer.at, came + _at(self.optimizer, writer.rank, step) + self.publish
            )
            with_vote = writer.at
            writer.outer("vote", with_vote, came)
            writer.wait(with_vote, came, "vote")
            writer.at = came
            writer.span("optimizer", _at(self.optimizer, writer.rank, step))
        ended = max(writer.at for writer in writers) + self.publish
        for writer in writers:
            writer.outer("publish", writer.at, ended)
            writer.publish(writer.at, ended)
            writer.at = ended
            writer.ring.instant(writer.main, "step", writer.ns(ended), {"step": step})

    def _pass(self, writers: Sequence[_Writer], step: int, reduces: bool, *, last: bool) -> None:
        for writer in writers:
            if self.roll_call:
                writer.wait(writer.at, writer.at + self.roll_call, "roll call")
                writer.at += self.roll_call
            held = _at(self.held, writer.rank, step)
            if held:
                writer.wait(writer.at, writer.at + held, "reduce_scatter of bucket 0 (a .. b)")
                writer.at += held
            writer.forward(_at(self.forward, writer.rank, step) / self.micro_batches, self.gathers)
        begun = {writer.rank: writer.at for writer in writers}
        took = {
            writer.rank: _at(self.backward, writer.rank, step) / self.micro_batches
            for writer in writers
        }
        for writer in writers:
            writer.span("backward", took[writer.rank])
        if not reduces:
            return
        free, launched = 0.0, dict.fromkeys(begun, 0.0)
        ends: list[float] = []
        for index, load in enumerate(self.loads):
            full = {rank: begun[rank] + load.full * took[rank] for rank in begun}
            room = ends[index - self.window] if index >= self.window else 0.0
            launched = {rank: max(full[rank], launched[rank] + 0.001, room) for rank in begun}
            free = max(free, *launched.values()) + self.alpha + load.size / self.rate
            ends.append(free)
            for writer in writers:
                rank = writer.rank
                retired = free if self.window < len(self.loads) else max(free, writer.at)
                prior = begun[rank] + load.prior * took[rank]
                landed = free if self.on_device else retired
                first = prior if load.first is None else begun[rank] + load.first * took[rank]
                moments = (first, full[rank], launched[rank], landed, retired)
                writer.life(index, load, moments, full[rank] - prior, free)
        for writer in writers:
            if self.on_device and ends and ends[-1] > writer.at:
                writer.wait(writer.at, ends[-1], "reduced gradients")
                writer.at = ends[-1]
            for index, end in enumerate(ends):
                if max(end, writer.at + self.stall) > writer.at:
                    until = max(end, writer.at + self.stall)
                    writer.wait(writer.at, until, f"reduce_scatter of bucket {index} (a .. b)")
                    writer.at = until


class _Writer:
    """One rank's file."""

    def __init__(self, scene: Scene, rank: int) -> None:
        self.scene, self.rank, self.at, self.number = scene, rank, 1000.0, 0
        self.ring = _core.Trace(rank, 1_000_000)
        self.main, self.buckets = self.ring.track("main"), self.ring.track("buckets")
        self.wire = [self.ring.track(f"collectives {lane}") for lane in range(8)]
        self._lives = 0
        facts: dict[str, Any] = {
            "name": scene.name,
            "world": scene.ranks,
            "device": "cpu",
            "stage": scene.stage,
            "micro_batches": scene.micro_batches,
            "window": scene.window,
            **{f"bucket {i}": f"layers.{i}.a .. layers.{i}.b" for i in range(len(scene.loads))},
            **scene.facts,
        }
        for name, value in facts.items():
            self.ring.state(name, value)

    def begin(self, step: int) -> None:
        self.number = step

    def ns(self, at: float) -> int:
        return round((at + _at(self.scene.clock, self.rank, self.number)) * 1e6)

    def outer(self, name: str, start: float, end: float) -> None:
        self.ring.span(self.main, name, self.ns(start), self.ns(end))

    def span(self, name: str, took: float) -> None:
        self.outer(name, self.at, self.at + took)
        self.at += took

    def wait(self, start: float, end: float, what: str) -> None:
        self.ring.span(self.main, "wait", self.ns(start), self.ns(end), {"what": what})

    def forward(self, took: float, gathers: float) -> None:
        start = self.at
        if gathers:
            self.wait(start, start + gathers, "all_gather of unit 0 (a .. b)")
            unit = self.ring.track("unit 0")
            until = self.ns(start + gathers + took)
            self.ring.span(unit, "whole", self.ns(start), until, {"bytes": 4096, "buckets": "b0"})
        arrives = self.scene.arrives
        if arrives:
            self.publish(start, start + arrives, sent=start - 4.0)
        self.at += gathers + arrives + took
        self.outer("forward", start, self.at)

    def life(
        self, index: int, load: Load, moments: Sequence[float], alone: float, end: float
    ) -> None:
        times = [self.ns(moment) for moment in moments]
        key, self._lives = self._lives, self._lives + 1
        carried: dict[str, Any] = {
            "bucket": index,
            "bytes": load.size,
            "dtype": load.dtype,
            "params": load.params,
            "last": f"layers.{index}.{load.last}",
            "alone_ms": alone,
        }
        self.ring.async_span(self.buckets, f"bucket {index}", key, times[0], times[-1], carried)
        phases = ("filling", "queued", "in flight", "summing")
        for phase, since, until in zip(phases, times, times[1:], strict=False):
            if until > since:
                self.ring.async_span(self.buckets, phase, key, since, until)
        if self.scene.on_device:
            return
        took = self.scene.alpha + load.size / self.scene.rate
        name, about = f"reduce_scatter b{index}", {"bytes": load.size}
        self.ring.span(self.wire[index % 8], name, self.ns(end - took), self.ns(end), about)

    def publish(self, start: float, end: float, sent: float | None = None) -> None:
        self.wait(start, end, "all_gather of bucket 0 (a .. b)")
        if self.scene.on_device:
            return
        size = {"bytes": sum(load.size for load in self.scene.loads)}
        began = self.ns(start if sent is None else sent)
        self.ring.span(self.wire[0], "all_gather b0", began, self.ns(end), size)


def many(buckets: int, size: int = 1_000_000, dtype: str = "f32") -> Sequence[Load]:
    """So many buckets that become full at even distances."""
    times = [((i + 0.5) / buckets, (i + 1) / buckets) for i in range(buckets)]
    return [Load(size, prior, full, dtype=dtype) for prior, full in times]
