"""A pass that no backward has begun: zeros are sent, and what arrives is not taken.

A rank that has failed cannot know how many passes its peers go through before they vote. It starts
empty ones until they do; then all ranks run as many as are missing, so that each has a partner.

What it guarantees: nothing here waits, and collectives start in the schedule's order. What it does
not do: it does not know who needs it (`step.standby`).
"""

from __future__ import annotations

from collections.abc import Sequence

from zerort.device.contract import Streams
from zerort.run.flight import FIRST, OVER, Inflight

__all__ = ["EmptyPass"]


class EmptyPass:
    """Of these flights, in the order of their launches; the pass before is over, and the window
    lost, so that they send zeros.
    """

    def __init__(self, flights: Sequence[Inflight], streams: Streams) -> None:
        self._flights = flights
        self._streams = streams
        for flight in flights:
            # All are under way at a time: memory they share holds zeros, and what nobody reads.
            flight.state = FIRST
            streams.make_room(flight.lane)
            with streams.packing(flight.lane):
                flight.start()
        streams.packed()

    def advance(self) -> bool:
        """Goes on as far as it goes without waiting; returns whether it is over. Raises
        `RuntimeError` where a collective has failed.
        """
        for flight in self._flights:
            while flight.state is not OVER:
                with self._streams.summing(flight.lane):
                    work = flight.start()
                    if not work.is_completed():
                        return False
                    work.wait()
                    flight.pass_over()
        return True
