"""The arguments of init_distributed: which place they give a process, and that ranks meet there."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import zerort
from zerort.errors import ConfigError

JOB = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29400"}

PROGRAM = """
import os, sys, torch, torch.distributed as dist, zerort
rank, url, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for arguments in (
    {"init_method": url},
    {"distributed_port": port},  # beside MASTER_ADDR
):
    assert not zerort.init_distributed("gloo", dist_init_required=False, rank=rank, world_size=2)
    assert zerort.init_distributed("gloo", rank=rank, world_size=2, **arguments)
    assert zerort.init_distributed(), "there is one already"
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    assert total.item() == 3.0 and (dist.get_rank(), dist.get_world_size()) == (rank, 2)
    dist.destroy_process_group()
"""


def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in JOB:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("own_ranks")
def test_ranks_meet_at_a_url_and_at_a_port_that_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(monkeypatch, MASTER_ADDR="127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"file://{tmp_path / 'store'}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(rank), url, port],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)[-3000:]


def test_one_process_of_its_own_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch)
    assert not zerort.init_distributed()


@pytest.mark.parametrize(
    ("values", "arguments", "words"),
    [
        ({}, {"init_method": "tcp://10.0.0.7:1"}, "needs rank and world_size too"),
        ({"RANK": "0"}, {}, "RANK=0 is set but WORLD_SIZE, MASTER_ADDR are not"),
        ({}, {"rank": 0}, "RANK=0 is set but WORLD_SIZE, MASTER_ADDR are not"),
        ({"WORLD_SIZE": "2"}, {"rank": 1}, "RANK=1 is set but MASTER_ADDR is not"),
        ({}, {"rank": 1, "init_method": "tcp://10.0.0.7:1"}, "RANK=1 is set but WORLD_SIZE is not"),
    ],
)
def test_half_a_place_is_an_error(
    values: dict[str, str],
    arguments: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment(monkeypatch, **values)
    with pytest.raises(ConfigError, match=words):
        zerort.init_distributed("gloo", **arguments)
