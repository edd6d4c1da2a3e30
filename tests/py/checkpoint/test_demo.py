"""The example is killed, interrupted with Ctrl-C, and resumed: its loss curve is the uninterrupted
one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zerort.trace import open_sink

EXAMPLE = Path(__file__).parents[3] / "examples" / "train_text.py"
STEPS = 20  # far more than run while this test is about to stop the run
TOLD = STEPS // 10


class Job:
    """The example on two ranks, on a text of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        files = [
            f"--text={folder / 'text'}",
            f"--config={folder / 'config.json'}",
            f"--checkpoints={folder / 'saved'}",
        ]
        command = [
            sys.executable,
            str(EXAMPLE),
            f"--steps={STEPS}",
            f"--save_every={TOLD}",
            *files,
            *options,
        ]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.ranks = [
            subprocess.Popen(
                command,
                env={
                    **os.environ,
                    **{
                        "RANK": str(rank),
                        "WORLD_SIZE": "2",
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": port,
                    },
                    **{
                        "OMP_NUM_THREADS": "1",
                        "COLUMNS": "200",
                        "ZERORT_TRACE": str(folder / "trace-{rank}.json"),
                    },
                },
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(2)
        ]

    def losses(self) -> Iterator[tuple[int, str]]:
        """(step, loss) of the lines that rank 0 prints, as they come."""
        assert self.ranks[0].stdout is not None
        for line in self.ranks[0].stdout:
            found = re.match(rf"step +(\d+)/{STEPS}  loss ([\d.]+)", line)
            if found:
                yield int(found[1]), found[2]

    def press_ctrl_c(self) -> None:
        """What a terminal sends to all of them."""
        for process in self.ranks:
            process.send_signal(signal.SIGINT)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.ranks:
            process.kill()
            process.communicate()


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """Tests that a shell script runs in its background ignore Ctrl-C, and so would all that they
    start.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_run_that_was_killed_and_interrupted_resumes_on_the_uninterrupted_curve(
    tmp_path: Path,
) -> None:
    config = json.loads(EXAMPLE.with_suffix(".json").read_text())
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_bytes(b"def f(x):\n    return x + 1\n" * 4000)
        (tmp_path / name / "config.json").write_text(
            json.dumps({**config, "train_micro_batch_size_per_gpu": 1})
        )

    with Job(tmp_path / "whole") as whole:
        expected = dict(whole.losses())
        assert list(expected) == list(range(TOLD, STEPS + 1, TOLD))
    with Job(tmp_path / "killed") as killed:
        for step, loss in killed.losses():
            assert loss == expected[step]
            if step > TOLD:  # so the checkpoint at `TOLD` is complete
                break
    begun = saved_at(tmp_path / "killed")
    assert begun < STEPS, "the run was over before it was killed: this machine stood still"
    with Job(tmp_path / "killed", "--resume") as interrupted:
        for step, loss in interrupted.losses():
            if step - begun <= TOLD:
                interrupted.press_ctrl_c()
            assert loss == expected[step] and step > begun
        assert all(process.wait(60) != 0 for process in interrupted.ranks)
    begun = saved_at(tmp_path / "killed")
    with Job(tmp_path / "killed", "--resume") as resumed:
        rest = dict(resumed.losses())
        assert [process.wait(60) for process in resumed.ranks] == [0, 0]
    assert rest == {step: loss for step, loss in expected.items() if step > begun}


def saved_at(folder: Path) -> int:
    """The step of the last checkpoint."""
    tag = (folder / "saved" / "latest").read_text().splitlines()[0]
    return int(tag.removeprefix("global_step"))


def test_the_report_of_a_run_that_had_nothing_left_to_do_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    progress = importlib.import_module("progress")
    trace = tmp_path / "trace-0.json"
    open_sink(str(trace), rank=0, world=1, capacity=10).close()
    progress.Progress(total=1, shown=True).report(2.5, 2.5, "text", trace)
    assert "the trace holds no whole step" in capsys.readouterr().out
