"""The example that trains what fits on no single rank."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("own_ranks")

EXAMPLE = Path(__file__).parents[3] / "examples" / "train_large.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, str(EXAMPLE), *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"^rank \d: .*loss [\d.]+.*peak [\d.]+ GB.*$", done.stdout, re.MULTILINE)


def test_it_trains_and_each_rank_prints_its_peak_beside_the_formula() -> None:
    done = run("--width", "64", "--depth", "2", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert len(lines(done)) == 2, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts otherwise elsewhere")
def test_under_a_limit_stage_3_trains_what_stage_2_cannot_hold() -> None:
    size = ["--width", "2048", "--depth", "7", "--steps", "2", "--limit_gb", "5"]
    assert len(lines(run(*size))) == 2
    failed = run(*size, "--stage", "2")
    assert failed.returncode != 0
    assert "allocate memory" in failed.stderr
