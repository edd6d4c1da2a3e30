"""The events of a step, and what hangs on them.

A feature of the engine beside gradients (a monitor, a profiler, a schedule of the model's own) is a
`Feature`: it overrides the events that it hears, and `Events` calls exactly those. An event that
no feature hears costs a loop over nothing.

What it guarantees: a feature that raises takes nothing from the others, which are still called;
before the vote its failure is this rank's, so that no rank applies the step. What it does not do:
no event adds a collective by itself. A feature that needs one uses it on all ranks alike, as a
function of configuration and counters, and takes part in it where this rank has failed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from zerort.errors import CommError

__all__ = ["Crossing", "Events", "Feature"]

F = TypeVar("F", bound="Feature")


@dataclass(frozen=True)
class Crossing:
    """A boundary that has been crossed: the counters behind it, and what became of the step."""

    steps: int
    """Boundaries passed, this one included."""
    samples: int
    """Samples of these boundaries, over all ranks."""
    applied: bool
    """False: a gradient was not finite on some rank, and the step was skipped on all."""


class Feature:
    """One feature of an engine, in the order of a step; what is not overridden is not called."""

    name: str
    """Its section of the configuration; what it keeps in a checkpoint stands under it."""

    def keywords(self) -> Mapping[str, Any]:
        """Keyword arguments that the module's forward gets; they win over the caller's."""
        return {}

    def forward(self) -> AbstractContextManager[None]:
        """What the module's forward runs in."""
        return nullcontext()

    def backward(self, loss: Tensor, steps: int) -> bool:
        """`engine.backward(loss)` begins; the loss () is the user's, neither divided by the
        accumulation `steps` nor scaled. Returns whether its graph is to be retained.

        What it raises fails the micro-batch.
        """
        return False

    def scaled(self, loss: Tensor) -> None:
        """A backward of the user's own is over, of a loss () that `engine.scale` was given: neither
        divided nor scaled, and the sum where one backward was of several.
        """

    def before_vote(self, *, failed: bool) -> None:
        """All ranks are at a boundary, on this one something has `failed`. Every rank calls it, so
        this is where a collective may be.

        What it raises is this rank's failure: no rank applies the step.
        """

    def published(self) -> None:
        """The step has been applied and parameters have the new values on all ranks.

        What it raises leaves ranks different: no further step before a checkpoint is loaded.
        """

    def crossed(self, crossing: Crossing) -> None:
        """The boundary is over, counters and scheduler included. What it raises is the caller's;
        the step stands.
        """

    def readings(self) -> Sequence[tuple[str, float]]:
        """Names and values to be shown of the boundary that is over."""
        return ()

    def ended(self) -> None:
        """A micro-batch is over, the one at a boundary too."""

    def dropped(self) -> None:
        """The window's gradients have been dropped."""

    def restored(self) -> None:
        """A checkpoint has been loaded, and parameters follow from the masters in it."""

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of it, alike on all ranks: JSON values; None for nothing."""
        return None

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state`. Raises `ValueError` for what it cannot go on from, unchanged."""

    def close(self) -> None:
        """The engine gives everything back."""


_EVENTS = (
    "keywords",
    "forward",
    "backward",
    "scaled",
    "before_vote",
    "published",
    "crossed",
    "readings",
    "ended",
    "dropped",
    "restored",
    "state",
    "close",
)


class Events:
    """Calls the features of one engine, each event's in their order."""

    def __init__(self, features: Sequence[Feature] = ()) -> None:
        self._listen(features)
        self._initial = copy.deepcopy(self.state())

    def add(self, feature: Feature) -> None:
        """From now on it hears too, behind the others. It keeps nothing in checkpoints."""
        self._listen((*self.features, feature))

    def _listen(self, features: Sequence[Feature]) -> None:
        self.features = tuple(features)
        self._hear: dict[str, tuple[Callable[..., Any], ...]] = {
            event: tuple(
                getattr(feature, event)
                for feature in features
                if getattr(type(feature), event) is not getattr(Feature, event)
            )
            for event in _EVENTS
        }
        self._keywords = self._hear["keywords"]
        self._forward = self._hear["forward"]
        self._backward = self._hear["backward"]
        self._scaled = self._hear["scaled"]
        self._ended = self._hear["ended"]

    def hears(self, event: str) -> bool:
        """Whether a feature hears of it."""
        return bool(self._hear[event])

    def find(self, kind: type[F]) -> F | None:
        """The feature of this kind, if it is on."""
        return next((each for each in self.features if isinstance(each, kind)), None)

    # In the order of a step.

    def keywords(self, given: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a forward."""
        for hears in self._keywords:
            given = {**given, **hears()}
        return given

    def forward(self) -> AbstractContextManager[Any]:
        """What a forward runs in."""
        if not self._forward:
            return _NOTHING
        with ExitStack() as stack:
            for hears in self._forward:
                stack.enter_context(hears())
            return stack.pop_all()

    def backward(self, loss: Tensor, steps: int) -> bool:
        """`engine.backward(loss)` begins. Returns whether its graph is to be retained."""
        retains = False
        for hears in self._backward:
            retains |= hears(loss, steps)
        return retains

    def scaled(self, losses: Sequence[Tensor]) -> None:
        """A backward of the user's own is over, of these losses that `engine.scale` was given."""
        if losses and self._scaled:
            loss = torch.stack([each.reshape(()).float() for each in losses]).sum()
            for hears in self._scaled:
                hears(loss)

    def before_vote(self, failure: str | None) -> str | None:
        """All ranks are at a boundary; returns why this one fails, if it does. What is no
        `Exception` is raised once all have heard.
        """
        interrupt: BaseException | None = None
        for hears in self._hear["before_vote"]:
            try:
                hears(failed=failure is not None)
            except CommError:
                raise
            except BaseException as error:
                failure = failure or f"{type(error).__name__}: {error}"
                if not isinstance(error, Exception):
                    interrupt = interrupt or error
        if interrupt is not None:
            raise interrupt
        return failure

    def published(self) -> None:
        """A step has been applied. Raises what the first of those that raised did."""
        self._call("published")

    def crossed(self, crossing: Crossing) -> None:
        """A boundary is over. Raises what the first of those that raised did."""
        self._call("crossed", crossing)

    def readings(self) -> Iterator[tuple[str, float]]:
        """What there is to be shown of the boundary that is over."""
        for hears in self._hear["readings"]:
            yield from hears()

    def ended(self) -> None:
        """A micro-batch is over."""
        for hears in self._ended:
            hears()

    def dropped(self) -> None:
        """The window's gradients have been dropped."""
        self._call("dropped")

    def restored(self) -> None:
        """A checkpoint has been loaded."""
        self._call("restored")

    def close(self) -> None:
        """The engine gives everything back. Raises what the first of those that raised did."""
        self._call("close")

    # Checkpoints.

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps, by the features' names."""
        found = {each.name: each.state() for each in self.features}
        return {name: state for name, state in found.items() if state is not None}

    def load(self, saved: Mapping[str, dict[str, Any]]) -> None:
        """Goes on from what was saved, where the feature is on; one of which nothing was saved
        starts anew. Raises `ValueError`.
        """
        for each in self.features:
            state = saved.get(each.name, self._initial.get(each.name))
            if state is not None:
                each.load(copy.deepcopy(state))

    def _call(self, event: str, *arguments: Any) -> None:
        raised: list[BaseException] = []
        for hears in self._hear[event]:
            try:
                hears(*arguments)
            except BaseException as error:
                raised.append(error)
        if raised:
            # an interrupt is nobody's reason, and goes through whoever raised before it
            raise next((each for each in raised if not isinstance(each, Exception)), raised[0])


_NOTHING = nullcontext()
