"""How updated shards are brought to all ranks after a step.

What it guarantees: every bucket that the plan publishes is sent once, in the plan's order on all
ranks, whatever raises between two lines, and `finish` leaves nothing under way. Buckets that are
ready may be sent while others are still being updated. What it does not do: it does not know what
updates them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from zerort.memory import FlatBucket
from zerort.mesh import Work
from zerort.run.flight import OVER, Flight, Hop
from zerort.run.waits import Waits, contents

__all__ = ["Publication"]


class Publication:
    """Of one plan: the hops of each bucket that is published, in the order in which they start."""

    def __init__(self, buckets: Sequence[tuple[FlatBucket, Sequence[Hop]]], waits: Waits) -> None:
        self._buckets = buckets
        self._waits = waits
        self._flights: list[Flight] = []

    def start(self, ready: Collection[int]) -> None:
        """Sends what is `ready`, buckets by their number, as far as nothing before it is not."""
        for flight in self._begun():
            if flight.bucket.spec.id not in ready:
                return
            if flight.state.work is None:
                self._send(flight)

    def finish(self) -> None:
        """Sends what has not been sent, and waits for all. A second call goes on where the first
        was broken off.
        """
        for flight in self._begun():
            if flight.state is not OVER:
                self._send(flight)
        for flight in self._flights:
            while flight.state is not OVER:
                work = self._send(flight)
                with self._waits.waiting(f"{flight.hop.name} of {contents(flight.bucket)}"):
                    work.wait()
                self._waits.landed(flight)
                flight.take()
        self._flights = []

    def _begun(self) -> list[Flight]:
        if not self._flights:
            self._flights = [Flight(bucket, hops) for bucket, hops in self._buckets]
        return self._flights

    def _send(self, flight: Flight) -> Work:
        """Starts the hop that a bucket is at, unless that has been done."""
        fresh = flight.state.work is None
        work = flight.start()
        if fresh:
            self._waits.started(flight)
        return work
