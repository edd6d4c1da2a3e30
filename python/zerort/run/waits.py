"""Where the host stands still for collectives, and what the watch hears of them.

What it guarantees: a collective that fails or times out is named; what the host has waited, and
what it has done for collectives, is counted once. What it does not do: it starts nothing and knows
no order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import nan
from time import perf_counter

from zerort.errors import CommError
from zerort.memory import HeldBucket
from zerort.mesh import Comm, Work
from zerort.run.flight import Flight
from zerort.trace.watch import Watch

__all__ = ["Busy", "Waits", "called", "contents"]


class Waits:
    """Of one engine. `blocks` says whether waiting for a collective blocks the host."""

    def __init__(self, comm: Comm, watch: Watch, *, blocks: bool) -> None:
        self.watch = watch
        self.seconds = 0.0
        """That the host has stood still, since the beginning; nan where waiting does not block
        it.
        """
        self.reducing = Busy(self)
        """With gradients: packing, starting, adding up."""
        self.publishing = Busy(self)
        """With updated parameters, behind the update."""
        self._comm = comm
        self._blocks = blocks

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Within, the caller stands still for the collective `what`, which the watch hears of.

        A collective that fails or times out raises `CommError` naming it.
        """
        mark, start = self.watch.mark(), perf_counter()
        try:
            with self.naming(what):
                yield
        finally:
            # where waiting does not block the host, only the device knows how long it stood still
            self.seconds += perf_counter() - start if self._blocks else nan
            self.watch.waited(mark, what)

    @contextmanager
    def naming(self, what: str) -> Iterator[None]:
        """Within, what fails is the collective `what`."""
        try:
            yield
        except CommError:
            raise  # it names its operation already
        except RuntimeError as error:
            raise self._comm.failure(what, error) from error

    def complete(self, work: Work, what: str) -> None:
        """Waits for a bucket's hop."""
        # On a stream of its own a wait holds up only what waits for that stream.
        with self.waiting(what) if self._blocks else self.naming(what):
            work.wait()

    def started(self, flight: Flight) -> None:
        """The collective that a flight is at has been started."""
        if self.watch.enabled and flight.state.work is not None:
            self.watch.started(called(flight), flight.hop.buffer.nbytes, flight.state.work)

    def landed(self, flight: Flight) -> None:
        """It has been waited for."""
        if self.watch.enabled:
            self.watch.landed(called(flight))


class Busy:
    """A context in which the host works for collectives; one within itself counts once."""

    __slots__ = ("_begun", "_depth", "_waits", "seconds")

    def __init__(self, waits: Waits) -> None:
        self.seconds = 0.0
        """Within it since the beginning, without what was waited; nan where waiting does not block
        the host.
        """
        self._waits = waits
        self._depth = 0
        self._begun = 0.0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._begun = perf_counter() - self._waits.seconds

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += perf_counter() - self._waits.seconds - self._begun


def called(flight: Flight) -> str:
    """The collective that a flight is at, for the watch."""
    return f"{flight.hop.name} b{flight.bucket.spec.id}"


def contents(bucket: HeldBucket) -> str:
    """A bucket as errors name it."""
    first, last = bucket.names[0], bucket.names[-1]
    return f"bucket {bucket.spec.id} ({first if first == last else f'{first} .. {last}'})"
