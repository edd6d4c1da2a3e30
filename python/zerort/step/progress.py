"""What follows an update: counters, the learning rate, and the events of a boundary.

The parameters of all ranks have moved by then, or the step has been skipped on all. What the user's
objects raise here can not take that back: the counters say what happened, and the error does too.
What a scheduler refuses by its signature is found before the update.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zerort.errors import ConfigError, StepError
from zerort.step.accumulation import Counters
from zerort.step.boundary import Boundary, Outcome
from zerort.step.events import Crossing, Events

__all__ = ["Progress"]


@dataclass
class Progress:
    """Counts steps, steps the scheduler and calls the features."""

    counters: Counters
    boundary: Boundary
    scheduler: Any
    events: Events
    applied: bool = False
    """Whether the last `step` changed the parameters."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the scheduler's step was given last."""
    _accepted: frozenset[str] | None = field(default=None, init=False)

    def follow(self, scheduler: Any) -> None:
        """From now on steps `scheduler`, or none. Raises `ConfigError` for what has no `step`."""
        steps = callable(getattr(scheduler, "step", None)) and not isinstance(scheduler, type)
        if scheduler is not None and not steps:
            raise ConfigError(
                "engine.lr_scheduler: expected a learning rate scheduler, with a step(), or None, "
                f"got {scheduler!r}"
            )
        self.scheduler, self._accepted = scheduler, None

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raises `StepError` where the scheduler's `step` does not take `arguments`."""
        names = frozenset(arguments)
        if self.scheduler is None or names == self._accepted:
            return
        try:
            inspect.signature(self.scheduler.step).bind(**arguments)
        except TypeError as error:
            raise StepError(
                f"the learning rate scheduler {type(self.scheduler).__name__} cannot be stepped "
                f"with lr_kwargs {sorted(names)}: {error}; give engine.step(lr_kwargs=...) what "
                "its step takes"
            ) from error
        except ValueError:
            pass  # a builtin, which has no signature
        self._accepted = names

    def after(self, outcome: Outcome, samples: int, arguments: Mapping[str, Any]) -> None:
        """A boundary has been crossed with `samples` over all ranks.

        Raises `StepError` where a feature, the scheduler or the trace raised; the step stands.
        """
        self.applied = outcome is Outcome.APPLIED
        self.counters.global_steps += 1
        self.counters.global_samples += samples
        self.counters.skipped_steps += not self.applied
        self.arguments = arguments
        if self.applied:
            self._publish()
            self._step_scheduler(arguments)
        try:
            self.events.crossed(
                Crossing(self.counters.global_steps, self.counters.global_samples, self.applied)
            )
        except Exception as error:
            raise StepError(
                f"{self._stands()}; what reports it raised {type(error).__name__}: {error}"
            ) from error

    def _publish(self) -> None:
        if self.events.hears("published"):
            self.boundary.reduction.land()
        try:
            self.events.published()
        except BaseException as error:
            message = (
                f"{self._stands()}; then a feature raised {type(error).__name__}: {error}, so that "
                "parameters may differ between ranks: load a checkpoint before going on"
            )
            self.boundary.ranks_differ = message
            if not isinstance(error, Exception):
                raise
            raise StepError(message) from error

    def _step_scheduler(self, arguments: Mapping[str, Any]) -> None:
        if self.scheduler is None:
            return
        try:
            self.scheduler.step(**arguments)
            self.boundary.optimizer.settle_rates()
        except BaseException as error:
            message = (
                f"{self._stands()}; then the learning rate scheduler raised "
                f"{type(error).__name__}: {error}, so that rates may differ between ranks: load a "
                "checkpoint before going on"
            )
            self.boundary.ranks_differ = message
            if not isinstance(error, Exception):
                raise
            raise StepError(message) from error

    def _stands(self) -> str:
        done = "applied" if self.applied else "skipped"
        return f"step {self.counters.global_steps} was {done} on all ranks, and that stands"
