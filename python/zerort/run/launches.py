"""What is done with a bucket in flight: a Launch starts its first collective, a Retire takes its
result and starts the next.

What it guarantees: each has its effect once, whatever raises between two lines, so that one that
was broken off is run again; in a pass that is lost zeros are sent and nothing is taken. What it
does not do: it knows no list, and it does not know when its turn is.
"""

from __future__ import annotations

from zerort.device.contract import Streams
from zerort.run.flight import FIRST, OVER, Inflight
from zerort.run.hops import Pass
from zerort.run.waits import Waits, contents

__all__ = ["Launches"]


class Launches:
    """Of one engine; `blocks` says whether waiting for a collective blocks the host."""

    def __init__(self, streams: Streams, waits: Waits, current: Pass, *, blocks: bool) -> None:
        self._streams = streams
        self._waits = waits
        self._pass = current
        self._blocks = blocks

    def launch(self, flight: Inflight) -> None:
        """Starts a bucket's first hop, in memory that is free then."""
        before = flight.before
        if before is not None and before.state.hop > 0:
            self.finish(before)
        if flight.state is OVER:
            flight.state = FIRST
        if not self._blocks:
            with self._waits.waiting(f"room for {contents(flight.bucket)}"):
                self._streams.make_room(flight.lane)
        with self._streams.packing(flight.lane):
            flight.start()

    def retire(self, flight: Inflight) -> None:
        """Waits for the first hop and starts the second, where there is one."""
        if flight.state.hop == 0:
            self._complete(flight)
        if flight.state.hop > 0:
            self._follow(flight)

    def finish(self, flight: Inflight) -> None:
        """Makes the hops that follow the first."""
        while flight.state.hop > 0:
            self._follow(flight)
            self._complete(flight)

    def _follow(self, flight: Inflight) -> None:
        """Starts a hop that follows the first, unless that has been done."""
        with self._streams.summing(flight.lane):
            flight.start()

    def _complete(self, flight: Inflight) -> None:
        """Waits for the hop that is under way and takes its result."""
        work = flight.state.work
        with self._streams.summing(flight.lane):
            if work is not None:
                self._waits.complete(work, f"{flight.hop.name} of {contents(flight.bucket)}")
                self._waits.landed(flight)
            if self._pass.failure is None:
                flight.take()
            else:
                flight.pass_over()

    # What the watch hears, once the cursor has moved.

    def launched(self, flight: Inflight) -> None:
        """Of a Launch."""
        watch = self._waits.watch
        if watch.enabled:
            sent = flight.hop.buffer
            watch.launched(flight.bucket.spec, sent.nbytes, sent.dtype)
            self._waits.started(flight)

    def retired(self, flight: Inflight) -> None:
        """Of a Retire."""
        watch = self._waits.watch
        if watch.enabled:
            watch.retired(flight.bucket.spec)
            self._waits.started(flight)
