"""What is done with a bucket in flight: a Launch starts its first collective, a Retire takes its
result and starts the next.

Where a bucket has a second collective, that need not wait for its Retire, which may stand behind
the last Launch of the list: `follow_up` starts it once the first is complete. Buckets are followed
up in the order of their launches, which is that of their Retires (SCH-4), so that second
collectives start in one order on all ranks, however early each rank starts them. They are on groups
of their own, and so may start at another place among the first ones than on another rank.

What it guarantees: each has its effect once, whatever raises between two lines, so that one that
was broken off is run again; in a pass that is lost zeros are sent and nothing is taken. What it
does not do: it knows no list, and it does not know when its turn is.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self._followed: Sequence[Inflight] = ()
        self._next = 0

    def load(self, flights: Sequence[Inflight]) -> None:
        """What is in a list, in the order of its launches."""
        # On an accelerator a Retire waits on a stream, and stands where the window wants it; and
        # there both collectives are on one group, in the order of the list.
        several = [flight for flight in flights if len(flight.hops) > 1]
        self._followed = several if self._blocks else ()
        self._next = 0

    def begin(self) -> None:
        """A pass begins."""
        self._next = 0

    def follow_up(self) -> None:
        """Starts second hops whose first is complete; waits for nothing."""
        while self._next < len(self._followed):
            flight = self._followed[self._next]
            hop, work = flight.state
            if hop < 0 or work is None:
                return  # not launched yet, or broken off between its two hops
            if hop == 0:
                if not work.is_completed():
                    return
                self.retire(flight)
            self._next += 1

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
            self.proceed(flight)

    def proceed(self, flight: Inflight) -> None:
        """Completes the hop that a bucket is at, which is not the first, and starts the next."""
        self._follow(flight)
        self._complete(flight)
        if flight.state is not OVER:
            self._follow(flight)

    def _follow(self, flight: Inflight) -> None:
        """Starts a hop that follows the first, unless that has been done."""
        fresh = flight.state.work is None
        with self._streams.summing(flight.lane):
            flight.start()
        if fresh:
            self._waits.started(flight)

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
