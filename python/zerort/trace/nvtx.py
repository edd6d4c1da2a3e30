"""The sink that marks ranges on a device's own timeline, as `zerort.<name>`.

Like torch's profiler's ranges (`ProfilerSink`) they are always there, because a profiler may be
attached at any time. A range ends when its block does, also by an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from zerort.trace.sink import SinkAround, TraceSink

__all__ = ["NvtxSink", "marked"]


class NvtxSink(SinkAround):
    """Makes `inner`'s ranges ranges of the device's too; `push` and `pop` are its own."""

    def __init__(
        self, inner: TraceSink, push: Callable[[str], object], pop: Callable[[], object]
    ) -> None:
        super().__init__(inner)
        self._push = push
        self._pop = pop

    def range(self, name: str) -> AbstractContextManager[None]:
        """A range of `inner`, on the device's timeline too."""
        return marked(f"zerort.{name}", self._push, self._pop, super().range(name))


@contextmanager
def marked(
    name: str,
    push: Callable[[str], object],
    pop: Callable[[], object],
    shown: AbstractContextManager[None] = nullcontext(),  # noqa: B008
) -> Iterator[None]:
    """`shown`, within a range of the device's."""
    push(name)
    try:
        with shown:
            yield
    finally:
        pop()
