"""What a pass asks of others: of the hooks that are on the model, and of the engine whose window it
is.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["NOBODY", "Hooked", "Owner"]


class Hooked(Protocol):
    """The hooks on a model."""

    def settle(self) -> None:
        """Ends what a pass that was broken off has left open."""

    def rehook(self) -> None:
        """Makes the hooks anew, not to be traced by compiled autograd."""

    def detach(self) -> None:
        """Takes them off."""


class Owner(Protocol):
    """An engine, in whose window the passes are."""

    def dropped(self) -> None:
        """The window is lost, on all ranks alike."""

    def reached(self) -> None:
        """A backward comes to the module although no pass is open."""


class Nobody:
    """Until there is one: nothing is to be done."""

    def settle(self) -> None:
        """Nothing is open."""

    def rehook(self) -> None:
        """There is none."""

    def detach(self) -> None:
        """There is none."""

    def dropped(self) -> None:
        """Nobody has a window."""

    def reached(self) -> None:
        """Nobody opens a pass."""


NOBODY = Nobody()
