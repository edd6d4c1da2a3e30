"""Where parameters lie, and that they are still there.

What it guarantees: a parameter that has left its bucket is found and named, whatever moved it. What
it does not do: it does not know which module has the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from operator import add

from torch import Tensor, nn

from zerort.errors import StepError
from zerort.memory.held import HeldBucket
from zerort.memory.registry import LEAVING

__all__ = ["Places"]


class Places:
    """Of all parameters of a model, in `buckets`."""

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[nn.Parameter],
        buckets: Sequence[HeldBucket],
    ) -> None:
        self._names, self._params, self._buckets = names, params, buckets
        self._numels = [parameter.numel() for parameter in params]
        # What has no element is in no bucket; its address is 0.
        self._homes, self._offsets = [len(buckets)] * len(params), [0] * len(params)
        for home, bucket in enumerate(buckets):
            for param, offset in zip(bucket.spec.params, bucket.spec.offsets, strict=True):
                if self._numels[param]:
                    self._homes[param] = home
                    self._offsets[param] = offset * bucket.owned.tensor.itemsize
        self._bases: list[int] = []
        self._wanted: list[int] = []

    def check(self) -> None:
        """Raises `StepError` naming the first parameter that is elsewhere, or not as long."""
        self._locate()
        with ExitStack() as stack:
            for bucket in self._buckets:
                stack.enter_context(bucket.values.unguarded())
            found = list(map(Tensor.data_ptr, self._params))
        numels = list(map(Tensor.numel, self._params))
        if found != self._wanted or numels != self._numels:
            rows = zip(self._names, found, self._wanted, numels, self._numels, strict=True)
            moved = next(row[0] for row in rows if row[1] != row[2] or row[3] != row[4])
            raise StepError(
                f"parameter {moved} has left its flat buffer since initialize: {LEAVING}"
            )

    def _locate(self) -> None:
        """As long as a bucket holds its values, nothing else can have their addresses; while it
        does not, an address is an offset.
        """
        bases = [*(bucket.values.address for bucket in self._buckets), 0]
        if bases != self._bases:
            # sharded values are elsewhere in every step, so the loop is in C
            self._bases = bases
            self._wanted = list(map(add, map(bases.__getitem__, self._homes), self._offsets))
