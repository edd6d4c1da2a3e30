"""Processes that run tests let one group of ranks run at a time, and a test's time-out does not
count how long it waits for them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest

from ranks import FORKS
from turns import turn

LONG, SHORT = 60.0, 0.5


class Holder:
    """A process that takes a turn, says so, and keeps it until it is ended."""

    def __init__(self) -> None:
        self.pipe, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=_hold, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def has_it(self, within: float = LONG) -> bool:
        return self.pipe.poll(within)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _hold(pipe: Connection) -> None:
    with turn():
        pipe.send("")
        pipe.poll(LONG)


@pytest.fixture
def start() -> Iterator[Callable[[], Holder]]:
    started: list[Holder] = []

    def start() -> Holder:
        started.append(Holder())
        return started[-1]

    yield start
    for holder in started:
        holder.end()


def test_ranks_wait_until_those_that_run_have_ended(start: Callable[[], Holder]) -> None:
    running = start()
    assert running.has_it()
    waiting = start()
    assert not waiting.has_it(within=SHORT)
    running.end()
    assert waiting.has_it()


def test_a_turn_within_a_turn_is_the_same(start: Callable[[], Holder]) -> None:
    with turn():
        with turn():
            pass
        waiting = start()
        assert not waiting.has_it(within=SHORT)
    assert waiting.has_it()


def test_waiting_for_a_turn_does_not_count_for_the_time_out(
    start: Callable[[], Holder],
) -> None:
    running = start()
    assert running.has_it()
    threading.Timer(2.0, os.kill, (running.process.pid, signal.SIGKILL)).start()
    limit, _ = signal.setitimer(signal.ITIMER_REAL, 1.0)  # as if the test had that much left
    try:
        with turn():
            left, _ = signal.getitimer(signal.ITIMER_REAL)
    finally:
        signal.setitimer(signal.ITIMER_REAL, limit)
    assert 0.5 < left < 1.0
