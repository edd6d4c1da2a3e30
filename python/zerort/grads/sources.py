"""Where a gradient waits between autograd and its bucket's Launch.

Two sources, chosen once for a bucket. `FromGrad` packs straight from `.grad`: autograd adds
micro-batches up there by itself. `LocalSum` is for parameters whose gradients are added up in a
wider dtype: micro-batches that wait would lose bits in `.grad`, so each is added into a wider
buffer as soon as its backward is over.

Both leave `.grad` as None after what they took, and both name what never came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zerort.memory import FlatBucket, Memory
from zerort.mesh import Mesh
from zerort.run.flight import Leg, Transport
from zerort.run.lanes import full_precision
from zerort.wire import Dense, Encoder, Extent, Terms, format_of

__all__ = ["FromGrad", "LocalSum", "transport_of"]

PIECE = 128
"""Elements: what formats encode is a multiple of it."""


def transport_of(bucket: FlatBucket, terms: Terms, mesh: Mesh) -> Transport:
    """How the bucket leaves this rank: from the source that suits its memory, on the legs that the
    core has planned; encoders of the bucket's wire format have these `terms`.
    """
    source = LocalSum(bucket, bucket.local) if bucket.widens else FromGrad(bucket)
    legs: list[Leg] = []
    start, numel = 0, bucket.spec.numel
    for hop in bucket.spec.reduce_hops:
        if hop.op == "all_gather":
            continue
        comm = mesh[hop.group]
        if hop.op == "all_reduce":  # a shard need not be as many pieces as there are copies
            numel = -(-numel // (comm.world * PIECE)) * comm.world * PIECE
        extent = Extent(bucket, start, numel, comm.world)
        exact = hop.wire is None
        wire = Dense(full_precision(bucket)) if hop.wire is None else format_of(hop.wire)
        encoder = wire.encoder(extent, Terms() if exact else terms)
        legs.append(Leg(hop.group, extent, wire, encoder))
        numel = extent.shard_numel
        start += comm.rank * numel
    return Transport(source, legs)


class FromGrad:
    """Straight from `.grad`.

    After a micro-batch that is not reduced `.grad` rests in the send buffer, where it fits:
    autograd goes on adding there in place, and at the boundary there is nothing left to copy and no
    second copy to keep.
    """

    def __init__(self, bucket: FlatBucket) -> None:
        self._params = bucket.params
        self._slots: Callable[[], Sequence[Tensor]] | None = None

    def rest_in(self, slots: Callable[[], Sequence[Tensor]] | None) -> None:
        """Fits when it is of the gradients' dtype."""
        there = [] if slots is None else slots()
        fits = all(s.dtype == p.dtype for s, p in zip(there, self._params, strict=False))
        self._slots = slots if there and fits else None

    def follow(self) -> None:
        """It has none of it."""

    def collect(self) -> None:
        """Moves what is not there yet into the send buffer, in one batch."""
        if self._slots is None:
            return
        moving = [
            (parameter, slot)
            for parameter, slot in zip(self._params, self._slots(), strict=True)
            if parameter.grad is not None and parameter.grad is not slot
        ]
        if moving:
            gradients = _detached([parameter.grad for parameter, _ in moving])
            torch._foreach_copy_(
                [slot for _, slot in moving], [g for g in gradients if g is not None]
            )
        for parameter, slot in moving:
            parameter.grad = slot

    def waiting(self, position: int) -> Tensor | None:
        """What is in `.grad`."""
        gradient = self._params[position].grad
        return None if gradient is None else gradient.detach().clone()

    def replace(self, position: int, value: Tensor) -> None:
        """In `.grad`."""
        _write(self._params[position].grad, value)

    def pack(self, encoder: Encoder) -> list[int]:
        """What is in `.grad`."""
        return _pack(self._params, encoder)

    def unreduced(self) -> int:
        """What is in `.grad`."""
        return sum(parameter.grad is not None for parameter in self._params)

    def drop(self) -> None:
        """Sets every `.grad` to None."""
        _take(self._params)

    def reset(self) -> None:
        """Nothing is kept."""


class LocalSum:
    """Through a sum of micro-batches, where something has had to wait; what need not is packed
    straight from `.grad`.

    `local` is the sum's memory where waiting is the rule. Reduced gradients arrive there, so from a
    window's first pass on it is taken. What waits then, or where waiting is no rule (`no_sync`, a
    boundary that the user moves, a batch that has grown), is summed in memory that is allocated
    when it is first needed.
    """

    def __init__(self, bucket: FlatBucket, local: Memory | None) -> None:
        self._params = bucket.params
        self._bucket = bucket
        self._local = _Sum.over(local, bucket) if local else None
        self._spare: _Sum | None = None
        self._taken = local is None
        self._came = [False] * len(bucket.params)

    def rest_in(self, slots: Callable[[], Sequence[Tensor]] | None) -> None:
        """Declined: the wire is narrower than the sum."""

    def follow(self) -> None:
        """The sum's own memory is the bucket's."""
        self._spare = None
        if self._bucket.local is not None:
            self._local = _Sum.over(self._bucket.local, self._bucket)

    def _sum(self) -> _Sum:
        if self._local is not None and not self._taken:
            return self._local
        if self._spare is None:
            spec, device = self._bucket.spec, self._bucket.values.tensor.device
            self._spare = _Sum.over(Memory.zeros(spec.numel, torch.float32, device), self._bucket)
        return self._spare

    def collect(self) -> None:
        """Adds `.grad` into the sum, in one batch; what comes first is copied, over what an earlier
        window left.
        """
        arrived = [(i, g) for i, g in enumerate(_take(self._params)) if g is not None]
        if not arrived:
            return
        views = self._sum().views
        first = [(views[i], g) for i, g in arrived if not self._came[i]]
        more = [(views[i], g) for i, g in arrived if self._came[i]]
        if first:
            torch._foreach_copy_([view for view, _ in first], [gradient for _, gradient in first])
        if more:
            torch._foreach_add_([view for view, _ in more], [gradient for _, gradient in more])
        for i, _ in arrived:
            self._came[i] = True

    def waiting(self, position: int) -> Tensor | None:
        """The sum, with what is in `.grad` beside it."""
        parts = [self._sum().views[position]] if self._came[position] else []
        gradient = self._params[position].grad
        if gradient is not None:
            parts.append(gradient.detach())
        if len(parts) < 2:
            return parts[0].clone() if parts else None
        return parts[0] + parts[1]

    def replace(self, position: int, value: Tensor) -> None:
        """In the sum, where there is one."""
        parameter = self._params[position]
        if not self._came[position]:
            _write(parameter.grad, value)
            return
        _write(self._sum().views[position], value)
        parameter.grad = None

    def pack(self, encoder: Encoder) -> list[int]:
        """Adds what is in `.grad` to what has waited, and encodes the sum."""
        if not any(self._came):
            self._taken = True
            return _pack(self._params, encoder)
        self.collect()
        total = self._sum()
        absent = [i for i, came in enumerate(self._came) if not came]
        if absent:
            torch._foreach_zero_([total.views[i] for i in absent])
        encoder.encode_flat(total.flat)
        self._came = [False] * len(self._params)
        self._taken = True
        return absent

    def unreduced(self) -> int:
        """What is in `.grad` or has waited."""
        pairs = zip(self._params, self._came, strict=True)
        return sum(came or parameter.grad is not None for parameter, came in pairs)

    def drop(self) -> None:
        """Forgets the sum; its memory is overwritten by what comes next."""
        _take(self._params)
        self._came = [False] * len(self._params)

    def reset(self) -> None:
        """The local memory is free again."""
        self._taken = self._local is None


@dataclass(frozen=True)
class _Sum:
    """Memory for a bucket's gradient, and a view of it per parameter."""

    flat: Tensor
    views: list[Tensor]

    @classmethod
    def over(cls, memory: Memory, bucket: FlatBucket) -> _Sum:
        return cls(memory.tensor, bucket.slots(memory.tensor))


def _write(gradient: Tensor | None, value: Tensor) -> None:
    assert gradient is not None, "nothing waits"
    with torch.no_grad():
        gradient.copy_(value)


def _pack(params: list[torch.nn.Parameter], encoder: Encoder) -> list[int]:
    gradients = _take(params)
    encoder.encode(gradients)
    return [i for i, gradient in enumerate(gradients) if gradient is None]


def _take(params: list[torch.nn.Parameter]) -> list[Tensor | None]:
    gradients = [parameter.grad for parameter in params]
    for parameter in params:
        parameter.grad = None
    return _detached(gradients)


def _detached(gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Without the graph that `create_graph=True` keeps, or every step's would live on in the memory
    that they are copied into.
    """
    if not torch.is_grad_enabled():
        return gradients  # what is made of them now joins no graph
    return [g.detach() if g is not None and g.requires_grad else g for g in gradients]
