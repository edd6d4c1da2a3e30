"""How updated shards are brought to all ranks after a step.

What it guarantees: every bucket that the plan publishes is sent once, in one order on all ranks,
whatever raises between two lines: a `turn` that is over is not sent again. Buckets that are ready
may be sent while others are still being updated. `launch` returns when all has been sent, and
whoever needs a bucket waits for it by `land`; where that is later, a `Guard` keeps its parameters
until then. A collective that has failed is failed for good: each `land` raises, and no other turn
begins.

Nothing of it depends on when a rank comes to wait: by then each rank's last collectives have been
started. Of several hops only the last is left for later; a peer that is busy with something else
could not start the others.

What it does not do: it does not know what updates buckets, nor who needs them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from zerort.errors import CommError
from zerort.memory import FlatBucket, HeldBucket
from zerort.mesh import Work
from zerort.run.flight import OVER, Flight, Hop
from zerort.run.waits import Waits, contents

__all__ = ["UNGUARDED", "Guard", "Publication"]

Here = Callable[[], AbstractContextManager[object]]
"""Makes the stream that was the current one when it was made the current one again."""


class Guard(Protocol):
    """Who keeps others from parameters whose new values are on their way."""

    def prepare(self) -> None:
        """Before a turn that is guarded; what can fail fails here."""

    def conceal(self, bucket: HeldBucket) -> None:
        """From now on what asks for the values of the bucket's parameters has to wait for them."""

    def expose(self, bucket: HeldBucket) -> None:
        """They are there. A second call does nothing."""

    def close(self, *, waits: bool) -> None:
        """Nothing is to be kept any more. Raises `CommError` where it `waits`, and a second call
        does nothing.
        """


class _Unguarded:
    """Nobody asks before they are there."""

    def prepare(self) -> None:
        """Nothing."""

    def conceal(self, bucket: HeldBucket) -> None:
        """Nothing."""

    def expose(self, bucket: HeldBucket) -> None:
        """Nothing."""

    def close(self, *, waits: bool) -> None:
        """Nothing."""


UNGUARDED = _Unguarded()


Published = tuple[FlatBucket, Sequence[Hop]]
"""A bucket, and how its shards reach all ranks."""


class Publication:
    """Of one engine: the hops of each bucket that its plan publishes, in the order in which they
    start. `here` tells of the current stream.
    """

    def __init__(self, waits: Waits, here: Callable[[], Here] | None = None) -> None:
        self.guard: Guard = UNGUARDED
        """Who keeps others from parameters whose updates are on their way; changed between two
        turns.
        """
        self.failure: str | None = None
        """Why not all ranks have the same parameters, if a collective has failed."""
        self._buckets: Sequence[Published] = ()
        self._needed: Sequence[int] = ()
        self._waits = waits
        self._note_stream = here
        self._here: Here | None = None
        self._guarded = False
        self._turn: tuple[int, dict[int, Flight]] = (0, {})
        """Its number, and by bucket what has not landed."""
        self._unsent: deque[Flight] = deque()
        """Of these, what `start` has not sent, or may have been broken off at."""
        self._lock = threading.RLock()

    def need(self, order: Sequence[int]) -> None:
        """Parameters in the order in which forwards need them, for the next `load`; the same on all
        ranks.
        """
        self._needed = order

    def load(self, buckets: Sequence[Published]) -> None:
        """What a plan publishes from now on; nothing of the one before is under way, or anybody
        waits for it.
        """
        place = {param: index for index, param in enumerate(self._needed)}
        last = len(place)

        def first_need(published: Published) -> tuple[int, int]:
            # until more is known: buckets are planned in the order of a backward
            spec = published[0].spec
            return min(place.get(p, last) for p in spec.params), -spec.id

        self._buckets = sorted(buckets, key=first_need)
        self._turn, self.failure = (0, {}), None
        self._unsent.clear()

    @property
    def order(self) -> list[int]:
        """Numbers of the buckets, in the order in which they are sent."""
        return [bucket.spec.id for bucket, _ in self._buckets]

    @property
    def under_way(self) -> bool:
        """Whether something has not landed."""
        return bool(self._turn[1])

    def start(self, turn: int, ready: Collection[int], *, guarded: bool) -> None:
        """Sends what is `ready`, buckets by their number, as far as nothing before it is not."""
        with self._lock:
            self._begin(turn, guarded=guarded)
            while self._unsent and self._unsent[0].bucket.spec.id in ready:
                # one that was broken off is still there: none after it may overtake it
                self._send(self._unsent[0])
                self._unsent.popleft()

    def launch(self, turn: int, *, guarded: bool) -> None:
        """Sends what has not been sent; waits for all but each bucket's last hop. A second call
        goes on where the first was broken off. Where it is not `guarded`, `land` follows at once.
        """
        with self._lock, self._waits.publishing:
            self._begin(turn, guarded=guarded)
            flights = list(self._turn[1].values())
            for flight in flights:
                if flight.state is not OVER:
                    self._send(flight)
            for flight in flights:
                while flight.state is not OVER and flight.state.hop + 1 < len(flight.hops):
                    self._complete(flight)
                    self._send(flight)

    def land(self, numbers: Collection[int] | None = None) -> None:
        """Waits for the new values of these buckets, of all where None; nothing where they are
        there. Raises `CommError`, each time.
        """
        if not self._turn[1]:
            return
        with self._lock, self._waits.publishing:
            if self.failure is not None:
                raise CommError(self.failure)
            flights = self._turn[1]
            for number in list(flights) if numbers is None else numbers:
                flight = flights.get(number)
                if flight is not None:
                    while flight.state is not OVER:
                        self._send(flight)
                        self._complete(flight)
                    self.guard.expose(flight.bucket)
                    flights.pop(number, None)

    def abandon(self) -> None:
        """Nobody waits any more; what has come by now is what there is."""
        with self._lock:
            for flight in self._turn[1].values():
                self.guard.expose(flight.bucket)
            self._turn[1].clear()

    def _begin(self, turn: int, *, guarded: bool) -> None:
        """Nothing of this turn has been sent, unless it has begun."""
        if turn != self._turn[0]:
            self.land()
            self._guarded = guarded
            self._here = None if self._note_stream is None else self._note_stream()
            flights = {b.spec.id: Flight(b, hops) for b, hops in self._buckets}
            self._unsent = deque(flights.values())
            self._turn = (turn, flights)

    def _send(self, flight: Flight) -> Work:
        """Starts the hop that a bucket is at, unless that has been done."""
        fresh = flight.state.work is None
        if fresh and self._guarded:
            self.guard.conceal(flight.bucket)
        work = flight.start()
        if fresh:
            self._waits.started(flight)
        return work

    def _complete(self, flight: Flight) -> None:
        """Waits for the hop that a bucket is at, and takes its result."""
        work = self._send(flight)
        try:
            with self._waits.waiting(f"{flight.hop.name} of {contents(flight.bucket)}"):
                work.wait()
                if self._here is not None:
                    with self._here():
                        # else only what is enqueued on the stream that asked would wait
                        work.wait()
        except CommError as error:
            self.failure = str(error)
            raise
        self._waits.landed(flight)
        flight.take()
