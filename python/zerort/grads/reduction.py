"""One pass after another over the schedule: from gradients in `.grad` to reduced shards in the
accumulators.

    idle ── begin ──> in pass ── finish ──> idle      reduced values are complete after `drain`
                         └────── abort ───> idle      the rest of the list ran on zeros

Passes add: two backwards before a step are two passes, and the accumulators hold their sum until
`reset`. A gradient that no pass took stays in `.grad`, and `unreduced` counts it, so that the vote
at the boundary can ask for one more.

The first pass observes. From the second one on a bucket has one hook, on its sentinel: the
parameter of it whose gradient came last on this rank. The schedule is the same on all ranks; who is
a sentinel need not be, and a wrong one costs time, never a gradient. When it has fired and some
gradient of the bucket has not come, the bucket waits, and is looked at again when the next sentinel
fires and when the pass ends. An unused sentinel needs no such care: its bucket leaves when the pass
ends, as it would if everything had a hook. A gradient that comes in several parts, one of them
after the sentinel, is late: the vote asks for one more pass, and with that all ranks go back to one
hook per parameter, for good.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from zerort import _core
from zerort.grads.arrivals import Arrivals
from zerort.grads.hooks import ParameterHooks
from zerort.memory import FlatModel, unintercepted
from zerort.mesh import Mesh
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
        transports: Sequence[Transport],
        watch: Watch,
    ) -> None:
        self.plan = plan
        self.passes = 0
        self._flat = flat
        self._comm = mesh.shard
        self._sources = [transport.source for transport in transports]
        self._encoders = [transport.encoder for transport in transports]
        self._watch = watch
        self._reducer = _core.Reducer(plan)
        self._executor = Executor(flat, mesh, transports, watch)
        self._executor.load(plan)
        self._hooks = ParameterHooks(flat.params, self._reducer, self._executor, self._dispatch)
        self._arrivals = Arrivals(flat)
        self._arrivals.load(plan)
        self._active: list[bool] = []
        self._learnt = False
        self._late = False
        # Where the host runs ahead every hook notes the stream its gradient was made on, and a
        # bucket waits for all of them: a sentinel would know of its own only. A trace tells when
        # each bucket's first gradient came.
        self._sentinels = self._executor.device.blocks and not watch.enabled
        if self._sentinels:
            self._reducer.post_sentinels()
        self._announce: Callable[[], None] = lambda: None
        self._drop_stale()
        self.follow()

    @property
    def in_pass(self) -> bool:
        """Whether a backward has begun a pass and not ended it."""
        return self._reducer.in_pass

    @property
    def fingerprint(self) -> int:
        """64 bits over the schedule and over which parameters are frozen: equal on all ranks, or
        they must not step.
        """
        return self.plan.digest ^ zlib.crc32(bytes(self._active))

    @unintercepted
    def follow(self) -> bool:
        """Verifies that every parameter is where it was, and follows freezing and unfreezing.

        Returns whether something was frozen or unfrozen. Raises `StepError` naming a parameter that
        moved.
        """
        self._flat.check()
        active = self._flat.active()
        if active == self._active:
            return False
        self._active = active
        self._reducer.set_active(active)
        if not self._executor.device.blocks:
            # also in micro-batches that are not reduced: each gradient's stream counts
            self._hooks.attach([index for index, trained in enumerate(active) if trained])
        return True

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
            self.drop()

    @unintercepted
    def begin(self, scale: float) -> None:
        """Starts a pass whose sums are multiplied by `scale`."""
        self.drain()  # the last pass's memory is about to be written
        # The executor goes first: a pass that the core knows of can be run to its end, whatever is
        # raised from here on.
        self._executor.begin(Fold(scale, add=self.passes > 0))
        self._reducer.begin()
        self._arrivals.begin()
        self.passes += 1
        watched = self._reducer.watched
        if self._sentinels and self._reducer.observing:
            self._hooks.observe(watched)
        else:
            self._hooks.attach(watched)

    @unintercepted
    def mark(self) -> None:
        """A backward begins whose gradients stay in `.grad`; `disarm` tells whether any came."""
        self._arrivals.mark()

    @unintercepted
    def arm(self, announce: Callable[[], None]) -> None:
        """Calls `announce` when a hook tells of a gradient; it may begin a pass, to which the
        gradient then belongs.
        """
        active = self._flat.active()
        everything = [index for index, requires_grad in enumerate(active) if requires_grad]
        watched = self._reducer.watched if active == self._active else everything
        self._hooks.attach(watched)
        if len(watched) < len(everything):
            self._arrivals.mark()
        self._announce = announce
        self._reducer.arm()

    @unintercepted
    def disarm(self) -> bool:
        """No gradient is awaited any more. Returns whether any has come since `arm` or `mark` that
        no hook has told of.
        """
        self._reducer.disarm()
        come = self._arrivals.unannounced()
        self._arrivals.end()
        return come

    @unintercepted
    def _dispatch(self, index: int, hi: int) -> None:
        if hi == 0:
            self._arrivals.announced()
            self._announce()
            hi = self._reducer.grad_ready(index) or 0
        self._executor.run(self._arrivals.reach(hi) if self._sentinels else hi)

    @unintercepted
    def finish(self) -> list[str]:
        """The backward is over: launches what is left.

        Returns the parameters that require grad and had none on this rank; they count as zero.
        """
        self._executor.launch_all()
        self._reducer.finish()
        self._hooks.relieve()
        self._arrivals.end()
        self._late = self._arrivals.new()
        return self._executor.absent

    @unintercepted
    def abort(self) -> None:
        """The backward failed: runs the rest of the list on zeros, so that the peers' collectives
        pair with ours.
        """
        self.drop()
        self._executor.poison("the backward was aborted")
        if self.in_pass:
            self.finish()
        self.drain()

    @unintercepted
    def rerun(self, scale: float) -> None:
        """One whole pass over what is in `.grad`; all ranks run it, because on some a gradient was
        late.
        """
        self.dismiss_sentinels()
        self.begin(scale)
        self.finish()
        self.drain()

    def dismiss_sentinels(self) -> None:
        """From the next pass on every parameter that requires grad has a hook, for good."""
        self._sentinels = False
        self._reducer.dismiss_sentinels()

    @unintercepted
    def drain(self) -> None:
        """Waits until the sums of all finished passes are complete."""
        self._executor.drain()
        if self.passes and self._watch.enabled:
            self._watch.passed(self._reducer.life())

    @unintercepted
    def collect(self) -> None:
        """A micro-batch that is not reduced is over."""
        # a pass of the micro-batch before may still be sending from where gradients are to rest
        self._executor.collect()
        self._arrivals.rest()

    @unintercepted
    def rest(self) -> None:
        """What is in `.grad` has waited for the next pass, which takes it."""
        self._arrivals.rest()

    @unintercepted
    def holds_gradients(self) -> bool:
        """Whether gradients have come that no pass and no `collect` has taken."""
        return self._arrivals.new()

    @unintercepted
    def unreduced(self) -> int:
        """How many parameters hold a gradient that no pass has taken."""
        return sum(source.unreduced() for source in self._sources)

    @unintercepted
    def written(self) -> str | None:
        """A parameter that has got a `.grad` since the last pass ended; None where one was late."""
        pairs = zip(self._flat.names, self._flat.params, strict=True)
        found = (name for name, parameter in pairs if parameter.grad is not None)
        return None if self._late else next(found, None)

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Within, the caller stands still for the collective `what`."""
        return self._executor.waiting(what)

    @property
    def failure(self) -> str | None:
        """What broke a pass of this window off on this rank, if something did."""
        return self._executor.failure

    @property
    def waited(self) -> float:
        """Seconds that the host has stood still for collectives, since the beginning."""
        return self._executor.waited

    def nonfinite(self) -> tuple[int, int] | None:
        """(rank, parameter) of an infinity or NaN that this rank has received, if it has; rank -1
        where unknown.
        """
        found = (in_sum(bucket, self._comm.rank) for bucket in self._flat.buckets)
        return self._executor.nonfinite or next(
            (place for place in found if place is not None), None
        )

    @unintercepted
    def publish(self) -> None:
        """Brings updated shards to all ranks."""
        self._executor.publish()

    @unintercepted
    def drop(self) -> None:
        """Forgets every gradient that no pass has taken."""
        for source in self._sources:
            source.drop()

    def reset(self, *, applied: bool = False, growth: float = 1.0) -> None:
        """The window is over: the next pass overwrites the accumulators.

        Its sums are in the parameters if `applied`, else they are dropped. From now on gradients
        are `growth` times as large, because the loss scale has moved.
        """
        self.passes = 0
        self._executor.reset()
        for source in self._sources:
            source.reset()
        for encoder in self._encoders:
            encoder.close(applied=applied, growth=growth)

    def forget(self) -> None:
        """Another state of the model has been loaded: nothing of the steps before it is kept."""
        for encoder in self._encoders:
            encoder.forget()

    @unintercepted
    def learn(self) -> bool:
        """Once, after the first boundary: launches follow the order in which rank 0 saw gradients
        arrive.
        """
        if self._learnt:
            return False
        self._learnt = True
        seen = self._reducer.observed if self._comm.rank == 0 else []
        order = torch.full((self.plan.num_params + 1,), -1, dtype=torch.int64)
        order[: len(seen)] = torch.tensor(seen, dtype=torch.int64)
        self._comm.control.broadcast(order)
        self.plan = self.plan.reordered([index for index in order.tolist() if index >= 0])
        self._reducer.reorder(self.plan)
        self._executor.load(self.plan)
        self._arrivals.load(self.plan)
        return True

    @unintercepted
    def close(self) -> None:
        """Takes the hooks off the model."""
        self.disarm()
        self._hooks.remove()
