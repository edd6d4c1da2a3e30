"""States that leave the device for a while, between two steps: DeepSpeed's `offload_states` and
`reload_states`, for a loop in which another model needs the device in between.

What it guarantees: everything is back to the bit, under the same objects: parameters, the
optimizer's tensors and its state. Whatever raises on the way, `reload_states` brings back what had
left. What it does not do: nothing of it is followed in a step. Until `reload_states` every call
that needs what is away raises `StepError`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zerort.config.offload import OffloadDeviceEnum as Device
from zerort.config.offload import OffloadStateTypeEnum as Kind
from zerort.device import device_for
from zerort.errors import ConfigError
from zerort.memory import FlatBucket, HeldBucket, Kept, Stepped, unintercepted
from zerort.memory.moved import Carrier, FromHost, ToHost, shift
from zerort.step.readings import Components
from zerort.step.transaction import Transaction

__all__ = ["MovableStates", "States"]

_log = logging.getLogger("zerort")

Mover = Callable[[Carrier], None]
"""Moves something from where it is; a second time is no harm."""


class States:
    """Of one engine."""

    def __init__(self, transaction: Transaction, parts: Components) -> None:
        self._transaction = transaction
        self._flat, self._update = parts.boundary.flat, parts.boundary.optimizer
        self._reduction, self._place = parts.reduction, parts.mesh.device
        self._gone: set[Kind] = set()
        self._back: list[Mover] = []
        """What brings back what has left, in the order in which it left."""
        self._unloaded = False

    @unintercepted
    def offload(self, kinds: Collection[Kind], *, pinned: bool, waits: bool) -> None:
        """Takes `kinds` to the host, in page-locked memory if they are to be `pinned`; with `waits`
        they are there when it returns. Raises `StepError` where this is not between two steps.
        """
        self._transaction.check_departure()
        host = device_for(self._place).host(pinned=pinned)
        leaving = [kind for kind in Kind if kind in kinds and kind not in self._gone]
        if host is None or not leaving:
            return
        self._transaction.depart(values=Kind.lp_params in leaving)
        carry = ToHost(host)
        for kind in leaving:
            self._gone.add(kind)
            for mover in self._movers(kind):
                # before it has left: whatever raises in it, it can be brought back
                self._back.append(mover)
                mover(carry)
        if Kind.contiguous_grad_buffer in leaving:
            self._unloaded = True  # before it has: it can be loaded whatever raises in it
            self._reduction.unload()
        if waits:
            carry.wait()

    @unintercepted
    def reload(self, *, waits: bool) -> None:
        """Brings everything back. Broken off, it goes on where it was at the next call."""
        host = device_for(self._place).host(pinned=False)
        if host is None or not self._gone:
            return
        carry = FromHost(host, self._place)
        while self._back:
            self._back[-1](carry)
            self._back.pop()
        if self._unloaded and not self._transaction.closed:
            self._reduction.reload()
        self._unloaded = False
        if waits:
            carry.wait()
        self._gone.clear()
        self._transaction.arrive()

    def _movers(self, kind: Kind) -> Iterator[Mover]:
        match kind:
            case Kind.lp_params:
                yield from (partial(self._values, bucket) for bucket in self._flat.buckets)
            case Kind.hp_params:
                yield from (partial(self._masters, bucket) for bucket in self._flat.stepped)
                yield from (bucket.move_masters for bucket in self._flat.trained if bucket.away)
            case Kind.optim_states:
                yield partial(shift, list(self._of_optimizer()))
            case Kind.lp_grads:
                yield from (partial(self._sums, bucket) for bucket in self._flat.trained)
            case Kind.contiguous_grad_buffer:
                """Nothing in it is kept."""

    def _values(self, bucket: HeldBucket, carry: Carrier) -> None:
        bucket.move_values(carry)
        self._follow(bucket)

    def _masters(self, bucket: Stepped, carry: Carrier) -> None:
        bucket.move_masters(carry)
        self._follow(bucket)

    def _follow(self, bucket: Kept) -> None:
        for segment in self._update.segments:
            if segment.bucket is bucket:
                segment.follow()

    def _sums(self, bucket: FlatBucket, carry: Carrier) -> None:
        bucket.move_sums(carry)
        self._reduction.follow_memory()

    def _of_optimizer(self) -> Iterator[Tensor]:
        """Its state's tensors on the device, each once."""
        optimizer: Any = self._update.optimizer
        segments = {id(segment.tensor): segment for segment in self._update.segments}
        seen = set(segments)
        for owner, state in optimizer.state.items():
            segment = segments.get(id(owner))
            if segment is not None and segment.bucket.is_on_host:
                continue
            for leaf in filter(self._is_here, tree_leaves(state)):
                if id(leaf) not in seen:
                    seen.add(id(leaf))
                    yield leaf

    def _is_here(self, leaf: object) -> bool:
        return (
            isinstance(leaf, Tensor)
            and leaf.device.type == self._place.type
            and leaf.layout is torch.strided
        )


class MovableStates:
    """Mixed into the engine."""

    _states: States

    def offload_states(
        self,
        include: Iterable[Kind | str] | None = None,
        device: Device | str = Device.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Takes this rank's states to the host's memory until `reload_states`: all, or those that
        `include` names. All ranks call it, right after a step at a boundary.

        Parameters, masters and the optimizer's state can be read and written there meanwhile, as
        the tensors that they are; with `non_blocking` only behind a synchronization of the device.
        A further call adds to what is away. Forwards that train, backwards, steps, checkpoints,
        `zerort.utils` and `GatheredParameters` raise `StepError`; an evaluation does where
        parameters are away. On a CPU engine nothing moves. `device="none"` does nothing, with a
        warning. Raises `StepError` elsewhere than between two steps, and `ConfigError` for a
        device or a state that there is not.
        """
        place = _one(Device, device, "device")
        kinds = set(Kind) if include is None else {_one(Kind, k, "include") for k in include}
        if place is Device.nvme:
            raise ConfigError("offload_states(device='nvme'): only the host's memory is built")
        if place is Device.none:
            _log.warning("offload_states(device='none') moves nothing")
            return
        self._states.offload(kinds, pinned=pin_memory, waits=not non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Brings back what `offload_states` has taken away; nothing where all is here. With
        `non_blocking` the host goes on while copies run, behind which the device's work comes.
        """
        self._states.reload(waits=not non_blocking)


def _one(kinds: type[Any], given: object, name: str) -> Any:
    value = getattr(given, "value", given)
    known = [kind.value for kind in kinds]
    if value not in known:
        raise ConfigError(
            f"offload_states({name}=...): {given!r} is unknown; there are {', '.join(known)}"
        )
    return kinds(value)
