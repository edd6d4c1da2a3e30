"""Whether a step waits for the other ranks' updated parameters, or the next forward does.

`"zerort": {"publish": "auto"}` measures a few steps that wait: where what they waited is a part of
a step that is worth it, later ones do not. The ranks come to one answer, once. From then on a step
waits all the same while something else has views of a parameter: an alias would read half of the
new values, and no guard sees it.

What it guarantees: ranks that answer differently still send alike, because only waiting depends on
the answer. What it does not do: with "overlapped" it looks for no alias.
"""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch

from zerort.memory import FlatModel, Resident
from zerort.mesh import Mesh

__all__ = ["WISHES", "Overlap", "Threshold", "Wish", "threshold"]

_log = logging.getLogger("zerort")

_WARM_UP = 2
"""Steps in which memory is touched, and launches are reordered."""
_OBSERVED = 3
_SHARE = 0.03
"""Of a step: what waiting has to cost."""
_LEAST = 1e-3
"""Seconds: and at least that, for a guard costs something too."""

Wish: TypeAlias = Literal["auto", "overlapped", "step"]
WISHES: tuple[Wish, ...] = get_args(Wish)


class Threshold(NamedTuple):
    """What waiting within a step has to cost, for the next forward to wait instead."""

    seconds: float
    share: float
    """Of the step."""


def threshold(wish: Wish, *, timed: bool) -> Threshold | None:
    """By the configuration, where the host's clock says what waiting costs if it is `timed`; None
    is never.
    """
    if wish == "auto":
        return Threshold(_LEAST, _SHARE) if timed else None
    return Threshold(0.0, 0.0) if wish == "overlapped" else None


class Overlap:
    """Of one engine over `flat`; `able` says whether it has anything to publish, and whether its
    host's clock says how long that takes.
    """

    def __init__(
        self,
        wish: Wish,
        flat: FlatModel,
        mesh: Mesh,
        *,
        able: bool,
        timed: bool,
    ) -> None:
        self._flat = flat
        self._mesh = mesh
        self._threshold = threshold(wish, timed=timed) if able else None
        self._measures = self._threshold is not None and wish == "auto"
        self._looks = wish == "auto"
        self._overlaps = able and wish == "overlapped"
        self._ended = perf_counter()
        self._updates = 0
        """Equal on all ranks, whatever is raised behind an update."""
        self._seen: list[tuple[float, float]] = []
        """Seconds that each step so far has waited, and taken."""
        self._said = False

    @property
    def threshold(self) -> Threshold | None:
        """By which a run of this configuration would answer; None where steps wait whatever it
        costs. Ranks may differ, as one may have views of a parameter.
        """
        if self._looks and self._threshold is not None and self._aliased() is not None:
            return None
        return self._threshold

    @property
    def is_decided(self) -> bool:
        """Whether there is nothing more to measure."""
        return not self._measures

    def agree(self) -> None:
        """All ranks, before an update that is applied: comes to an answer when enough is known."""
        self._updates += self._measures
        if not self._measures or self._updates <= _WARM_UP + _OBSERVED:
            return
        self._measures = False
        observed = self._seen[-_OBSERVED:] or [(0.0, 1.0)]  # what raised has seen nothing
        waited, taken = (min(column) for column in zip(*observed, strict=True))
        sums = torch.tensor([waited, taken], dtype=torch.float64)
        self._mesh.control.all_reduce(sums)
        waited, taken = (sums / self._mesh.control.world).tolist()
        assert self._threshold is not None
        least, share = self._threshold
        self._overlaps = waited >= least and waited >= share * taken
        if self._mesh.rank == 0:
            _log.info(
                "a step of %.1f ms waits %.1f ms for updated parameters, %s",
                1000 * taken,
                1000 * waited,
                "which from now on arrive beside the next forward"
                if self._overlaps
                else "too little to have them arrive beside the next forward",
            )

    def decide(self) -> bool:
        """Whether the update that comes now is waited for by who needs it."""
        if not self._overlaps or not self._looks:
            return self._overlaps
        name = self._aliased()
        if name is None:
            return True
        if not self._said:
            self._said = True
            _log.info(
                "rank %d: something else has a view of parameter %s, so steps wait for updated "
                'parameters while that lasts ("zerort": {"publish": "overlapped"} does not look)',
                self._mesh.rank,
                name,
            )
        return False

    def published(self, waited: float) -> None:
        """An update has been sent, and the step has waited so many seconds for it."""
        if self._measures:
            now = perf_counter()
            self._seen.append((waited, now - self._ended))
            self._ended = now

    def _aliased(self) -> str | None:
        for bucket in self._flat.trained:
            if isinstance(bucket.values, Resident):
                found = bucket.values.aliased()
                if found:
                    return bucket.names[found[0]]
        return None
