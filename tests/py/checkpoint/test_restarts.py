"""The example under torchrun: a rank is killed and all start anew, a host goes for good and the
rest go on without it. Neither needs a hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "train_text.py"
SMALL = Path(__file__).parents[1] / "small_example.py"
STEPS, SAVED = 20, 2
pytestmark = [pytest.mark.timeout(150), pytest.mark.usefixtures("own_ranks")]

TORCHRUN = """
import os, sys, time
from torch.distributed.run import main
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
main(sys.argv[2:])
"""


class Agent:
    """A torchrun that runs the example, in a session of its own: what a host would run.

    It waits for the file `go`, with all that it needs imported, before it looks for the others.
    """

    def __init__(self, folder: Path, *options: str, go: Path | None = None) -> None:
        example = [
            str(SMALL),
            f"--steps={STEPS}",
            f"--save_every={SAVED}",
            f"--text={folder / 'text'}",
            f"--config={folder / 'config.json'}",
            f"--checkpoints={folder / 'saved'}",
            "--resume",
        ]
        torchrun = [sys.executable, "-c", TORCHRUN, str(go or EXAMPLE)]
        self.process = subprocess.Popen(
            [*torchrun, "--max-restarts=3", *options, *example],
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "STAND": "5"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def steps(self) -> Iterator[tuple[int, bool]]:
        """Of rank 0's lines, as they come: the step, and whether it is one resumed at."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(rf"resumed at step (\d+)|^step +(\d+)/{STEPS} ", line)
            if found:
                yield int(found[1] or found[2]), found[1] is not None

    def ranks(self) -> list[int]:
        """Process ids of the ranks that this agent runs now, by local rank."""
        return sorted(children(self.process.pid))

    def lose(self) -> None:
        """The host is gone: the agent and its ranks, at one blow."""
        for process in (self.process.pid, *self.ranks()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.lose()
        self.process.communicate()


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in listed.split()]


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = json.loads(EXAMPLE.with_suffix(".json").read_text())
    config["zerort"]["trace"] = {}
    (tmp_path / "text").write_bytes(b"def f(x):\n    return x + 1\n" * 4000)
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "train_micro_batch_size_per_gpu": 1})
    )
    return tmp_path


def check(seen: Sequence[tuple[int, bool]], begun: int) -> None:
    """The run went on from a checkpoint at or behind step `begun`, once, and to its end."""
    resumed = [step for step, again in seen if again]
    assert len(resumed) == 1 and resumed[0] >= begun and resumed[0] % SAVED == 0
    assert seen[-1] == (STEPS, False)


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(folder: Path) -> None:
    with Agent(folder, "--standalone", "--nproc_per_node=2") as agent:
        seen = []
        for step, resumed in agent.steps():
            seen.append((step, resumed))
            if seen == [(SAVED, False), (2 * SAVED, False)]:  # the checkpoint before is complete
                os.kill(agent.ranks()[1], signal.SIGKILL)
        assert agent.process.wait(30) == 0
    check(seen, SAVED)


@pytest.mark.slow
def test_a_host_that_is_gone_for_good_is_done_without(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--nnodes=1:2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2",
    ]
    go = folder / "go"
    with Agent(folder, *options) as host, Agent(folder, *options, go=go) as other:
        while not listens(port):  # the agent that comes first has the store
            time.sleep(0.05)
        go.touch()
        seen = []
        for step, resumed in host.steps():
            seen.append((step, resumed))
            if seen == [(SAVED, False), (2 * SAVED, False)]:
                other.lose()
        assert host.process.wait(30) == 0
    check(seen, SAVED)
