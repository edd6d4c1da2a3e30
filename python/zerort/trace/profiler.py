"""The sink in front of every other: while torch's profiler runs, it shows the ranges there under
the same names.

It is always in place, with or without a trace, because it is not known beforehand when a user will
start the profiler. While it does not run, a range costs one question more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch.autograd import profiler

from zerort.trace.sink import SinkAround

__all__ = ["ProfilerSink"]


class ProfilerSink(SinkAround):
    """Makes `inner`'s ranges `torch.profiler.record_function` blocks as well."""

    def range(self, name: str) -> AbstractContextManager[None]:
        """A range of `inner`, seen by the profiler if it runs when the range is entered."""
        shown = super().range(name)
        return _recorded(name, shown) if profiler._is_profiler_enabled else shown


@contextmanager
def _recorded(name: str, shown: AbstractContextManager[None]) -> Iterator[None]:
    with profiler.record_function(name), shown:
        yield
