"""Processes that run tests let two ranks run at a time, of one group or of two, and a test's
time-out does not count how long it waits for them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import turns
from ranks import FORKS
from turns import turn

LONG, SHORT = 60.0, 0.5


class Holder:
    """A process that takes a turn, says so, and keeps it until it is ended."""

    def __init__(self, ranks: int, places: list[Path]) -> None:
        self.pipe, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=_hold, args=(theirs, ranks, places), daemon=True)
        self.process.start()
        theirs.close()

    def has_it(self, within: float = LONG) -> bool:
        return self.pipe.poll(within)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _hold(pipe: Connection, ranks: int, places: list[Path]) -> None:
    turns._PLACES[:] = _opened(places)
    with turn(ranks):
        pipe.send("")
        pipe.poll(LONG)


def _opened(places: list[Path]) -> list[int]:
    return [os.open(place, os.O_RDONLY) for place in places]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Holder]]:
    """Starts holders of places of their own: a pair of another file's tests that waits for the
    second of the real ones has the first.
    """
    started: list[Holder] = []
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.touch()
    monkeypatch.setattr(turns, "_PLACES", own := _opened(places))

    def start(ranks: int) -> Holder:
        started.append(Holder(ranks, places))
        return started[-1]

    yield start
    for holder in started:
        holder.end()
    for place in own:
        os.close(place)


@pytest.mark.parametrize(("first", "second"), [(2, 2), (2, 1), (1, 2), (4, 1)])
def test_ranks_wait_until_those_that_run_have_ended(
    start: Callable[[int], Holder], first: int, second: int
) -> None:
    running = start(first)
    assert running.has_it()
    waiting = start(second)
    assert not waiting.has_it(within=SHORT)
    running.end()
    assert waiting.has_it()


@pytest.mark.parametrize("ends", [0, 1])
def test_two_groups_of_one_rank_run_beside_each_other_and_a_pair_waits_for_both(
    start: Callable[[int], Holder], ends: int
) -> None:
    running = [start(1), start(1)]
    assert running[0].has_it() and running[1].has_it()
    pair = start(2)
    assert not pair.has_it(within=SHORT)
    running[ends].end()
    assert not pair.has_it(within=SHORT)
    running[1 - ends].end()
    assert pair.has_it()


def test_a_turn_within_a_turn_is_the_same(start: Callable[[int], Holder]) -> None:
    with turn():
        with turn():
            pass
        waiting = start(2)
        assert not waiting.has_it(within=SHORT)
    assert waiting.has_it()


def test_waiting_for_a_turn_does_not_count_for_the_time_out(
    start: Callable[[int], Holder],
) -> None:
    running = start(2)
    assert running.has_it()
    threading.Timer(2.0, os.kill, (running.process.pid, signal.SIGKILL)).start()
    limit, _ = signal.setitimer(signal.ITIMER_REAL, 1.0)  # as if the test had that much left
    try:
        with turn():
            left, _ = signal.getitimer(signal.ITIMER_REAL)
    finally:
        signal.setitimer(signal.ITIMER_REAL, limit)
    assert 0.5 < left < 1.0
