"""How it becomes known that a gradient has come: by hooks, and by looking where a hook tells of
others too.

The first pass observes. From the second one on a bucket has one hook, on its sentinel: the
parameter of it whose gradient came last on this rank. The schedule is the same on all ranks; who is
a sentinel need not be, and a wrong one costs time, never a gradient. When it has fired and some
gradient of the bucket has not come, the bucket waits, and is looked at again when the next sentinel
fires and when the pass ends; where needs move the list too, the next one takes it along, as it does
what is not full. An unused sentinel needs no such care: its bucket leaves when the pass ends, as it
would if everything had a hook. A gradient that comes in several parts, one of them
after the sentinel, is late: the vote asks for one more pass, and with that all ranks go back to one
hook per parameter, for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zerort import _core
from zerort.grads.arrivals import Arrivals
from zerort.grads.course import Course
from zerort.grads.hooks import ParameterHooks
from zerort.memory import FlatModel, unintercepted
from zerort.run.executor import Executor

__all__ = ["Listener"]

_FEW = 8
"""After so many passes in a row that observe, as where ranks always differ, hooks that stay on cost
less than those of `observe`.
"""


class Listener:
    """Lets the executor run as far as the core allows for the gradients that have come."""

    def __init__(
        self, flat: FlatModel, reducer: _core.Reducer, executor: Executor, course: Course
    ) -> None:
        self.active: list[bool] = []
        """Which parameters require grad, as of the last `follow`."""
        self.is_deaf = False
        """Whether what runs now brings no gradients."""
        self._flat = flat
        self._executor = executor
        self._arrivals = Arrivals(flat)
        # Where the host runs ahead every hook notes the stream its gradient was made on, and a
        # bucket waits for all of them: a sentinel would know of its own only. And a trace tells
        # when each bucket's first gradient came.
        self._sentinels = executor.device.blocks and not executor.watch.times_gradients
        self._shielded = False
        self._listen(reducer, course)
        self._announce: Callable[[], None] = lambda: None
        self._observed = 0

    def _listen(self, reducer: _core.Reducer, course: Course) -> None:
        self._reducer, self._course = reducer, course
        self._hooks = ParameterHooks(self._flat.params, reducer, self._executor, self._dispatch)
        if self._shielded:
            self._hooks.shield()
        if self._sentinels:
            reducer.post_sentinels()

    @unintercepted
    def turn_to(self, reducer: _core.Reducer, course: Course) -> None:
        """Between two passes, the plan is another; `follow` comes next."""
        self.disarm()
        self._hooks.remove()
        self._listen(reducer, course)
        self.active, self._observed = [], 0

    @unintercepted
    def follow(self, active: list[bool]) -> bool:
        """Follows freezing and unfreezing; returns whether anything was."""
        if active == self.active:
            return False
        self.active = active
        self._reducer.set_active(active)
        if not self._executor.device.blocks:
            # also in micro-batches that are not reduced: each gradient's stream counts
            self._hooks.attach([index for index, trained in enumerate(active) if trained])
        return True

    # A pass.

    @unintercepted
    def begin(self) -> None:
        """A pass begins, in the core too."""
        self._arrivals.begin(self._course.commands())
        watched = self._reducer.watched
        self._observed = self._observed + 1 if self._reducer.observing else 0
        if self._sentinels and 0 < self._observed <= _FEW:
            self._hooks.observe(watched)
        else:
            self._hooks.attach(watched)

    @unintercepted
    def finish(self) -> None:
        """The backward is over."""
        self._hooks.relieve()
        self._arrivals.end()

    @unintercepted
    def _dispatch(self, index: int, hi: int) -> None:
        if hi == 0:
            self._arrivals.announced()
            self._announce()
            hi = self._reducer.grad_ready(index) or 0
        if self._sentinels:
            hi = self._arrivals.reach(hi, self._course.place())
        self._course.run(hi)

    def dismiss_sentinels(self) -> None:
        """From the next pass on every parameter that requires grad has a hook, for good."""
        self._sentinels = False
        self._reducer.dismiss_sentinels()

    # A backward that has no pass, or none yet.

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
        watched = everything
        if active == self.active and not self._course.observes:
            watched = self._reducer.watched
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

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Within, what reaches the module is the engine's own `autograd.grad`, which brings no
        gradients: nothing is armed for it. Between passes only, when no parameter has a hook of
        those that observe.
        """
        self.is_deaf = True
        try:
            yield
        finally:
            self.is_deaf = False

    @unintercepted
    def rest(self) -> None:
        """What is in `.grad` has waited for the next pass, which takes it."""
        self._arrivals.rest()

    @unintercepted
    def holds_gradients(self) -> bool:
        """Whether gradients have come that no pass has taken, and that are not at rest."""
        return self._arrivals.new()

    @unintercepted
    def shield(self) -> None:
        """From now on no hook is traced by compiled autograd."""
        self._shielded = True
        self._hooks.shield()

    @unintercepted
    def close(self) -> None:
        """Takes the hooks off the model."""
        self.disarm()
        self._hooks.remove()
