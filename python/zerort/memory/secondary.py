"""A copy of what an all-gather between hosts has brought of a bucket's sharded parameters: this
rank's part of all that its host needs (ZeRO++'s secondary partition).

With it, the same values can be gathered again inside the host alone. What it guarantees: memory is
there from `keep` to `release`, and `restore` writes what was there at `keep`. What it does not do:
it does not know whether that is still what the ranks keep (`run.secondary`).
"""

from __future__ import annotations

import torch

from zerort.memory.values import Freeable, Resident

__all__ = ["Secondary"]


class Secondary:
    """Of one bucket's `values`: `numel` elements from `start` on."""

    __slots__ = ("_numel", "_start", "_tensor", "_values")

    def __init__(self, values: Resident | Freeable, start: int, numel: int) -> None:
        self._values, self._start, self._numel = values, start, numel
        self._tensor: torch.Tensor | None = None
        self._make_room()

    @property
    def nbytes(self) -> int:
        """That it takes now."""
        return 0 if self._tensor is None else self._tensor.nbytes

    @property
    def nothing(self) -> torch.Tensor:
        """Of its place, no element (0,)."""
        return self._values.landing.narrow(0, 0, 0)

    @torch.no_grad()
    def keep(self) -> None:
        """Copies what has come."""
        self._make_room().copy_(self._place())

    @torch.no_grad()
    def restore(self) -> None:
        """Copies it to where it is gathered, behind `HeldBucket.bring`. Something was kept."""
        assert self._tensor is not None, "nothing was kept"
        self._place().copy_(self._tensor)

    def release(self) -> None:
        """Gives the memory back, until the next `keep`."""
        self._tensor = None

    def _make_room(self) -> torch.Tensor:
        if self._tensor is None:
            like = self._values.tensor
            self._tensor = torch.zeros(self._numel, dtype=like.dtype, device=like.device)
        return self._tensor

    def _place(self) -> torch.Tensor:
        return self._values.landing.narrow(0, self._start, self._numel)
