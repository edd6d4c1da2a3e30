"""The benches still run: they look into the engine, which changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("own_ranks")

BENCHES = Path(__file__).parents[2] / "benches" / "py"
HOSTS = """
import os, signal, subprocess, sys
from hosts import hosts, why_not

def left():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return [name for name in listed.split() if f"-{os.getpid()}-" in name]

if (reason := why_not()) is not None:
    sys.exit(reason)
for end in (signal.SIGINT, signal.SIGTERM):
    try:
        with hosts(2, 10**9) as found:
            assert len(left()) == 3, left()
            os.kill(os.getpid(), end)
            signal.pause()
    except (KeyboardInterrupt, SystemExit):
        print("left", left())
"""


def test_the_border_bench_runs() -> None:
    command = [sys.executable, str(BENCHES / "border.py"), "--params", "40", "--rounds", "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert "engine sentinels" in done.stdout, done.stderr


def test_the_step_time_bench_races_stages() -> None:
    chosen = [f"--only=zerort stage {stage}" for stage in ("2", "3, a third")]
    command = [sys.executable, str(BENCHES / "step_time.py"), "--workload=small"]
    done = subprocess.run(
        [*command, *chosen, "--bucket-bytes=2MiB", "--rounds=1", "--steps=1"],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("zerort stage") == 4, done.stdout
    assert done.stdout.count("2MiB") == 2, done.stdout


@pytest.mark.slow
def test_the_checkpoint_bench_saves_beside_training() -> None:
    command = [sys.executable, str(BENCHES / "checkpoint.py"), "--beside=2", "--megabytes=26"]
    done = subprocess.run(
        [*command, "--rounds=1", "--batch=1"],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "stall over a synchronous save" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_step_time_bench_runs_between_hosts_and_says_what_a_step_can_be_at_best() -> None:
    hosts_or_skip()
    command = [sys.executable, str(BENCHES / "step_time.py"), "--workload=small", "--hosts=2"]
    chosen = [f"--only=zerort stage 2, publish {how}" for how in ("step", "overlapped")]
    done = subprocess.run(
        [*command, *chosen, "--rounds=1", "--steps=2"],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("zerort stage 2, publish") == 2, done.stdout
    assert "limit " in done.stdout and " publish " in done.stdout


def hosts_or_skip() -> None:
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")


def test_hosts_are_taken_down_when_they_are_interrupted() -> None:
    hosts_or_skip()
    done = subprocess.run(
        [sys.executable, "-c", HOSTS],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=BENCHES,
    )
    if done.returncode == 1 and "Traceback" not in done.stderr:
        pytest.skip(done.stderr)  # a container without the right to make them
    assert done.stdout == "left []\nleft []\n", done.stderr


@pytest.mark.slow
def test_hosts_send_their_part_of_what_they_have_summed_and_no_more(tmp_path: Path) -> None:
    hosts_or_skip()
    out = tmp_path / "found.json"
    command = [sys.executable, str(BENCHES / "hierarchy.py"), "--rounds=1", "--steps=3"]
    done = subprocess.run(
        [*command, "--width=512", f"--json={out}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )
    if done.returncode == 1 and "Traceback" not in done.stderr:
        pytest.skip(done.stderr)  # a container without the right to make them
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    # the rest is what votes, headers and acknowledgements take
    assert 1.0 <= found["auto"]["host_bytes"] / found["limit_bytes"] < 1.05
    assert found["flat"]["host_bytes"] / found["limit_bytes"] > 1.9


@pytest.mark.slow
def test_the_prediction_bench_compares_a_step() -> None:
    hosts_or_skip()
    command = [sys.executable, str(BENCHES / "predict.py"), "--rates=1000", "--hosts=2"]
    done = subprocess.run(
        [*command, "--stages=2", "--models=paced", "--rounds=1"],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stdout or "1 steps in" in done.stdout, done.stdout
