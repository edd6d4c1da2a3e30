"""Where in an accumulation window the engine stands: which micro-batch is the boundary, and whose
gradients travel.

Pure bookkeeping: no tensor, no communication. The rule is DeepSpeed's: the boundary is every
`steps`-th micro-batch, unless the user has said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from zerort.errors import StepError

__all__ = ["Accumulation", "Counters"]


@dataclass
class Counters:
    """The engine's counters, as DeepSpeed counts."""

    global_steps: int = 0
    """Boundaries passed, skipped ones included."""
    global_samples: int = 0
    micro_steps: int = 0
    skipped_steps: int = 0
    """Boundaries at which a gradient was not finite."""


@dataclass
class Accumulation:
    """The current micro-batch's place. `every` says that gradients travel in every micro-batch."""

    steps: int
    every: bool
    counters: Counters
    override: bool | None = None
    held: int = 0
    """Depth of `no_sync`."""
    scaled: bool = False
    """A backward of this window was divided by the number of steps before it ran."""
    direct: bool = False
    """A backward of this window was the user's own, and is divided in the reduction."""
    taken: int = 0
    """Micro-batches of this window that are over."""
    origin: int = 0
    """Where windows are counted from, in micro-batches: the last change of `steps`."""

    @property
    def boundary(self) -> bool:
        """Whether this micro-batch ends the window."""
        if self.override is not None:
            return self.override
        return (self.counters.micro_steps + 1 - self.origin) % self.steps == 0

    @property
    def travels(self) -> bool:
        """Whether this micro-batch's gradients are reduced in its backward."""
        return not self.held and (self.every or self.boundary)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Within, gradients stay where autograd puts them."""
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    def note(self, *, direct: bool) -> None:
        """A backward begins. Raises `StepError` when a window would mix divided and undivided
        losses.
        """
        self.direct, self.scaled = self.direct or direct, self.scaled or not direct
        if self.direct and self.scaled and self.steps > 1:
            raise StepError(
                "one accumulation window mixes engine.backward(loss) or engine.scale(loss), which "
                "divide by gradient_accumulation_steps, with a direct loss.backward(), which is "
                "divided when it is reduced: use one of them for all micro-batches of a window. "
                "Where another engine's backward comes through this module, freeze it meanwhile "
                "with requires_grad_(False)"
            )

    @property
    def divisor(self) -> int:
        """What the reduction still has to divide by."""
        return self.steps if self.direct else 1

    def resize(self, steps: int, *, backwards: int) -> None:
        """Windows to come have `steps` micro-batches; the next one begins now.

        `backwards` have run in the current micro-batch. Raises `StepError` when a window has begun:
        what it holds is divided by the number of steps it began with.
        """
        if steps == self.steps:
            return
        if self.taken or backwards:
            raise StepError(
                f"gradient accumulation cannot change from {self.steps} to {steps} steps in the "
                "middle of a window, whose losses have been divided already: change it right "
                "after a step at a boundary"
            )
        self.steps, self.origin = steps, self.counters.micro_steps

    def forget(self) -> None:
        """What the window had gathered is dropped, so nothing is left to mix with."""
        self.scaled = self.direct = False

    def realign(self) -> None:
        """Begins a window anew: what a window had gathered before a checkpoint is not in it."""
        self.forget()
        self.taken = self.origin = 0
        self.counters.micro_steps -= self.counters.micro_steps % self.steps

    def advance(self) -> None:
        """The micro-batch is over."""
        self.taken += 1
        if self.boundary:
            self.forget()
            self.taken = 0
        self.counters.micro_steps += 1
