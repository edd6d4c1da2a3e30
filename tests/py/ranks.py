"""Runs one function on N real processes of one gloo group, and says what every one of them was
doing when it fails.

Every run gets fresh processes, forked from a server that has imported torch already (0.2 s for two
ranks), and a fresh group on a port of its own: no run can see another's leftovers, and a rank that
hangs or dies costs only its own run.

Guaranteed: `run` returns within its time limit, a few seconds of grace aside, and leaves no process
behind. A failure carries, for each rank, the exception with its traceback, or the stack of every
thread of a rank that did not come back.

With ZERORT_TEST_DEVICE=cuda in the environment the ranks share this machine's GPUs, over NCCL from
2.30 on where there are fewer of them.

Not done here: several machines, retries.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, wraps
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

TIMEOUT = 60.0
GRACE = 5.0  # seconds that the peers of a rank that failed may take to notice
PRELOAD = [
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "pytest",
    "zerort",
]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOAD)


class RankFailure(AssertionError):
    """At least one rank raised, died or did not come back; the message has a section for each."""


@dataclass(frozen=True)
class Returned:
    """The rank came back with a value."""

    value: Any


@dataclass(frozen=True)
class Raised:
    """The rank raised: the exception's class, message and traceback."""

    kind: str
    message: str
    trace: str


@dataclass(frozen=True)
class Died:
    """The process ended without a word; negative codes are signals."""

    exitcode: int | None


@dataclass(frozen=True)
class Hung:
    """The rank was still running at the time limit: the stacks of all its threads."""

    stacks: str


Outcome = Returned | Raised | Died | Hung
T = TypeVar("T")

ON_GPU = os.environ.get("ZERORT_TEST_DEVICE") == "cuda"


def run(world: int, fn: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Calls `fn(rank, world, *args)` on `world` processes; returns their results in rank order.

    `fn` is a module-level function; arguments and results travel as pickles, tensors by value. A
    world of one has no process group. Raises `RankFailure` unless every rank returned within
    `timeout` seconds.
    """
    outcomes = attempt(world, fn, *args, timeout=timeout, grace=GRACE)
    values = [outcome.value for outcome in outcomes if isinstance(outcome, Returned)]
    if len(values) < world:
        raise RankFailure(_report(fn, timeout, outcomes))
    return values


def attempt(
    world: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = TIMEOUT,
    grace: float | None = None,
) -> list[Outcome]:
    """Like `run`, but returns what became of each rank, for tests in which a rank is meant to fail.

    With `grace`, the others get that many seconds once the first has failed; without it, the whole
    time limit.
    """
    store = (
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world > 1 else None
    )
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        crew = [
            _Member(rank, world, store.port if store else 0, Path(folder)) for rank in range(world)
        ]
        try:
            for member in crew:
                member.start(fn, args)
            _collect(crew, timeout, grace)
        finally:
            for member in crew:
                member.dismiss()
            for member in crew:
                member.stop()
    return [member.outcome or Died(member.process.exitcode) for member in crew]


def once(maxsize: int | None) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """A cache for a function that calls `run`; it keeps a `RankFailure` too, so that it is not
    tried once a test.
    """

    def keeping(fn: Callable[..., T]) -> Callable[..., T]:
        @lru_cache(maxsize)
        def found(*args: Any) -> T | RankFailure:
            try:
                return fn(*args)
            except RankFailure as failure:
                return failure

        @wraps(fn)
        def call(*args: Any) -> T:
            result = found(*args)
            if isinstance(result, RankFailure):
                raise result
            return result

        return call

    return keeping


class _Member:
    """The parent's side of one rank."""

    def __init__(self, rank: int, world: int, port: int, folder: Path) -> None:
        self.stacks = folder / f"stacks_{rank}"
        self.outcome: Outcome | None = None
        self.pipe, self._theirs = FORKS.Pipe()
        self.process: BaseProcess = FORKS.Process(
            target=_main, args=(self._theirs, rank, world, port, str(self.stacks)), daemon=True
        )

    def start(self, fn: Callable[..., Any], args: Sequence[Any]) -> None:
        self.process.start()
        self._theirs.close()
        self.pipe.send_bytes(pickle.dumps((fn, args)))

    def receive(self) -> None:
        """Takes the rank's message, or notices that it has died."""
        try:
            self.outcome = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join(GRACE)
            self.outcome = Died(self.process.exitcode)

    def dump(self) -> None:
        """Asks a rank that did not come back for its stacks, then ends it."""
        if self.process.pid is not None and self.process.is_alive():
            # A stopped process answers nothing until it is continued.
            os.kill(self.process.pid, signal.SIGUSR1)
            os.kill(self.process.pid, signal.SIGCONT)
            time.sleep(0.3)
        self.outcome = Hung(self.stacks.read_text() if self.stacks.exists() else "no stack")

    def dismiss(self) -> None:
        """Lets a rank that has returned leave."""
        if isinstance(self.outcome, Returned):
            with contextlib.suppress(OSError):
                self.pipe.send_bytes(b"leave")

    def stop(self) -> None:
        """Waits for a rank that leaves; kills any other."""
        if isinstance(self.outcome, Returned):
            self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
        if self.process.pid is not None:
            self.process.join()
        self.pipe.close()


def _collect(crew: Sequence[_Member], timeout: float, grace: float | None) -> None:
    """Waits until every rank has an outcome; at the deadline the missing ones are dumped."""
    deadline = time.monotonic() + timeout
    while missing := {member.pipe: member for member in crew if member.outcome is None}:
        ready = wait(list(missing), max(0.0, deadline - time.monotonic()))
        if not ready:
            for member in missing.values():
                member.dump()
            return
        for pipe in ready:
            missing[pipe].receive()  # type: ignore[index]
        failed = any(not isinstance(m.outcome, Returned) for m in crew if m.outcome is not None)
        if failed and grace is not None:
            deadline, grace = min(deadline, time.monotonic() + grace), None


def _main(pipe: Connection, rank: int, world: int, port: int, stacks: str) -> None:
    """The child's side: join the group, call the function, report, and stay until all others have
    reported.
    """
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        # a collection would touch, and so copy, all memory shared with the process this was forked
        # from
        gc.freeze()
        torch.set_num_threads(1)
        if ON_GPU:
            _take_gpu(rank)
        fn, args = pickle.loads(pipe.recv_bytes())
        try:
            if world > 1:
                _join(rank, world, port)
            pipe.send_bytes(pickle.dumps(Returned(fn(rank, world, *args))))
        except BaseException as error:
            pipe.send_bytes(
                pickle.dumps(Raised(type(error).__name__, str(error), traceback.format_exc()))
            )
            _leave(1)  # as a crashing job would: without a farewell to its peers
        with contextlib.suppress(EOFError, OSError):
            pipe.recv_bytes()
        _leave(
            0
            # all have reported, so nobody needs this rank: taking the group down would cost more
            # than all else
        )


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(rank: int, world: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)


def _take_gpu(rank: int) -> None:
    """Kernels that add in one order alone, so that stages can be compared to the bit."""
    os.environ |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.use_deterministic_algorithms(True, warn_only=True)


def _report(fn: Callable[..., Any], timeout: float, outcomes: Sequence[Outcome]) -> str:
    lines = [f"{fn.__name__} failed on {len(outcomes)} ranks"]
    for rank, outcome in enumerate(outcomes):
        match outcome:
            case Returned():
                lines.append(f"--- rank {rank} returned")
            case Raised(trace=trace):
                lines.append(f"--- rank {rank} raised\n{trace}")
            case Died(exitcode=code):
                lines.append(f"--- rank {rank} died with exit code {code}")
            case Hung(stacks=stacks):
                lines.append(f"--- rank {rank} did not come back (limit {timeout:g} s)\n{stacks}")
    return "\n".join(lines)
