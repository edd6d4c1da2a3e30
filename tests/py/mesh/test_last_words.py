"""A rank that ends outside the engine's calls leaves its last words, and its peers print them; and
the interpreters of those that survive end as Python's do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from turns import turn
from zerort.checkpoint import problems

pytestmark = pytest.mark.timeout(150)
SCRIPT = Path(__file__).parents[1] / "exits.py"
SAVING = ("raises while it saves", "finishes while it saves")
CASES = ("raises", "own hook", "exits", "finishes", "killed", "is a worker", *SAVING, "store hangs")


@dataclass(frozen=True)
class Scene:
    """What became of the ranks of a case: the last is the one that ended before the others."""

    codes: list[int]
    seconds: float
    errors: list[str]
    unsaved: list[str]
    """What is wrong with the checkpoint that was being written when the last one ended."""


@cache
def scenes() -> dict[str, Scene]:
    with TemporaryDirectory() as folder, turn():
        run = subprocess.run(
            [sys.executable, "-W", "ignore", str(SCRIPT), folder, *CASES],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            text=True,
            timeout=140,
            check=True,
        )
        return {
            told["case"]: Scene(
                told["codes"],
                told["seconds"],
                [(Path(folder) / f"{told['case']}-{rank}").read_text() for rank in range(2)],
                problems(Path(folder) / f"{told['case']}-saved", "one")
                if told["case"] in SAVING
                else [],
            )
            for told in map(json.loads, run.stdout.splitlines())
        }


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("raises", "ended with ValueError: no such token: 50257 (exits.py:"),
        ("own hook", "ended with KeyError: 'batch 7' (exits.py:"),
        ("exits", "exit"),
        ("finishes", "has finished its program"),
        ("killed", "was killed by SIGKILL"),
        (SAVING[0], "ended with ValueError: in the middle of a save (exits.py:"),
        (SAVING[1], "has finished its program"),
        ("is a worker", "ended with RuntimeError: out of a process of multiprocessing"),
    ],
)
def test_peers_of_a_rank_that_has_ended_say_how(case: str, words: str) -> None:
    for error in scenes()[case].errors[:1]:
        assert "CommError" in error and "rank 1 (process" in error and words in error, error


@pytest.mark.parametrize("case", CASES)
def test_survivors_end_with_pythons_own_exit_code(case: str) -> None:
    """Not by SIGABRT, as when a thread comes back into an interpreter that is being taken down."""
    assert scenes()[case].codes[0] == 1, scenes()[case].errors


@pytest.mark.parametrize("case", SAVING)
def test_a_rank_that_has_ended_completes_what_it_was_saving(case: str) -> None:
    """Of which nothing was written before its peer had heard of its end."""
    assert scenes()[case].unsaved == []


def test_the_users_own_hook_for_exceptions_is_called() -> None:
    assert "the user's own hook" in scenes()["own hook"].errors[1]


def test_a_store_that_hangs_holds_nobody_for_long() -> None:
    scene = scenes()["store hangs"]
    assert scene.seconds - scenes()["killed"].seconds < 12
    assert all("rank 1 (process" in error for error in scene.errors[:1]), scene.errors
