"""Where in an accumulation window the engine stands: which micro-batch is the boundary, whose
gradients are reduced, and what the window holds.

Pure bookkeeping: no tensor, no communication. The rule is DeepSpeed's: the boundary is every
`steps`-th micro-batch, unless the user has said otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from zerort.errors import StepError

__all__ = ["Accumulation", "Counters", "UnusedParameters", "Window"]

_log = logging.getLogger("zerort")


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
class Window:
    """What an accumulation window holds so far."""

    taken: int = 0
    """Micro-batches that are over."""
    given: int = 0
    """Micro-batches that brought a gradient which is still held; the current one included."""
    waits: bool = False
    """Some of its gradients wait for a pass."""
    divisor: float | None = None
    """What the reduction still has to divide the window's gradients by; None before the first."""
    failure: str | None = None
    """Why this rank has failed within the window, for the vote at its end."""

    def forget(self) -> None:
        """What was gathered is dropped, so nothing is left to mix with."""
        self.given, self.divisor, self.waits = 0, None, False


@dataclass
class Accumulation:
    """The current micro-batch's place. `every` says that gradients are reduced in every one."""

    steps: int
    every: bool
    counters: Counters
    window: Window = field(default_factory=Window)
    override: bool | None = None
    held: int = 0
    """Depth of `no_sync`."""
    managed: bool = True
    """Windows end by count; else where the user steps."""
    coalesced: bool = False
    """It is held until one reduction behind the last backward, which the peers expect."""
    stepping: bool = False
    """Where windows are not managed: the step that ends one is under way."""
    origin: int = 0
    """Where windows are counted from, in micro-batches: the last change of `steps`."""

    @property
    def boundary(self) -> bool:
        """Whether this micro-batch ends the window."""
        if not self.managed:
            return self.stepping
        if self.override is not None:
            return self.override
        return (self.counters.micro_steps + 1 - self.origin) % self.steps == 0

    @property
    def reduces(self) -> bool:
        """Whether a backward reduces gradients now."""
        return not self.held and (self.every or self.boundary)

    @property
    def owes(self) -> bool:
        """Whether gradients of this micro-batch are reduced, by its backward or behind it."""
        return (not self.held or self.coalesced) and (self.every or self.boundary)

    @property
    def defers(self) -> bool:
        """Whether gradients are reduced by the step, as no backward is known to be the last."""
        return not self.managed and not self.every

    @property
    def ends_on_failure(self) -> bool:
        """Whether a failure is the end of this micro-batch: else a step of the user's is to
        come.
        """
        return self.managed or self.stepping

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Within, gradients stay where autograd puts them."""
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    @contextmanager
    def coalesce(self) -> Iterator[None]:
        """Within, they do, and one reduction follows."""
        with self.hold():
            self.coalesced = True
            try:
                yield
            finally:
                self.coalesced = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within, the user ends the micro-batch."""
        self.stepping = True
        try:
            yield
        finally:
            self.stepping = False

    def note(self, divisor: float) -> None:
        """A backward begins, whose gradients the reduction has to divide by `divisor`.

        Raises `StepError` when the window holds gradients that are to be divided by another one.
        """
        known = self.window.divisor
        if known is not None and known != divisor:
            raise StepError(
                "one accumulation window mixes engine.backward(loss) or engine.scale(loss), which "
                "divide by gradient_accumulation_steps, with a direct loss.backward(), which is "
                "divided when it is reduced, or with another engine's backward, whose steps or "
                "loss scale are not this engine's: use one of them for all micro-batches of a "
                "window. Where another engine's backward comes through this module, freeze it "
                "meanwhile with requires_grad_(False)"
            )
        self.window.divisor = divisor

    @property
    def divisor(self) -> float:
        """What the reduction still has to divide by."""
        return self.window.divisor or 1.0

    def resize(self, steps: int, *, backwards: int) -> None:
        """Windows to come have `steps` micro-batches; the next one begins now.

        `backwards` have run in the current micro-batch. Raises `StepError` when a window has begun:
        what it holds is divided by the number of steps it began with.
        """
        if steps == self.steps:
            return
        if self.window.taken or backwards:
            raise StepError(
                f"gradient accumulation cannot change from {self.steps} to {steps} steps in the "
                "middle of a window, whose losses have been divided already: change it right "
                "after a step at a boundary"
            )
        self.steps, self.origin = steps, self.counters.micro_steps

    def realign(self) -> None:
        """Begins a window anew: what a window had gathered before a checkpoint is not in it."""
        self.window, self.origin = Window(), 0
        if self.managed:
            self.counters.micro_steps -= self.counters.micro_steps % self.steps

    def advance(self) -> None:
        """The micro-batch is over."""
        if self.boundary:
            self.window = Window()
        else:
            self.window.taken += 1
        self.counters.micro_steps += 1

    def end_window(self, micro_batches: int) -> None:
        """The window, of so many `micro_batches`, is over wherever this rank stands in it."""
        self.counters.micro_steps += micro_batches - self.window.taken
        self.window, self.origin = Window(), self.counters.micro_steps


_MOST = 8
"""Names in one message."""


class UnusedParameters:
    """Parameters that a backward did not reach on this rank: each is named once, or is an error
    where that is asked for.
    """

    def __init__(self, rank: int, policy: Literal["zero", "raise"]) -> None:
        self._rank = rank
        self._policy = policy
        self._named: set[str] = set()

    def report(self, names: Sequence[str]) -> None:
        """Logs the new ones among `names`, or raises `StepError` where that is the policy."""
        new = [name for name in names if name not in self._named]
        if not new:
            return
        listed = ", ".join(new[:_MOST])
        if len(new) > _MOST:
            listed += f" and {len(new) - _MOST} more"
        if self._policy == "raise":
            raise StepError(
                f"no gradient came for {listed}: the forward did not use them. Use or freeze them, "
                'or let them count as zero with "zerort": {"unused_parameters": "zero"}, or '
                '"zero_optimization": {"ignore_unused_parameters": true}'
            )
        self._named.update(new)
        _log.warning(
            "rank %d: no gradient came for %s; it counts as zero (said once per parameter)",
            self._rank,
            listed,
        )
