"""What a checkpoint holds of encoders: how far random rounding has come, and residuals where these
are asked for.

A residual is of a rank's own whole gradients, in their buckets: it fits the same number of ranks,
and the same buckets. What it does not do: no files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from torch import Tensor

from zerort.wire.contract import Encoder, Extent, Kept

__all__ = ["WireState", "restore", "state_of"]

Encoded = Iterable[tuple[Extent, Encoder]]
"""Encoders with what they encode, in the plan's order."""


@dataclass(frozen=True)
class WireState:
    """Of all encoders of a rank."""

    layout: str
    """Of what is encoded where, as a digest."""
    windows: int = 0
    residuals: Mapping[str, Tensor] = field(default_factory=dict)
    """By encoder and name."""


def state_of(encoders: Encoded) -> WireState:
    """As it is between two windows; residuals are the encoders' own memory."""
    found = [(extent, encoder.kept()) for extent, encoder in encoders]
    residuals = {
        name: tensor
        for index, (_, kept) in enumerate(found)
        for name, tensor in _named(index, kept)
    }
    windows = max((kept.windows for _, kept in found), default=0)
    return WireState(_digest([extent for extent, _ in found]), windows, residuals)


def restore(encoders: Encoded, state: WireState) -> None:
    """Goes on with a state whose residuals are as long as those of `state_of`, or that has none."""
    for index, (_, encoder) in enumerate(encoders):
        residuals = {
            name: state.residuals[key]
            for name in encoder.kept().residuals
            if (key := f"{index}.{name}") in state.residuals
        }
        encoder.restore(Kept(state.windows, residuals))


def _named(index: int, kept: Kept) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in kept.residuals.items():
        yield f"{index}.{name}", tensor


def _digest(extents: Sequence[Extent]) -> str:
    rows = [
        (e.bucket.names, list(e.bucket.spec.offsets), e.bucket.spec.wire, e.start, e.numel, e.world)
        for e in extents
    ]
    return blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()
