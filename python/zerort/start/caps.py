"""How long a bucket may become, and why.

The file says it, or it follows from what is trained, by whom and at which stage; then the core says
it. Nothing that only one rank knows has a part in it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zerort import _core
from zerort.config import Config

__all__ = ["Cap", "log_cap"]

_log = logging.getLogger("zerort")

_REASONS: Mapping[_core._Bound, str] = {
    "share": "a tenth of the trained parameters",
    "least": "the least, for a small model",
    "message": "128 KiB for each rank",
    "most": "the most, for a large model or many ranks",
    "unit": "as much as a unit",
}


@dataclass(frozen=True)
class Cap:
    """Upper bound of a bucket, in bytes or in elements."""

    nbytes: int | None
    elements: int | None = None
    """Given exactly where bytes are not."""
    reason: str | None = None
    """In words; None where the file has said how long."""

    @classmethod
    def of(
        cls,
        settings: Config,
        params: Sequence[tuple[int, _core._Dtype, int | None, int]],
        world: int,
        stage: int | None = None,
    ) -> Cap:
        """Of parameters as the core has them, at the settings' stage where no other is said."""
        if settings.cap_bytes is not None or settings.cap_elements is not None:
            return cls(settings.cap_bytes, settings.cap_elements)
        at = settings.zero_optimization.stage if stage is None else stage
        nbytes, bound = _core.default_bucket_bytes(params, world=world, stage=at)
        return cls(nbytes, reason=_REASONS[bound])

    def numel(self, itemsize: int) -> int:
        """In elements of so many bytes, at least 1."""
        return max(1, (self.nbytes or 0) // itemsize if self.elements is None else self.elements)


def log_cap(cap: Cap, world: int) -> None:
    """How long buckets may become, where only the model says it and ranks reduce them."""
    if cap.reason is not None and world > 1:
        _log.info(
            "buckets have at most %d bytes, %s; zerort.bucket_bytes says another size",
            cap.nbytes,
            cap.reason,
        )
