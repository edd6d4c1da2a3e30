"""The benches still run: they look into the engine, which changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("own_ranks")

BENCHES = Path(__file__).parents[2] / "benches" / "py"


def test_the_border_bench_runs() -> None:
    command = [sys.executable, str(BENCHES / "border.py"), "--params", "40", "--rounds", "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert "engine sentinels" in done.stdout, done.stderr


def test_the_step_time_bench_races_stages() -> None:
    chosen = [f"--only=zerort stage {stage}" for stage in ("2", "3, a third")]
    command = [sys.executable, str(BENCHES / "step_time.py"), "--workload=small"]
    done = subprocess.run(
        [*command, *chosen, "--rounds=1", "--steps=1"],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("zerort stage") == 2, done.stdout
