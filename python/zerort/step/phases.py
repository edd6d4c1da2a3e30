"""What an engine is in the middle of, with its data in the variants: no other combination can be
written. `step.transaction` has the picture and the transitions.
"""

from __future__ import annotations

from dataclasses import dataclass

from zerort.grads.tasks import GraphTask, LossScaling

__all__ = [
    "Away",
    "Backward",
    "Destroyed",
    "Idle",
    "Lost",
    "Phase",
    "Reached",
    "Settled",
    "between",
    "owes_pass",
]


@dataclass(frozen=True)
class Idle:
    """Between calls."""

    backwards: int = 0
    """Of this micro-batch, those that are over."""
    resting: LossScaling | None = None
    """Another engine's backward has left gradients in `.grad`, its loss scaled like this."""


@dataclass(frozen=True)
class Reached:
    """A backward that this engine has not begun is in the module. It may accumulate gradients or
    only compute some.
    """

    task: GraphTask
    before: Idle
    scaling: LossScaling | None
    """What an engine did to its loss; None where it is the user's own."""
    foreign: bool
    """That was another engine."""


@dataclass(frozen=True)
class Backward:
    """A backward brings gradients."""

    before: Idle
    owes: bool = True
    """The peers expect a pass of it, which has not begun here."""
    task: GraphTask | None = None
    """Where it is a `loss.backward()` of the user's own; else the engine's call ends it."""


@dataclass(frozen=True)
class Away:
    """Between steps, with states on the host until `reload_states`."""

    values: bool
    """Parameters are among them."""


@dataclass(frozen=True)
class Settled:
    """A backward, or its forward, has raised and its peers have been told: the `step` that
    belongs to it is void.
    """


@dataclass(frozen=True)
class Lost:
    """A collective has failed, so there is no peer left to keep in step with."""

    reason: str


@dataclass(frozen=True)
class Destroyed:
    """The engine has given everything back."""


Phase = Idle | Reached | Backward | Away | Settled | Lost | Destroyed


def between(phase: Phase) -> Idle:
    """How far the micro-batch has come between calls; in any other phase nothing of it counts."""
    return phase if isinstance(phase, Idle) else Idle()


def owes_pass(phase: Phase) -> bool:
    """Whether the peers expect a pass of this micro-batch that has not begun here."""
    match phase:
        case Backward(owes=owes):
            return owes
        case Idle(backwards=backwards):
            return backwards == 0
        case _:
            return True
