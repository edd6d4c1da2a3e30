"""`zerort doctor` with ranks: two of its own, and those of a job. It ends, whatever they do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

import ranks
from zerort.doctor.collectives import clocks, shared, tried
from zerort.doctor.finding import Level, Machine
from zerort.doctor.job import gathered
from zerort.doctor.pair import self_test
from zerort.mesh import connect

pytestmark = pytest.mark.usefixtures("own_ranks")

NAMES = ["reduce-scatter", "all-gather", "all-to-all", "broadcast", "vote", "shared memory"]


def started(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_two_ranks_of_its_own_try_every_collective() -> None:
    found = list(self_test(Machine(), 100))
    assert [(one.check, one.level) for one in found] == [(name, Level.OK) for name in NAMES]
    assert "GB/s" in found[0].text and found[4].text.endswith("us, 2 ranks on cpu")
    assert found[5].text == "2 ranks share it"


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


def wrong_and_late(rank: int, world: int) -> tuple[list[tuple[str, str]], list[str]]:
    """On rank 1 the gathered values are wrong, the clock is ahead and there is no memory."""
    from zerort.doctor import collectives
    from zerort.mesh import segments

    mesh = connect(timedelta(seconds=30))
    right = collectives._in_order
    if rank == 1:
        collectives._in_order = lambda comm, buffer: False
    try:
        found = [(one.level.value, one.text) for one in tried(mesh)]
    finally:
        collectives._in_order = right
    (late,) = clocks(mesh, lambda: time.time() + 5 * rank)
    reserve = segments._reserve
    if rank == 1:
        segments._reserve = partial(_no_memory, segments.Unshared)
    try:
        (apart,) = shared(mesh)
    finally:
        segments._reserve = reserve
    versions = [collectives.ok("torch", f"2.{rank}, built somewhere")]
    alike = [one.level.value for one in gathered(mesh, versions, ["torch"])]
    mesh.close()
    found += [(one.level.value, one.text) for one in (late, apart)]
    return found, alike


def _no_memory(error: type[Exception], *_: object) -> None:
    raise error("no memory")


def test_a_wrong_result_a_clock_a_version_and_missing_memory_name_their_rank() -> None:
    for found, alike in ranks.shared(2, wrong_and_late):
        levels = ["ok", "problem", "problem", "ok", "ok", "problem", "note"]
        assert [level for level, _ in found] == levels
        assert found[1][1] == "a wrong result on rank 1"
        late, apart = found[5][1], found[6][1]
        assert re.match(r"at most [45]\d{3}\.\d ms apart \(rank 1", late), late
        assert apart == "rank 1: no memory; gradients and parameters go over gloo"
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
