"""Runtime events: the protocol `TraceSink`, the table of sinks, and the way to open one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from zerort.trace.chrome import ChromeSink
from zerort.trace.profiler import ProfilerSink
from zerort.trace.sink import MAIN, Arg, BucketLife, DeviceEvent, Mark, NullSink, TraceSink

__all__ = [
    "CAPACITY",
    "MAIN",
    "SINKS",
    "Arg",
    "BucketLife",
    "ChromeSink",
    "DeviceEvent",
    "Mark",
    "NullSink",
    "ProfilerSink",
    "TraceSink",
    "open_sink",
]

CAPACITY = 200_000
"""Events kept unless the configuration says otherwise: about 2000 steps at 100 each, in some 40 MB.
"""

SINKS: dict[str, Callable[[Path, int, int], TraceSink]] = {
    "chrome": ChromeSink,
    "null": lambda path, rank, capacity: NullSink(),
}
"""What can listen, by name: made from the file of this rank, the rank, and how many events to keep.
"""


def open_sink(
    path: str | None, *, rank: int, world: int, capacity: int = CAPACITY, sink: str = "chrome"
) -> TraceSink:
    """The sink of one rank. The environment's `ZERORT_TRACE` overrides `path`; without either
    nothing is kept.

    A `{rank}` in the path becomes the rank; a path without it gets `-rankR` before its suffix when
    there are several. Raises `ConfigError` when the file cannot be written.
    """
    template = os.environ.get("ZERORT_TRACE") or path
    if not template:
        return ProfilerSink(NullSink())
    return ProfilerSink(SINKS[sink](_file_of(template, rank, world), rank, capacity))


def _file_of(template: str, rank: int, world: int) -> Path:
    if "{rank}" in template:
        return Path(template.replace("{rank}", str(rank)))
    path = Path(template)
    if world == 1 or not path.name:  # a path without a name is a folder: the sink says so
        return path
    return path.with_name(f"{path.stem}-rank{rank}{path.suffix}")
