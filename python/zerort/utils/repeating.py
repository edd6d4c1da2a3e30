"""A loader that begins anew where it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["RepeatingLoader"]

T = TypeVar("T")


class RepeatingLoader(Generic[T]):
    """Batches of `loader` without end, one epoch behind the other. Mirrors
    deepspeed.utils.RepeatingLoader.

    It is an iterator of one run through: `iter` goes on where it is. A loader that gives no batch
    at all raises `StopIteration`.
    """

    def __init__(self, loader: Iterable[T]) -> None:
        self.loader = loader
        self.data_iter = iter(loader)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
        return next(self.data_iter)
