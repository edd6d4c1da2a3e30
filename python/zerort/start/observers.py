"""Who watches a run: where its events go, what times its ranges, and what is told of each bucket.

What it guarantees: the run is the same with all of them as with none, for what an observer raises
is contained, and its own. Who is not asked for is not made, and costs nothing. What it does not do:
it starts no collective, and marks no event itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from zerort.config import Config
from zerort.device import device_for
from zerort.device.markers import markers_of
from zerort.memory import FlatModel
from zerort.mesh import Mesh
from zerort.trace import TraceSink, open_sink
from zerort.trace.breakdown import BreakdownSink, RangeTimes
from zerort.trace.communication import CommunicationWatch
from zerort.trace.contained import ContainedSink, ContainedWatch
from zerort.trace.nvtx import NvtxSink
from zerort.trace.watch import BucketWatch, Unwatched, Watch, Watches

__all__ = ["Observers"]


@dataclass(frozen=True)
class Observers:
    """Of one engine, on one rank."""

    sink: TraceSink
    """Where events go."""
    times: RangeTimes | None
    """Where the sink's ranges are timed, if they are."""
    communication: CommunicationWatch | None
    """What is told of each collective, where a summary is wanted."""

    @classmethod
    def of(cls, settings: Config, mesh: Mesh) -> Observers:
        """Those that `settings` ask for. Raises `ConfigError` where a trace cannot be written."""
        times = RangeTimes() if settings.breaks_down else None
        communication = _communication(settings, mesh)
        return cls(_sink(settings, mesh, times), times, communication)

    def watch(self, flat: FlatModel) -> Watch:
        """What the buckets of `flat` are watched by."""
        watches: list[Watch] = []
        if self.sink.enabled:
            watches.append(ContainedWatch(BucketWatch(self.sink, flat.names)))
        if self.communication is not None:
            watches.append(ContainedWatch(self.communication))
        if len(watches) > 1:
            return Watches(watches)
        return watches[0] if watches else Unwatched()


def _sink(settings: Config, mesh: Mesh, times: RangeTimes | None) -> TraceSink:
    wanted = settings.zerort.trace
    sink = open_sink(
        wanted.path if wanted.enabled else None,
        rank=mesh.rank,
        world=mesh.world,
        capacity=wanted.capacity,
    )
    device = device_for(mesh.device)
    if sink.enabled and not device.blocks:
        sink.on_device(device.moment)
    markers = markers_of(mesh.device)
    if markers is not None:
        sink = NvtxSink(sink, markers.push, markers.pop)
    if times is not None:
        sink = BreakdownSink(sink, times, logs=mesh.rank == 0)
    return ContainedSink(sink)


def _communication(settings: Config, mesh: Mesh) -> CommunicationWatch | None:
    wanted, device = settings.comms_logger, device_for(mesh.device)
    if not wanted.enabled:
        return None
    return CommunicationWatch(
        mesh.shard.world,
        None if wanted.prof_all else wanted.prof_ops,
        None if device.blocks else device.moment,
        verbose=wanted.verbose and mesh.rank == 0,
    )
