"""What is said of peers after a failure: what can be known, and never of a live one that it is
dead.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from zerort.mesh import board as boards
from zerort.mesh import process as processes
from zerort.mesh.board import Board, Unanswered
from zerort.mesh.peers import Peer, Peers
from zerort.mesh.process import Process, this_process

pytestmark = pytest.mark.timeout(30)
WHAT, GONE = "reduce_scatter of bucket 3", 999_999_999  # no system gives such an id


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerort.mesh.peers.PATIENCE", 0.3)


def peers_of(*processes: Process, board: Board | None, rank: int = 0) -> Peers:
    everyone = {rank: Peer(process, f"words of {rank}") for rank, process in enumerate(processes)}
    return Peers(everyone, rank, "engine", board)


def board_with(*posts: str, **words: str) -> Board:
    board = Board(dist.HashStore())
    for entry in posts:
        board.post("zerort/engine", entry, 1.0)
    for rank, said in words.items():
        board.leave(f"words of {rank.removeprefix('rank_')}", said, 1.0)
    return board


@contextmanager
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        try:
            yield process
        finally:
            process.kill()


def as_process(pid: int) -> Process:
    fields = processes._stat(pid)
    return replace(this_process(), pid=pid, began=None if fields is None else int(fields[19]))


ELSEWHERE = replace(this_process(), host="host1", pid=GONE)
CONTAINER = replace(this_process(), place="another namespace of ids", pid=GONE)


def test_a_process_of_this_place_is_followed_from_running_to_its_end() -> None:
    with child() as other:
        process = as_process(other.pid)
        assert process.beside(this_process()) and process.fate() is None
        other.send_signal(signal.SIGSTOP)
        until(lambda: process.fate() == "is stopped")
        other.send_signal(signal.SIGKILL)
        until(lambda: process.fate() is not None and process.fate() != "is stopped")
        assert process.fate() == "was killed by SIGKILL"
        other.wait()
        assert process.fate() == "has exited"


def until(holds: object) -> None:
    while not holds():  # type: ignore[operator]
        time.sleep(0.01)


def test_a_process_whose_id_is_anothers_now_has_exited() -> None:
    assert this_process().fate() is None
    assert replace(this_process(), began=1).fate() == "has exited"


def test_without_proc_a_process_that_is_gone_is_still_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    me = this_process()
    assert (me.place, me.began, me.pid) == ("", None, os.getpid())
    assert me.fate() is None and replace(me, pid=GONE).fate() == "has exited"


def test_a_proc_of_another_namespace_of_ids_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert this_process().place == ""


@pytest.mark.parametrize(
    ("process", "name"),
    [
        (ELSEWHERE, f"rank 1 (process {GONE} on host1)"),
        (CONTAINER, f"rank 1 (process {GONE} in another container or machine named "),
    ],
    ids=["host", "container"],
)
def test_a_process_that_cannot_be_seen_from_here_is_not_called_dead(
    process: Process, name: str
) -> None:
    """No process has that id in this place, and in its own it may well run."""
    said = peers_of(this_process(), process, board=board_with()).explain(WHAT)
    assert said.startswith(name) and "cannot be reached or did not come to this point:" in said
    assert "exited" not in said and "store" not in said


def test_where_the_store_does_not_answer_either_it_says_so() -> None:
    store = Hanging()
    board = Board(store)  # type: ignore[arg-type]
    begun = time.monotonic()
    said = peers_of(this_process(), ELSEWHERE, board=board).explain(WHAT)
    assert "rank 1 (process" in said and "the job's store does not answer either" in said
    assert time.monotonic() - begun < 2
    with pytest.raises(Unanswered):
        board.find(["x"], 1.0)  # at once: it is not asked again
    assert time.monotonic() - begun < 2
    store.released.set()
    boards._let_finish()


class Hanging:
    """A store whose host hangs, until it is released."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def add(self, key: str, amount: int) -> int:
        self.released.wait(5)
        raise RuntimeError("the host has gone")

    def set(self, key: str, value: str) -> None:
        raise AssertionError("what it waits for has no number")


def test_a_rank_of_this_place_that_runs_and_does_not_wait_is_named_as_running() -> None:
    with child() as other:
        said = peers_of(this_process(), as_process(other.pid), board=board_with()).explain(WHAT)
    assert f"rank 1 (process {other.pid}) is running but did not come to this point" in said


def test_what_a_host_has_seen_of_its_ranks_is_believed_elsewhere() -> None:
    board = board_with(
        '{"rank": 2, "waits": "the vote"}', '{"fates": {"1": "was killed by SIGKILL"}}'
    )
    third = replace(ELSEWHERE, pid=GONE - 1)
    said = peers_of(this_process(), ELSEWHERE, third, board=board).explain(WHAT)
    assert said == f"rank 1 (process {GONE} on host1) was killed by SIGKILL"


def test_the_last_words_of_a_rank_on_another_host_are_printed() -> None:
    board = board_with(rank_1="ended with ValueError: 7")
    said = peers_of(this_process(), ELSEWHERE, board=board).explain(WHAT)
    assert said == f"rank 1 (process {GONE} on host1) ended with ValueError: 7"


def test_a_rank_that_ended_because_of_another_is_not_blamed() -> None:
    board = board_with(
        rank_1="ended with CommError: rank 1: ... rank 2 has exited", rank_2="ended with KeyError"
    )
    third = replace(ELSEWHERE, pid=GONE - 1)
    said = peers_of(this_process(), ELSEWHERE, third, board=board).explain(WHAT)
    assert said == f"rank 2 (process {GONE - 1} on host1) ended with KeyError"


def test_where_every_rank_waits_the_network_is_named() -> None:
    board = board_with(f'{{"rank": 1, "waits": "{WHAT}"}}')
    said = peers_of(this_process(), ELSEWHERE, board=board).explain(WHAT)
    assert said.startswith("every rank waited for it, or for another bucket: the network")


def test_a_network_so_slow_that_ranks_wait_for_different_buckets_is_named_too() -> None:
    board = board_with('{"rank": 1, "waits": "reduce_scatter of bucket 5"}')
    said = peers_of(this_process(), ELSEWHERE, board=board).explain(WHAT)
    assert "the network between them is cut, or needs longer" in said
    assert said.endswith("on host1) waited for reduce_scatter of bucket 5")


def test_what_other_groups_of_the_engine_have_found_is_not_this_ones() -> None:
    board = board_with(
        '{"rank": 7, "waits": "broadcast"}', '{"fates": {"0": "has exited", "7": "has exited"}}'
    )
    with child() as other:
        said = peers_of(this_process(), as_process(other.pid), board=board).explain(WHAT)
    assert "exited" not in said and "rank 7" not in said


def test_before_the_ranks_have_met_nobody_is_named() -> None:
    assert "before the ranks had met" in Peers([], 0, "", None).explain(WHAT)


def test_no_thread_is_in_the_store_once_something_is_known() -> None:
    with child() as other:
        peers = peers_of(this_process(), as_process(other.pid), board=board_with())
        other.kill()
        assert "SIGKILL" in peers.explain(WHAT)
    assert [t for t in threading.enumerate() if t.name.startswith("zerort")] == []


class SlowStore:
    """Answers every question, on a machine that has much to do."""

    def __init__(self) -> None:
        self._store = dist.HashStore()

    def __getattr__(self, name: str) -> Any:
        time.sleep(0.3 if name == "add" else 0)
        return getattr(self._store, name)


def test_a_store_that_is_slow_to_the_end_of_a_wait_is_not_said_to_have_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zerort.mesh.peers.PATIENCE", 1.0)
    with child() as other:
        board = Board(SlowStore())
        said = peers_of(this_process(), as_process(other.pid), board=board).explain(WHAT)
    assert "is running but did not come to this point" in said and "asked" not in said


def test_a_call_that_ctrl_c_has_left_in_the_store_is_waited_for_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = threading.Event()

    def interrupted(thread: threading.Thread, seconds: float | None = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            boards._within(1.0, lambda: (time.sleep(0.2), left.set()))
    assert not left.is_set()
    boards._let_finish()
    assert left.is_set() and not boards._asking
