"""Runtime events: the protocol `TraceSink` and the sinks there are."""

from __future__ import annotations

from zerort.trace.sink import MAIN, Arg, BucketLife, DeviceEvent, Mark, NullSink, TraceSink

__all__ = ["MAIN", "Arg", "BucketLife", "DeviceEvent", "Mark", "NullSink", "TraceSink"]
