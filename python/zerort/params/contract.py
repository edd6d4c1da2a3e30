"""What a pass asks of others: of the hooks that are on the model, of the engine whose window it is,
and of who has the parameters behind that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from zerort.memory import HeldBucket

__all__ = ["NOBODY", "Heir", "Hooked", "Owner"]

Heir = Callable[[Sequence[HeldBucket]], None]
"""Takes sharded buckets' parameters with their values, when their engine has gone."""


class Hooked(Protocol):
    """The hooks on a model."""

    def settle(self) -> None:
        """Ends what a pass that was broken off has left open."""

    def rehook(self) -> None:
        """Makes the hooks anew, not to be traced by compiled autograd."""

    def detach(self, *, whole: bool = True) -> None:
        """Takes them off; the values are nobody's any more where they are not the `whole` of one
        state.
        """


class Owner(Protocol):
    """An engine, in whose window the passes are."""

    def dropped(self) -> None:
        """The window is lost, on all ranks alike."""

    def parted(self) -> None:
        """So it is, because ranks have parted, maybe in other engines' calls."""

    def reached(self) -> None:
        """A backward comes to the module although no pass is open."""


class Nobody:
    """Until there is one: nothing is to be done."""

    def settle(self) -> None:
        """Nothing is open."""

    def rehook(self) -> None:
        """There is none."""

    def detach(self, *, whole: bool = True) -> None:
        """There is none."""

    def dropped(self) -> None:
        """Nobody has a window."""

    def parted(self) -> None:
        """Nobody has a window."""

    def reached(self) -> None:
        """Nobody opens a pass."""


NOBODY = Nobody()
