"""One pass after another over the schedule: from gradients in `.grad` to reduced shards in the
accumulators.

    idle ── begin ──> in pass ── finish ──> idle      reduced values are complete after `drain`
                         └────── abort ───> idle      the rest of the list ran on zeros

Passes add: two backwards before a step are two passes, and the accumulators hold their sum until
`reset`. A gradient that no pass took stays in `.grad`, and `local.unreduced` counts it, so that the
vote at the boundary can ask for one more.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from zerort import _core
from zerort.errors import CommError
from zerort.grads.course import Routed, Straight
from zerort.grads.listener import Listener
from zerort.grads.local import LocalState
from zerort.memory import FlatModel, unintercepted
from zerort.mesh import Mesh
from zerort.run.empty import EmptyPass
from zerort.run.executor import Executor, Fold
from zerort.run.flight import Transport
from zerort.run.nonfinite import in_sum
from zerort.trace.watch import Watch

__all__ = ["Reduction"]

_log = logging.getLogger("zerort")


class Reduction:
    """Owns the two cursors (the core's reducer, the executor) and the hooks that move them."""

    def __init__(
        self,
        plan: _core.Plan,
        flat: FlatModel,
        mesh: Mesh,
        transports: Mapping[int, Transport],
        watch: Watch,
        room: int | None = None,
    ) -> None:
        self.plan = plan
        self.passes = 0
        """Of this window, those that have begun."""
        self.begun = 0
        """Passes since the beginning, empty ones included; equal on all ranks behind a vote."""
        self._flat = flat
        self._comm = mesh.job
        self._shard = mesh.shard.rank
        self.local = LocalState(flat, transports)
        self._watch = watch
        self._reducer = _core.Reducer(plan)
        self.executor = Executor(flat, mesh, transports, watch)
        self.executor.load(plan)
        self.course = self._course(mesh.rank, room)
        self.listener = Listener(flat, self._reducer, self.executor, self.course)
        self._order: list[int] | None = None
        self._drop_stale()
        self.follow()

    def _course(self, rank: int, room: int | None) -> Straight | Routed:
        if room is None:
            return Straight(self.plan, self._reducer, self.executor)
        gatherer = _core.Gatherer(self._reducer, rank=rank, room=room)
        return Routed(self.plan, self._reducer, self.executor, gatherer)

    @property
    def in_pass(self) -> bool:
        """Whether a backward has begun a pass and not ended it."""
        return self._reducer.in_pass

    @property
    def fingerprint(self) -> int:
        """64 bits over the schedule and over which parameters are frozen: equal on all ranks, or
        they must not step.
        """
        return self.plan.digest ^ zlib.crc32(bytes(self.listener.active))

    @unintercepted
    def follow(self) -> bool:
        """Verifies that every parameter is where it was, and follows freezing and unfreezing.

        Returns whether something was frozen or unfrozen. Raises `StepError` naming a parameter that
        moved.
        """
        self._flat.check()
        return self.listener.follow(self._flat.active())

    def _drop_stale(self) -> None:
        """What a backward before this left in `.grad` is no part of the first step."""
        pairs = zip(self._flat.names, self._flat.params, strict=True)
        stale = [name for name, parameter in pairs if parameter.grad is not None]
        if stale:
            _log.warning(
                "rank %d: %s%s had a .grad before initialize, which is dropped",
                self._comm.rank,
                stale[0],
                f" and {len(stale) - 1} more parameters" if len(stale) > 1 else "",
            )
            self.local.drop()

    @unintercepted
    def begin(self, scale: float) -> None:
        """Starts a pass whose sums are multiplied by `scale`."""
        self.drain()  # the last pass's memory is about to be written
        # The executor goes first: a pass that the core knows of can be run to its end, whatever is
        # raised from here on.
        self.executor.begin(Fold(scale, add=self.passes > 0))
        self.course.begin()
        self.passes += 1
        self.listener.begin()

    @unintercepted
    def finish(self) -> list[str]:
        """The backward is over: launches what is left.

        Returns the parameters that require grad and had none on this rank; they count as zero.
        """
        running = self.in_pass
        try:
            absent = self.course.finish()
        finally:
            self.begun += running and not self.in_pass
        self.listener.finish()
        self.local.late = self.listener.holds_gradients()
        return (
            self.executor.current.absent
            if absent is None
            else [self._flat.names[i] for i in absent]
        )

    @unintercepted
    def abort(self) -> None:
        """The backward failed: runs the rest of the list on zeros, so that the peers' collectives
        pair with ours.
        """
        self.local.drop()
        self.executor.current.poison("the backward was aborted")
        if self.in_pass:
            self.finish()
        self.settle()

    @unintercepted
    def rerun(self, scale: float) -> None:
        """One whole pass over what is in `.grad`; all ranks run it, because on some a gradient was
        late.
        """
        self.listener.dismiss_sentinels()
        self.begin(scale)
        self.finish()
        self.drain()

    @unintercepted
    def begin_empty(self) -> EmptyPass:
        """Starts a pass for the peers' sake, in which nothing is reduced; the last one is over."""
        self.begun += 1
        return self.executor.empty("some rank failed, and this one takes part on zeros")

    @unintercepted
    def advance(self, empty: EmptyPass) -> bool:
        """Goes on with it as far as it goes without waiting; returns whether it is over. Raises
        `CommError`.
        """
        try:
            return empty.advance()
        except RuntimeError as error:
            if isinstance(error, CommError):
                raise
            raise self._comm.failure("a reduction on zeros", error) from error

    def settle(self) -> None:
        """`drain`, unless a peer may need this rank before its sums can come."""
        if self.course.waits:
            self.drain()

    @unintercepted
    def drain(self) -> None:
        """Waits until the sums of all finished passes are complete."""
        self.executor.drain()
        if self.passes and self._watch.times_gradients:
            self._watch.passed(self._reducer.life())

    @unintercepted
    def collect(self) -> None:
        """A micro-batch that is not reduced is over."""
        # a pass of the micro-batch before may still be sending from where gradients are to rest
        self.executor.collect()
        self.listener.rest()

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Within, the caller stands still for the collective `what`."""
        return self.executor.waits.waiting(what)

    @property
    def failure(self) -> str | None:
        """What broke a pass of this window off on this rank, if something did."""
        return self.executor.current.failure

    def lost(self) -> str | None:
        """A parameter that was written on this rank while it was whole for a pass, if one was.
        Waits for the device, and tells once.
        """
        return self.executor.units.changes.read()

    @property
    def waited(self) -> float:
        """Seconds that the host has stood still for collectives, since the beginning."""
        return self.executor.waits.seconds

    @property
    def reducing(self) -> float:
        """Seconds that the host has packed, started and added up, since the beginning, without what
        it waited.
        """
        return self.executor.waits.reducing.seconds

    @property
    def publishing(self) -> float:
        """Seconds that it has worked to bring updated parameters to all ranks, behind the
        update.
        """
        return self.executor.waits.publishing.seconds

    def nonfinite(self) -> tuple[int, int] | None:
        """(rank, parameter) of an infinity or NaN that this rank has received, if it has; rank -1
        where unknown.
        """
        found = (in_sum(bucket, self._shard) for bucket in self._flat.trained)
        return self.executor.current.nonfinite or next(
            (place for place in found if place is not None), None
        )

    @property
    def published(self) -> Sequence[int]:
        """Numbers of buckets in the order in which they are published."""
        return self.executor.publication.order

    @unintercepted
    def prepare_publication(self) -> None:
        """Before an update that is published beside what follows. Nothing is on its way."""
        self.executor.publication.guard.prepare()

    @unintercepted
    def publish_ready(self, ready: Collection[int], *, overlapped: bool = False) -> None:
        """Begins to bring the updated shards of these buckets to all ranks."""
        self.executor.publish_ready(ready, overlapped=overlapped)

    @unintercepted
    def publish(self, *, overlapped: bool = False) -> None:
        """Brings updated shards to all ranks; where that is `overlapped`, who needs them waits."""
        self.executor.publish(overlapped=overlapped)

    @unintercepted
    def land(self) -> None:
        """Waits for updated parameters that are on their way, if there are any. Raises `CommError`,
        each time.
        """
        self.executor.publication.land()

    @unintercepted
    def end_publication(self, *, waits: bool) -> None:
        """Nothing is published any more; what is on its way is waited for if it `waits`. Raises
        `CommError`.
        """
        self.executor.publication.guard.close(waits=waits)

    @property
    def unpublished(self) -> str | None:
        """Why not all ranks have the same parameters, if updates have been lost on their way."""
        return self.executor.publication.failure

    def reset(self, *, applied: bool = False, growth: float = 1.0) -> None:
        """The window is over: the next pass overwrites the accumulators.

        Its sums are in the parameters if `applied`, else they are dropped. From now on gradients
        are `growth` times as large, because the loss scale has moved.
        """
        self.passes = 0
        self.executor.current.reset()
        self.local.reset(applied=applied, growth=growth)

    @unintercepted
    def learn(self) -> bool:
        """Once, after the first boundary: launches follow the order in which rank 0 saw gradients
        arrive. Where it has seen none, as behind a `replan`, the next boundary teaches.
        """
        if self._order is not None or not self.course.waits:
            return False
        seen = self._reducer.observed if self._comm.rank == 0 else []
        row = torch.full((self.plan.num_params + 1,), -1, dtype=torch.int64)
        row[: len(seen)] = torch.tensor(seen, dtype=torch.int64)
        self._comm.control.broadcast(row)
        order = [index for index in row.tolist() if index >= 0]
        if not order:
            return False
        self._order = order
        self.plan = self.plan.reordered(order)
        self._reducer.reorder(self.plan)
        # what a backward comes to last is what a forward needs first
        self.executor.publication.need(order[::-1])
        self.executor.load(self.plan)
        self.course.load(self.plan)
        return True

    @unintercepted
    def replan(self, plan: _core.Plan, transports: Mapping[int, Transport]) -> None:
        """Between two passes, the model has the buckets of another `plan`; its order of launches is
        the one that was learnt. What sources and encoders have kept is gone: nothing waits.

        Below stage 3 only. As in a first pass, nothing leaves before the end of the next one.
        """
        self.plan = plan if self._order is None else plan.reordered(self._order)
        self.local.send_by(transports)
        self._reducer = _core.Reducer(self.plan)
        self.executor.send_by(transports)
        self.executor.load(self.plan)
        self.course = Straight(self.plan, self._reducer, self.executor)
        self.listener.turn_to(self._reducer, self.course)
        self.follow()

    @unintercepted
    def follow_routes(self, room: int, depth: int) -> None:
        """Launches, gathers and frees follow what rank 0 has seen. Nothing is under way; all ranks
        call it.
        """
        assert isinstance(self.course, Routed)
        gatherer = self.course.gatherer
        first = self._comm.rank == 0
        seen = (list(self._reducer.observed), gatherer.routes()) if first else None
        observed, routes = self._comm.control.gather_objects(seen)[0]
        self.plan = self.plan.reordered(observed).routed(routes, room=room, depth=depth)
        self._reducer.reorder(self.plan)
        self.executor.load(self.plan)
        self.course.load(self.plan)
        if first:
            gatherer.told()
        gatherer.load(self.plan)

    @unintercepted
    def unload(self) -> None:
        """Gives the memory of gradients on their way back, until `reload`. Nothing is under way."""
        self.executor.unload()

    @unintercepted
    def reload(self) -> None:
        """Takes such memory again."""
        self.executor.load(self.plan)

    @unintercepted
    def follow_memory(self) -> None:
        """Sums lie elsewhere; no gradient waits."""
        self.executor.follow()

    def close(self) -> None:
        """Takes the hooks off the model, and gives the memory of buckets in flight back."""
        self.listener.close()
        self.executor.close()
