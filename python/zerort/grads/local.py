"""What of gradients this rank alone has: what no pass has taken, and what encoders have kept.

What it guarantees: a gradient is found wherever its source lets it wait, and the remainders of
narrow wires are in units of the true gradient, whatever becomes of the loss scale. What it does
not do: it reduces nothing, and asks no other rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zerort.memory import FlatModel, unintercepted
from zerort.run.flight import Transport
from zerort.wire import Encoder, Extent, WireState, restore, state_of

__all__ = ["LocalState"]


class LocalState:
    """Over the sources and encoders of all buckets."""

    def __init__(self, flat: FlatModel, transports: Mapping[int, Transport]) -> None:
        self._flat = flat
        self.late = False
        """Whether a gradient had come behind its bucket when the last pass ended."""
        self.send_by(transports)

    def send_by(self, transports: Mapping[int, Transport]) -> None:
        """Buckets have others; nothing waits, and what encoders have kept is gone."""
        self._sources = {bucket: transport.source for bucket, transport in transports.items()}
        self._legs = [leg for transport in transports.values() for leg in transport.legs]

    @unintercepted
    def unreduced(self) -> int:
        """How many parameters hold a gradient that no pass has taken."""
        return sum(source.unreduced() for source in self._sources.values())

    @unintercepted
    def gradient(self, bucket: int, position: int) -> torch.Tensor | None:
        """A copy of what no pass has taken of the parameter at that position in the bucket; None
        where there is nothing.
        """
        return self._sources[bucket].waiting(position)

    @unintercepted
    def replace(self, bucket: int, position: int, value: torch.Tensor) -> None:
        """Writes `value`, of the parameter's shape, in its place."""
        self._sources[bucket].replace(position, value)

    @unintercepted
    def written(self) -> str | None:
        """A parameter that has got a `.grad` since the last pass ended; None where one was late."""
        pairs = zip(self._flat.names, self._flat.params, strict=True)
        found = (name for name, parameter in pairs if parameter.grad is not None)
        return None if self.late else next(found, None)

    @unintercepted
    def drop(self) -> None:
        """Forgets every gradient that no pass has taken."""
        for source in self._sources.values():
            source.drop()
        self._flat.drop_strays()

    def reset(self, *, applied: bool, growth: float) -> None:
        """The window is over: its sums are in the parameters if `applied`, else they are dropped.
        From now on gradients are `growth` times as large.
        """
        for source in self._sources.values():
            source.reset()
        for leg in self._legs:
            leg.encoder.close(applied=applied, growth=growth)

    def forget(self, kept: WireState | None = None, growth: float = 1.0) -> None:
        """Another state of the model has been loaded: nothing of the steps before it is kept. What
        that one has `kept` is taken, gradients being `growth` times as large as then.
        """
        for leg in self._legs:
            leg.encoder.forget()
        if kept is not None:
            restore(self._encoders, kept)
            for leg in self._legs:
                leg.encoder.close(applied=False, growth=growth)

    def wire_state(self) -> WireState:
        """What encoders have kept, between two windows."""
        return state_of(self._encoders)

    @property
    def _encoders(self) -> list[tuple[Extent, Encoder]]:
        return [(leg.extent, leg.encoder) for leg in self._legs]
