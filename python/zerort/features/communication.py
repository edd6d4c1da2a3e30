"""`comms_logger`: a summary of the planned collectives, in DeepSpeed's form.

It is made of what this rank's executor has launched and taken. Nothing is asked of other ranks:
stragglers are seen in their traces.
"""

from __future__ import annotations

import math
import time
from typing import Any

from zerort.features.site import Site
from zerort.step.events import Feature
from zerort.trace.communication import CommunicationWatch, Record, bandwidths

__all__ = ["Communication"]

_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


class Communication(Feature):
    """What one engine's collectives have taken on this rank."""

    name = "comms_logger"

    def __init__(self, watch: CommunicationWatch, rank: int) -> None:
        self._watch = watch
        self._rank = rank

    @classmethod
    def open(cls, site: Site) -> Communication | None:
        """Where the configuration asks for it."""
        watch = site.parts.communication
        return None if watch is None else cls(watch, site.parts.mesh.rank)

    def summary(self) -> dict[str, Any]:
        """By operation and bytes of a message."""
        found: dict[str, dict[int, Any]] = {}
        for (operation, size), record in sorted(self._watch.records().items()):
            found.setdefault(operation, {})[size] = self._row(operation, size, record)
        metadata = {"world_size": self._watch.world, "rank": self._rank, "timestamp": time.time()}
        return {"summary": found, "straggler_analysis": None, "metadata": metadata}

    def _row(self, operation: str, size: int, record: Record) -> dict[str, Any]:
        average = record.average_ms
        whole, bus = bandwidths(operation, size, average, self._watch.world)
        return {
            "count": record.count,
            "total_latency_ms": record.total_ms,
            "avg_latency_ms": average,
            "tput_avg_gbps": whole,
            "busbw_avg_gbps": bus,
            "msg_size_bytes": size,
            "msg_size_str": _written(size),
        }


def _written(size: int) -> str:
    """Bytes with the largest unit of which there is one."""
    power = min(int(math.log(max(size, 1), 1024)), len(_UNITS) - 1)
    return f"{round(size / 1024**power, 2)} {_UNITS[power]}"
