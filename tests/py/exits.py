"""Ranks that end as programs do: forked from a process that has imported torch, as forkservers and
notebook launchers do, they run to the end of this script, so that the interpreter is taken down.

    python exits.py FOLDER CASE...      prints, for each case, the exit codes and the seconds taken

`FOLDER/CASE-RANK` has what a rank wrote to stderr.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist

import zerort
from disks import Until
from zerort.errors import CommError

WORLD = 2
LAST = WORLD - 1  # the rank that ends before the others


class Model(torch.nn.Linear):
    """Breaks in its forward on demand."""

    breaks = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.breaks:
            raise ValueError("no such token: 50257")
        return super().forward(x)


SAVING = ("raises while it saves", "finishes while it saves")


def train(case: str, rank: int) -> None:
    """Three steps; in the second, rank `LAST` ends as `case` says."""
    torch.set_num_threads(1)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zerort": {"timeout": 20},
    }
    model = Model(8, 8)
    engine, *_ = zerort.initialize(model=model, config=config)
    if case in SAVING:
        folder = Path(os.environ["FOLDER"])
        engine._checkpoints.disk = Until(folder / f"{case}-heard")
        engine.save_checkpoint(folder / f"{case}-saved", "one", asynchronous=True)
    try:
        for step in range(3):
            if rank == LAST and step == 1:
                end(case, model)
            engine.backward(engine(torch.ones(2, 8)).square().mean())
            engine.step()
            if rank == LAST and step == 1:
                return  # with a step too few
    except CommError:
        (Path(os.environ["FOLDER"]) / f"{case}-heard").touch()
        raise


def end(case: str, model: Model) -> None:
    match case:
        case "raises":
            model.breaks = True
        case "raises while it saves":
            raise ValueError("in the middle of a save")
        case "own hook":
            sys.excepthook = lambda *_: print("the user's own hook", file=sys.stderr)
            raise KeyError("batch 7")
        case "exits":
            sys.exit(3)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "store hangs":
            os.kill(int(os.environ["STORE_HOST"]), signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGKILL)
        case "is a worker":
            raise RuntimeError("out of a process of multiprocessing")


def host_store() -> tuple[int, int]:
    """(process id, port) of a process that hosts the job's store, as torchrun's agent does."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        time.sleep(600)
    port = int(os.read(reading, 16))
    os.close(reading)
    os.close(writing)
    return pid, port


def scene(folder: Path, case: str) -> tuple[str, int] | None:
    """Forks the ranks of `case` and reports on them; in a rank, returns what it has to do."""
    host, port = host_store()
    begun, pids = time.monotonic(), []
    for rank in range(WORLD):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ |= {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                **{"TORCHELASTIC_USE_AGENT_STORE": "True", "STORE_HOST": str(host)},
                "FOLDER": str(folder),
            }
            stderr = os.open(folder / f"{case}-{rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(stderr, 2)
            return case, rank
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    found: dict[str, Any] = {"codes": codes, "seconds": time.monotonic() - begun}
    os.kill(host, signal.SIGKILL)
    os.waitpid(host, 0)
    print(json.dumps({"case": case, **found}), flush=True)
    return None


if __name__ == "__main__":
    # what the imports made is not searched in every rank that ends: it takes seconds
    gc.freeze()
    for name in sys.argv[2:]:
        role = scene(Path(sys.argv[1]), name)
        if role is None:
            continue
        if role == ("is a worker", LAST):
            worker = multiprocessing.get_context("fork").Process(target=train, args=role)
            worker.start()
            worker.join()
            sys.exit(worker.exitcode)
        train(*role)
        break
    else:
        os._exit(0)  # what this process would give back is of no interest
