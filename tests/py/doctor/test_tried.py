"""`zerort doctor` with ranks: two of its own, and those of a job. It ends, whatever they do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

import ranks
from zerort.doctor.collectives import clocks, tried
from zerort.doctor.finding import Level, Machine
from zerort.doctor.job import gathered
from zerort.doctor.pair import self_test
from zerort.mesh import connect

pytestmark = pytest.mark.usefixtures("own_ranks")

NAMES = ["reduce-scatter", "all-gather", "all-to-all", "broadcast", "vote"]


def started(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_two_ranks_of_its_own_try_every_collective() -> None:
    found = list(self_test(Machine(), 100))
    assert [(one.check, one.level) for one in found] == [(name, Level.OK) for name in NAMES]
    assert "GB/s" in found[0].text and found[-1].text.endswith("us, 2 ranks on cpu")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import sys; sys.exit('no route' if sys.argv[1] == '1' else 0)", "rank 1 .*: no route"),
        ("raise OSError('gone')", "rank [01] .*: OSError: gone"),
        ("import time; time.sleep(60)", "did not come to an end within 1 s"),
        ("import os; os.abort()", "ended by signal 6"),
    ],
)
def test_ranks_that_fail_or_hang_are_a_problem_and_are_gone(
    script: str, said: str, tmp_path: Path
) -> None:
    note = f"import os; open(r'{tmp_path}/' + str(os.getpid()), 'w').close(); {script}"
    begun = time.monotonic()
    (found,) = self_test(Machine(), 1, started(note))
    assert found.level is Level.PROBLEM and found.remedy
    assert re.search(said, found.text)
    assert time.monotonic() - begun < 30
    for pid in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.name), 0)


def wrong_and_late(rank: int, world: int) -> tuple[list[tuple[str, str]], str, list[str]]:
    """On rank 1 the gathered values are wrong and the clock is ahead."""
    from zerort.doctor import collectives

    mesh = connect(timedelta(seconds=30))
    right = collectives._in_order
    if rank == 1:
        collectives._in_order = lambda comm, buffer: False
    try:
        found = [(one.level.value, one.text) for one in tried(mesh)]
    finally:
        collectives._in_order = right
    (late,) = clocks(mesh, lambda: time.time() + 5 * rank)
    versions = [collectives.ok("torch", f"2.{rank}, built somewhere")]
    alike = [one.level.value for one in gathered(mesh, versions, ["torch"])]
    mesh.close()
    return found, f"{late.level.value}: {late.text}", alike


def test_a_wrong_result_a_clock_and_a_version_name_their_rank() -> None:
    for found, late, alike in ranks.shared(2, wrong_and_late):
        assert [level for level, _ in found] == ["ok", "problem", "problem", "ok", "ok"]
        assert found[1][1] == "a wrong result on rank 1"
        assert re.match(r"problem: at most [45]\d{3}\.\d ms apart \(rank 1", late), late
        assert alike == ["ok", "problem"]


@pytest.mark.slow
def test_under_torchrun_rank_0_says_it_once_and_names_the_rank() -> None:
    """Rank 1's limit of open files is its own."""
    script = (
        "import os, resource, sys; rank = os.environ['RANK'];"
        "rank == '1' and resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200));"
        "from zerort.doctor.commands import doctor_parser; from zerort.terminal import execute;"
        "sys.exit(execute(doctor_parser(), ['--json', '--quick']))"
    )
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*line, "--no-python", *started(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["ranks"] == 2
    (wrong,) = [one for one in found["findings"] if one["level"] == "problem"]
    assert wrong["check"] == "ulimit -n" and wrong["text"].startswith("rank 1: 200 open files")
