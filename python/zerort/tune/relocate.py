"""Gives a model other buckets between two passes, before its first update.

```text
old buckets   values ──────────────────── each parameter copies its own ──> new buckets
              sums, masters of their own ── gathered, cut by the core ────>
              optimizer state               there is none yet
```

What it guarantees: parameters keep their identity, values, hooks and `.grad`; sums and masters keep
their bits, so that a run goes on as if it had begun with these buckets. What it does not do: no
state of an optimizer moves, nothing is sharded (stage 3), and what a wire format keeps from step to
step is not taken along: `refusal` says so first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zerort import _core
from zerort.device import device_for
from zerort.grads.sources import transport_of
from zerort.memory import FlatBucket, unintercepted
from zerort.mesh import Comm
from zerort.optim import ShardOptimizer, has_stepped
from zerort.start import agreed
from zerort.step.readings import Components
from zerort.wire import Terms, format_of
from zerort.wire.dense import Dense

__all__ = ["refusal", "relocate"]


def refusal(parts: Components) -> str | None:
    """Why this engine's buckets have to stay as they are; None where they need not."""
    optimizer = parts.boundary.optimizer
    if parts.reduction.plan.shards_parameter:
        return (
            "at stage 3 units of parameters are cut by their buckets' size when the engine starts"
        )
    if parts.relocation is None or not isinstance(optimizer, ShardOptimizer):
        return "there is no optimizer"
    if has_stepped(optimizer.optimizer):
        return "the optimizer has state already"
    return _chosen_by_bucket(parts)


def _chosen_by_bucket(parts: Components) -> str | None:
    buckets = parts.boundary.flat.trained
    if any(bucket.spec.way == "exchanged" for bucket in buckets):
        return "ranks exchange parts of matrices, which was planned when the engine started"
    if parts.config.quantize_training.enabled:
        return "quantize_training has chosen its buckets when the engine started"
    if not all(isinstance(format_of(bucket.spec.wire), Dense) for bucket in buckets):
        return "a wire format may keep what it has rounded off, by bucket"
    return None


@unintercepted
def relocate(parts: Components, plan: _core.Plan) -> None:
    """Puts the model into the buckets of `plan`. Nothing is under way; all ranks call it, none of
    which has a `refusal`. What it raises leaves the engine unusable.
    """
    assert parts.relocation is not None
    layout, members = parts.relocation.layout_of(plan), parts.relocation.members
    flat, reduction, control = parts.boundary.flat, parts.reduction, parts.mesh.control
    flat.take_writes()
    moves = _moves(reduction.plan, flat.trained)
    reduction.unload()

    def lay_out() -> None:
        flat.lay_out(members, layout)
        for bucket in flat.buckets:
            bucket.keep()

    agreed(control, lay_out)
    for move in moves:
        move.run(parts.mesh.shard, plan, flat.trained)
    agreed(control, lambda: _follow(parts, plan))


def _follow(parts: Components, plan: _core.Plan) -> None:
    flat, optimizer = parts.boundary.flat, parts.boundary.optimizer
    assert isinstance(optimizer, ShardOptimizer)
    for bucket in flat.trained:
        shard = bucket.reduced_shard
        bucket.squares = device_for(shard.tensor.device).squared_norm(shard)
    optimizer.relocate(flat)
    terms = Terms(parts.precision.predivide, rank=parts.mesh.rank)
    transports = {b.spec.id: transport_of(b, terms, parts.mesh) for b in flat.trained}
    parts.reduction.replan(plan, transports)


@dataclass(frozen=True)
class _Move:
    """From the buckets of a plan that goes, by their number, into those of another: what `of` says
    of a bucket (owned numel,).
    """

    plan: _core.Plan
    old: Mapping[int, Tensor]
    of: Callable[[FlatBucket], Tensor]

    def run(self, comm: Comm, plan: _core.Plan, buckets: Sequence[FlatBucket]) -> None:
        """Gathers one bucket at a time, and every rank takes what it owns."""
        rows: dict[int, list[tuple[int, int, int, int, Tensor]]] = {}
        for bucket in buckets:
            into = self.of(bucket)
            for start, rank, source, at, length in self._rows(comm, plan, bucket):
                rows.setdefault(source, []).append((start, rank, at, length, into))
        for number, values in self.old.items():
            whole, shard = self._whole(comm, values), self._shard(number)
            for start, rank, at, length, into in rows.get(number, ()):
                piece = whole.narrow(0, rank * shard + at, length)
                into.narrow(0, start, length).copy_(piece)

    def _rows(
        self, comm: Comm, plan: _core.Plan, bucket: FlatBucket
    ) -> Iterator[tuple[int, int, int, int, int]]:
        """What fills this rank's owned part: of every shard where that is the whole."""
        spec = bucket.spec
        ranks = [comm.rank] if plan.shards_optimizer else range(comm.world)
        for rank in ranks:
            first = 0 if plan.shards_optimizer else rank * spec.shard_numel
            for start, origin, source, at, length in _core.reshard(
                self.plan, plan, bucket=spec.id, rank=rank, came_from=spec.params
            ):
                yield first + start, origin, source, at, length

    def _shard(self, number: int) -> int:
        return self.plan.buckets[number].shard_numel

    def _whole(self, comm: Comm, values: Tensor) -> Tensor:
        """All ranks' parts, where values are this rank's alone."""
        if not self.plan.shards_optimizer:
            return values
        numel = values.numel()
        whole = torch.zeros(comm.world * numel, dtype=values.dtype, device=comm.device)
        whole.narrow(0, comm.rank * numel, numel).copy_(values)
        comm.all_gather(whole).start().wait()
        return whole


def _moves(plan: _core.Plan, buckets: Sequence[FlatBucket]) -> list[_Move]:
    for bucket in buckets:
        bucket.ready()
    sums = {bucket.spec.id: bucket.accum.tensor for bucket in buckets}
    masters = {bucket.spec.id: bucket.master for bucket in buckets if bucket.has_master}
    return [
        _Move(plan, sums, lambda bucket: bucket.accum.tensor),
        _Move(plan, masters, lambda bucket: bucket.master),
    ]
