"""Runs one function on N real processes of one gloo group, and says what every one of them was
doing when it fails.

Every run gets fresh processes, forked from a server that has imported torch already, the next run's
while this one's ranks are busy, and a fresh group on a port of its own: no run can see another's
leftovers, and a rank that hangs or dies costs only its own run. Shared calls have that in common as
long as each leaves its processes as it found them.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, lru_cache, wraps
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from leftovers import Watch
from turns import turn

TIMEOUT = 60.0
CALLS = 40  # of one crew: engines that are kept have threads, groups and descriptors
SPARE = 2  # processes that are forked before they are needed
GRACE = 5.0  # seconds that the peers of a rank that failed may take to notice
PRELOAD = [
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "pytest",
    "hypothesis",
    "zerort",
    "zerort.cli",
]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOAD)


class RankFailure(AssertionError):
    """At least one rank raised, died or did not come back; the message has a section for each."""


@dataclass(frozen=True)
class Returned:
    """The rank came back with a value; a shared one names what it has left in its process."""

    value: Any
    left: tuple[str, ...] = ()


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
    return _values(fn, timeout, attempt(world, fn, *args, timeout=timeout, grace=GRACE))


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
    crew = _Crew(world)
    try:
        return crew.call(fn, args, timeout, grace)
    finally:
        crew.end()


def shared(world: int, fn: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Like `run`, in the processes of the last shared call where that ended well and left them as
    they were (see leftovers.py), and in fresh ones else; conftest.py ends them with a file's tests.

    For a test whose ranks need no process of their own: it starts no group, kills nobody, and
    neither counts nor times what a process has.
    """
    crew = _shared.get(world)
    if crew is None or crew.calls >= CALLS:
        _end_shared(world)
        crew = _shared[world] = _Crew(world, watched=True)
    try:
        return _values(fn, timeout, crew.call(fn, args, timeout, GRACE))
    finally:
        if not crew.as_it_was:
            _end_shared(world)


def running() -> list[BaseProcess]:
    """Processes of this one that are ranks, or were and have not been waited for."""
    spare = [each.process for each in _spare]
    return [child for child in multiprocessing.active_children() if child not in spare]


def end_shared() -> None:
    """Ends the processes of shared calls."""
    for world in list(_shared):
        _end_shared(world)


def _end_shared(world: int) -> None:
    if crew := _shared.pop(world, None):
        crew.end()


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


def _values(fn: Callable[..., Any], timeout: float, outcomes: Sequence[Outcome]) -> list[Any]:
    values = [outcome.value for outcome in outcomes if isinstance(outcome, Returned)]
    if len(values) < len(outcomes):
        raise RankFailure(_report(fn, timeout, outcomes))
    return values


class _Crew:
    """The processes of one group; `watched` ones say what each call has left in them."""

    def __init__(self, world: int, watched: bool = False) -> None:
        self.calls = 0
        self._store = (
            dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            if world > 1
            else None
        )
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        port = self._store.port if self._store else 0
        folder = Path(self._folder.name)
        self._members = [
            _Member(_Place(rank, world, port, folder / f"stacks_{rank}", watched))
            for rank in range(world)
        ]

    @property
    def as_it_was(self) -> bool:
        """Whether the last call ended well and left every process as it was before."""
        return all(
            isinstance(member.outcome, Returned) and not member.outcome.left
            for member in self._members
        )

    def call(
        self, fn: Callable[..., Any], args: Sequence[Any], timeout: float, grace: float | None
    ) -> list[Outcome]:
        """What became of the function on each rank."""
        self.calls += 1
        with turn(len(self._members)):
            for member in self._members:
                member.send(fn, args)
            _fork_ahead(min(SPARE, len(self._members)))
            _collect(self._members, timeout, grace)
        return [member.outcome or Died(member.process.exitcode) for member in self._members]

    def end(self) -> None:
        """Leaves no process behind."""
        for member in self._members:
            member.dismiss()
        for member in self._members:
            member.stop()
        self._folder.cleanup()


_shared: dict[int, _Crew] = {}
"""By the number of ranks."""


class _Process:
    """A process that becomes a rank once it is told which, with the parent's end of its pipe."""

    def __init__(self) -> None:
        self.pipe, theirs = FORKS.Pipe()
        self.process: BaseProcess = FORKS.Process(target=_main, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()


_spare: list[_Process] = []


def _fork_ahead(wanted: int) -> None:
    while len(_spare) < wanted:
        _spare.append(_Process())


@dataclass(frozen=True)
class _Place:
    """What a process has to know to be a rank."""

    rank: int
    world: int
    port: int
    stacks: Path
    watched: bool


class _Member:
    """The parent's side of one rank."""

    def __init__(self, place: _Place) -> None:
        self.place = place
        self.outcome: Outcome | None = None
        self._process: _Process | None = None

    @property
    def pipe(self) -> Connection:
        assert self._process is not None, "nothing has been sent to it"
        return self._process.pipe

    @property
    def process(self) -> BaseProcess:
        assert self._process is not None, "nothing has been sent to it"
        return self._process.process

    def send(self, fn: Callable[..., Any], args: Sequence[Any]) -> None:
        """Has the rank call a function; the first call makes a process that rank."""
        if self._process is None:
            self._process = _spare.pop() if _spare else _Process()
            self.pipe.send((self.place, os.getcwd(), sys.path))
        self.outcome = None
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
        if self.process.is_alive():
            # A stopped process answers nothing until it is continued.
            os.kill(self.process.pid, signal.SIGUSR1)
            os.kill(self.process.pid, signal.SIGCONT)
            time.sleep(0.3)
        stacks = self.place.stacks
        self.outcome = Hung(stacks.read_text() if stacks.exists() else "no stack")

    def dismiss(self) -> None:
        """Lets a rank that has returned leave."""
        if isinstance(self.outcome, Returned):
            with contextlib.suppress(OSError):
                self.pipe.send_bytes(b"")

    def stop(self) -> None:
        """Waits for a rank that leaves; kills any other."""
        if self._process is None:
            return
        if isinstance(self.outcome, Returned):
            self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
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


def _main(pipe: Connection) -> None:
    """The child's side: join the group, call what is asked for and report, and stay until all
    others have reported.
    """
    # a collection would touch, and so copy, all memory shared with the process this was forked from
    gc.freeze()
    torch.set_num_threads(1)
    try:
        place, folder, sys.path[:] = pipe.recv()
    except (EOFError, OSError):
        _leave(0)
    with open(place.stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        try:
            os.chdir(folder)
            if ON_GPU:
                _take_gpu(place.rank)
            if place.world > 1:
                _join(place.rank, place.world, place.port)
            watch = Watch() if place.watched else None
            while asked := _next(pipe):
                fn, args = pickle.loads(asked)
                if watch:
                    watch.begin()
                value = fn(place.rank, place.world, *args)
                pipe.send_bytes(pickle.dumps(Returned(value, watch.left() if watch else ())))
        except BaseException as error:
            pipe.send_bytes(
                pickle.dumps(Raised(type(error).__name__, str(error), traceback.format_exc()))
            )
            _leave(1)  # as a crashing job would: without a farewell to its peers
        _leave(
            0
            # all have reported, so nobody needs this rank: taking the group down would cost more
            # than all else
        )


def _next(pipe: Connection) -> bytes:
    """What to call next; nothing once the parent needs this rank no more, or has gone."""
    try:
        return pipe.recv_bytes()
    except (EOFError, OSError):
        return b""


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(rank: int, world: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
    limit = timedelta(seconds=TIMEOUT)
    _share_device()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)


def _share_device() -> None:
    """All of this process's gloo groups use one device.

    A device has a thread that wakes a hundred times a second, idle or not. With one for each group,
    as torch makes them, the threads of engines that are kept take a third of the processors' time.
    """
    c10d = dist.distributed_c10d
    gloo = c10d.ProcessGroupGloo

    @cache
    def device(interface: str | None) -> Any:
        with _yielding_threads():
            return (
                gloo.create_device(interface=interface)
                if interface
                else gloo.create_default_device()
            )

    def create(asked: Any, _: object) -> Any:
        options = gloo._Options()
        options._devices = [device(os.environ.get("GLOO_SOCKET_IFNAME"))]
        options._timeout = asked.timeout
        options.global_ranks_in_group = asked.global_ranks_in_group
        options.group_name = asked.group_id
        return gloo(asked.store, asked.group_rank, asked.group_size, options)

    c10d.Backend._plugins["GLOO"] = c10d.Backend._BackendPlugin(create, extended_api=True)


@contextlib.contextmanager
def _yielding_threads() -> Iterator[None]:
    """A thread that is made within takes no processor from one that runs when an event wakes it.

    Who runs then often writes to a socket of a device's, and holds the lock that the device's
    thread needs to read the answer. That one would ask for the event again and again, which took a
    third of the processors' time.
    """
    before = set(_threads())
    yield
    for thread in set(_threads()) - before:
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setscheduler(int(thread), os.SCHED_BATCH, os.sched_param(0))


def _threads() -> list[str]:
    """Of this process, by their numbers; where there are no policies, none."""
    return os.listdir("/proc/self/task") if hasattr(os, "SCHED_BATCH") else []


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
