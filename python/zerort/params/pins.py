"""Parameters that are kept whole on request, between passes: to look at, to write, or to decode.

What this guarantees: all ranks enter and leave together, and what is written reaches every rank's
part, or is refused by the parameter's name; a body that raises on one rank leaves no peer waiting.
What it does not do: it knows no pass. Within one, a pin is a use like any other.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from zerort.errors import StepError
from zerort.memory import HeldBucket, undisturbed, unintercepted, version_of
from zerort.mesh import Comm
from zerort.params import sharded
from zerort.params.passes import Passes
from zerort.run.actions import Verb
from zerort.run.executor import Executor

__all__ = ["Pins"]


class Pins:
    """Of one engine. `units` maps id(parameter) to its unit."""

    def __init__(
        self, passes: Passes, executor: Executor, comm: Comm, units: Mapping[int, int]
    ) -> None:
        self._passes = passes
        self._executor = executor
        self._comm = comm
        self._units = units
        self.exposed: dict[int, int] = {}
        """How often each parameter that is kept whole is, by its id."""
        self._is_over = False

    def end(self) -> None:
        """The engine is gone: what is kept whole stays so, and who leaves a context finds nothing
        to do.
        """
        self._is_over = True

    def keep(self, bucket: HeldBucket) -> bool:
        """Whether a sharded bucket is kept whole."""
        assert bucket.spec.unit is not None
        return self._executor.unit(bucket.spec.unit).pinned > 0

    @contextmanager
    def hold(
        self, params: Sequence[nn.Parameter], modifier: int | None, writes: bool
    ) -> Iterator[None]:
        """Within, `params` are whole and themselves. With `modifier`, what that rank wrote is
        everybody's value behind it; with `writes` each rank's own part is what counts.

        Raises `StepError` where they were written otherwise, `Diverged` where the ranks do not call
        it together.
        """
        # callers may have had them in a set
        whole = sorted((p for p in params if id(p) not in self._units), key=sharded.name_of)
        params = [p for p in params if id(p) in self._units]
        units = sorted({self._units[id(p)] for p in params})
        if not units and modifier is None:
            yield
            return
        if self._passes.is_open:
            yield from self._use(params, units, modifier)
            return
        self._enter(units, -1 if modifier is None else modifier)
        self._expose(params)
        try:
            yield
        finally:
            if not self._is_over:
                self._conceal(params)
                if modifier is not None:
                    self._spread(whole, modifier)
                self._leave(units, params, modifier, writes=writes)

    def _use(
        self, params: Sequence[nn.Parameter], units: Sequence[int], modifier: int | None
    ) -> Iterator[None]:
        if modifier is not None:
            raise StepError(
                "GatheredParameters(modifier_rank=...) inside a forward or a backward: the values "
                "are in use; write them between steps"
            )
        number = self._passes.needs.set_of(units)
        gatherer = self._passes.gatherer
        self._passes.needs.acquire(number)
        before = _versions(params)
        self._expose(params)
        try:
            yield
        finally:
            if not self._is_over:
                self._conceal(params)
                for parameter, old, new in zip(params, before, _versions(params), strict=True):
                    if new != old:
                        self._passes.lose(parameter)
                gatherer.release(number)

    @undisturbed
    def _enter(self, units: Sequence[int], modifier: int) -> None:
        detail = zlib.crc32(repr((units, modifier)).encode())
        self._passes.meet("GatheredParameters", detail)
        for number in units:
            self._executor.unit(number).pinned += 1
            self._passes.pinned += self._executor.unit(number).pinned == 1
        self._executor.enqueue([Verb.GATHER.of(number) for number in units])
        self._executor.reach()
        self._executor.land(units)
        for number in units:
            self._executor.unit(number).note_writes()

    @undisturbed
    def _leave(
        self,
        units: Sequence[int],
        params: Sequence[nn.Parameter],
        modifier: int | None,
        *,
        writes: bool,
    ) -> None:
        written = None
        for number in units:
            unit = self._executor.unit(number)
            for bucket in unit.buckets:
                if modifier is not None:
                    self._comm.broadcast(bucket.values.tensor, modifier)
                if modifier is not None or writes:
                    bucket.take_part()
            if modifier is None and not writes:
                written = unit.written() or written
            unit.note_writes()
            unit.pinned -= 1
            self._passes.pinned -= not unit.pinned
            if not unit.pinned:
                unit.part_with_aliases(self._executor.units.changes)
        self._executor.enqueue([Verb.FREE.of(number) for number in units])
        self._executor.reach()
        if modifier is None and not writes:
            written = self._told(units, written)
        if written is not None:
            raise StepError(
                f"parameter {written} was written inside GatheredParameters without a "
                "modifier_rank, and the change is lost: say whose values count, with "
                "GatheredParameters(parameters, modifier_rank=0)"
            )

    def _told(self, units: Sequence[int], written: str | None) -> str | None:
        """What has been written is told of here alone; `written` is what versions say."""
        changes = self._executor.units.changes
        found = changes.take()
        if written is not None:
            changes.forget([b for number in units for b in self._executor.unit(number).buckets])
        return written or found

    @undisturbed
    def _spread(self, whole: Sequence[nn.Parameter], source: int) -> None:
        """Parameters that every rank has: rank `source`'s values are everybody's."""
        with torch.no_grad():
            for parameter in whole:
                values = parameter.detach().contiguous()
                if values.numel():
                    self._comm.broadcast(values.view(-1).view(torch.uint8), source)
                    parameter.copy_(values)

    def _expose(self, params: Sequence[nn.Parameter]) -> None:
        for parameter in params:
            self.exposed[id(parameter)] = self.exposed.get(id(parameter), 0) + 1
            sharded.expose(parameter)

    def _conceal(self, params: Sequence[nn.Parameter]) -> None:
        for parameter in params:
            self.exposed[id(parameter)] -= 1
            if not self.exposed[id(parameter)]:
                del self.exposed[id(parameter)]
                sharded.conceal(parameter)


@unintercepted
def _versions(params: Sequence[nn.Parameter]) -> list[int]:
    return [version_of(parameter) for parameter in params]
