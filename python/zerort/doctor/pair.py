"""Two ranks of their own on this host, which try the collectives on each other.

They meet by a file, so no port is taken, and end within a time-out: whatever of them still runs
then is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch

from zerort.device.gpus import GPU, gpus
from zerort.doctor.collectives import shared, tried
from zerort.doctor.finding import Finding, Level, Machine, problem
from zerort.errors import ZerortError
from zerort.mesh import Mesh, init_distributed, meet
from zerort.terminal import plain

__all__ = ["main", "self_test"]

_CHECK = "self-test"
_OF_A_JOB = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RUN_ID",
)
_POLL = 0.05
_REMEDY = (
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name what ranks use; NCCL_DEBUG=INFO says what NCCL "
    "does"
)


def self_test(
    machine: Machine, limit: float, command: Sequence[str] = (sys.executable, "-m", __name__)
) -> Iterator[Finding]:
    """What the two say, after at most `limit` seconds."""
    with tempfile.TemporaryDirectory(prefix="zerort-doctor-") as folder:
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(2):
                ranks.append(_started(machine, Path(folder), rank, limit, command))
            failed = _first_to_fail(ranks, limit)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
        yield from _said(Path(folder), failed, limit)


def _started(
    machine: Machine, folder: Path, rank: int, limit: float, command: Sequence[str]
) -> subprocess.Popen[bytes]:
    line = [*command, str(rank), str(folder), str(limit / 2)]  # its own reason comes first
    with open(folder / f"{rank}.err", "wb") as errors:
        return subprocess.Popen(
            line,
            env=_environment(machine.environ, rank),
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
        )


def _environment(given: Mapping[str, str], rank: int) -> dict[str, str]:
    """What names interfaces stays; what makes a process part of a job goes."""
    own = {name: value for name, value in given.items() if name not in _OF_A_JOB}
    own["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return own | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}


def _first_to_fail(
    ranks: Sequence[subprocess.Popen[bytes]], limit: float
) -> tuple[int, int] | None:
    """Waits until both have ended, one has failed, or the time is over. Returns which has failed,
    with its exit code: the other may fail because of it.
    """
    until = time.monotonic() + limit
    while time.monotonic() < until:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                return rank, code
        if all(code == 0 for code in codes):
            return None
        time.sleep(_POLL)
    return None


def _said(folder: Path, failed: tuple[int, int] | None, limit: float) -> Iterator[Finding]:
    answer = folder / "answer"
    if failed is not None:
        rank, code = failed
        how = f"ended by signal {-code}" if code < 0 else f"failed: {_last_line(folder, rank)}"
        yield problem(_CHECK, f"rank {rank} of two on this host {how}", _REMEDY)
    elif answer.exists():
        for row in json.loads(answer.read_text("utf-8")):
            yield Finding(**{**row, "level": Level(row["level"])})
    else:
        text = f"two ranks on this host did not come to an end within {limit:g} s"
        yield problem(_CHECK, text, f"{_REMEDY}; --timeout gives them longer")


def _last_line(folder: Path, rank: int) -> str:
    lines = (folder / f"{rank}.err").read_text("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")


def main(rank: int, folder: Path, limit: float) -> None:
    """One of the two. NCCL where each has a GPU, else gloo."""
    on_gpus = gpus.is_available() and gpus.device_count() > 1
    timeout = timedelta(seconds=limit)
    init_distributed(
        "nccl" if on_gpus else "gloo",
        timeout=timeout,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
    )
    device = torch.device(GPU, rank) if on_gpus else torch.device("cpu")
    mesh = Mesh(meet(timeout), device, timeout)
    found = plain([*tried(mesh), *shared(mesh)])
    mesh.close()
    if rank == 0:
        written = folder / "answer.part"
        written.write_text(json.dumps(found), encoding="utf-8")
        written.replace(folder / "answer")


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
    except ZerortError as error:
        sys.exit(" ".join(str(error).split()))
