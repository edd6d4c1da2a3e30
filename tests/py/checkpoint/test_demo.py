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
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

import small_example
from ranks import FORKS
from small_example import EXAMPLE
from zerort.trace import open_sink

pytestmark = pytest.mark.usefixtures("own_ranks")

STEPS = 20
TOLD = STEPS // 10


class Job:
    """The example on two ranks, on a text of its own, forked from a server that has imported torch.

    Rank 1 stands behind step `stand`.
    """

    def __init__(self, folder: Path, *options: str, stand: int = -1) -> None:
        arguments = [
            f"--steps={STEPS}",
            f"--save_every={TOLD}",
            f"--text={folder / 'text'}",
            f"--config={folder / 'config.json'}",
            f"--checkpoints={folder / 'saved'}",
            *options,
        ]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {
            **{"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            **{"OMP_NUM_THREADS": "1", "COLUMNS": "200", "STAND": str(stand)},
            "ZERORT_TRACE": str(folder / "trace-{rank}.json"),
        }
        self.ranks = []
        self.output, writer = FORKS.Pipe(duplex=False)
        for rank in range(2):
            rest = (arguments, writer if rank == 0 else None)
            self.ranks.append(
                FORKS.Process(target=_rank, args=({**environment, "RANK": str(rank)}, *rest))
            )
            self.ranks[-1].start()
        writer.close()

    def losses(self) -> Iterator[tuple[int, str]]:
        """(step, loss) of the lines that rank 0 prints, as they come."""
        with open(self.output.fileno(), closefd=False) as lines:
            for line in lines:
                found = re.match(rf"step +(\d+)/{STEPS}  loss ([\d.]+)", line)
                if found:
                    yield int(found[1]), found[2]

    def press_ctrl_c(self) -> None:
        """What a terminal sends to all of them."""
        for process in self.ranks:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGINT)

    def codes(self) -> list[int | None]:
        """What each rank ended with by itself; None for one that does not."""
        for process in self.ranks:
            process.join(60)
        return [process.exitcode for process in self.ranks]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()
        self.output.close()


def _rank(environment: dict[str, str], arguments: list[str], output: Connection | None) -> None:
    # A shell's background jobs, and all that they start, would ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= environment
    sys.argv = ["train_text.py", *arguments]
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null if output is None else output.fileno(), 1)
    os.dup2(null, 2)
    small_example.main()


def test_a_run_that_was_killed_and_interrupted_resumes_on_the_uninterrupted_curve(
    tmp_path: Path,
) -> None:
    config = json.loads(EXAMPLE.with_suffix(".json").read_text())
    for name in ("whole", "sharded", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_bytes(b"def f(x):\n    return x + 1\n" * 4000)
        (tmp_path / name / "config.json").write_text(
            json.dumps({**config, "train_micro_batch_size_per_gpu": 1})
        )

    with Job(tmp_path / "whole") as whole:
        expected = dict(whole.losses())
        assert list(expected) == list(range(TOLD, STEPS + 1, TOLD))
        assert whole.codes() == [0, 0]
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "2 ranks" in page and f"steps 1 to {STEPS}" in page and 'class="loss"' not in page
    with Job(tmp_path / "sharded", "--stage=3") as sharded:
        found = {step: float(loss) for step, loss in sharded.losses()}
        assert found == {
            step: pytest.approx(float(loss), abs=2e-3) for step, loss in expected.items()
        }
    with Job(tmp_path / "killed", stand=2 * TOLD + 1) as killed:
        for step, loss in killed.losses():
            assert loss == expected[step]
            if step > TOLD:  # so the checkpoint at `TOLD` is complete
                break
    begun = saved_at(tmp_path / "killed")
    with Job(tmp_path / "killed", "--resume", stand=begun + TOLD + 1) as interrupted:
        for step, loss in interrupted.losses():
            if step - begun <= TOLD:
                interrupted.press_ctrl_c()
            assert loss == expected[step] and step > begun
        assert {0, None}.isdisjoint(interrupted.codes())
    begun = saved_at(tmp_path / "killed")
    with Job(tmp_path / "killed", "--resume") as resumed:
        rest = dict(resumed.losses())
        assert resumed.codes() == [0, 0]
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
    progress.Progress(total=1, shown=True).page([trace])
    assert capsys.readouterr().out.count("the trace holds no whole step") == 2
    assert not (tmp_path / "report.html").exists()
