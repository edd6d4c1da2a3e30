"""What a writer takes of a processor: a share where others want it, all of it where nobody does."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from zerort import platforms
from zerort.checkpoint import pace
from zerort.checkpoint.pace import SHARE, Pace

PIECE = 0.004
"""Seconds of processor time that a piece of work takes."""


class Machine:
    """One processor, of whose time others want `wanted` seconds for each that the thread takes."""

    def __init__(self, wanted: float | None) -> None:
        self.wanted = wanted
        self.worked = self.rested = 0.0
        self.hurried = False

    def work(self, made: Pace, seconds: float) -> None:
        end = self.worked + seconds
        while self.worked < end:
            self.worked += PIECE
            made.rest()

    def waited(self) -> float | None:
        return None if self.wanted is None else self.wanted * self.worked

    def wait(self, seconds: float) -> bool:
        if not self.hurried:
            self.rested += seconds
        return self.hurried

    def set(self) -> None:
        self.hurried = True


def on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Pace:
    monkeypatch.setattr(pace, "HERE", SimpleNamespace(waited_for_processor=machine.waited))
    monkeypatch.setattr(time, "thread_time", lambda: machine.worked)
    return Pace(machine)  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", [1.0, 0.5, None])
def test_work_takes_its_share_of_a_processor_that_others_want(
    wanted: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(wanted)
    machine.work(on(machine, monkeypatch), 2.0)
    assert machine.worked / (machine.worked + machine.rested) == pytest.approx(SHARE, rel=0.05)


def test_work_never_rests_on_a_processor_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0.01)
    machine.work(on(machine, monkeypatch), 2.0)
    assert machine.rested == 0.0


def test_work_rests_no_more_once_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0)
    made = on(machine, monkeypatch)
    machine.work(made, 0.5)
    before = machine.rested
    made.hurry()
    machine.work(made, 0.5)
    assert machine.rested == before > 0.0


def test_nobody_rests_while_the_interpreter_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0)
    ended = SimpleNamespace(is_alive=lambda: False)
    monkeypatch.setattr(threading, "main_thread", lambda: ended)
    machine.work(on(machine, monkeypatch), 0.5)
    assert machine.rested == 0.0


def test_a_thread_has_waited_as_the_scheduler_says(tmp_path: Path) -> None:
    made = platforms.Linux(tmp_path)
    assert made.waited_for_processor() is None
    row = tmp_path / "proc" / "thread-self" / "schedstat"
    row.parent.mkdir(parents=True)
    row.write_text("5000000000 2500000000 17\n")
    assert made.waited_for_processor() == 2.5
    row.write_text("0 0 0\n")  # a kernel that does not count
    assert made.waited_for_processor() is None
    assert platforms.Plain().waited_for_processor() is None
