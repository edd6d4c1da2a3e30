"""Collectives. The only file that imports torch.distributed.

A `Comm` carries flat buffers between ranks. What it guarantees: every call is made on groups of the
engine's own, so a collective of the user's can never pair with one of ours, and every group has the
configured time-out, so no rank waits for a peer for ever. What it deliberately does not do: it
knows no buckets, dtypes or steps, and it decides no order.

Reduction is split at the wire: a `Comm` delivers `chunks` equal pieces for this rank's shard and
the wire format sums them. gloo delivers one piece per rank (an all-to-all moves (N-1)/N of the
bytes, half of what gloo's own reduce-scatter does, and lets us sum in rank order); NCCL sums on its
way and delivers one.
"""

from __future__ import annotations

import os
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from zerort.errors import CommError, ConfigError
from zerort.mesh import peers
from zerort.mesh.peers import Peers

__all__ = ["Comm", "GlooComm", "LocalComm", "NcclComm", "Work", "connect", "init_distributed"]

# torch 2.13 renamed these and warns at every call of the old names; 2.11 has only the old ones.
# Resolved once.
_reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Work:
    """A collective under way: one or several of torch's works, none where nothing moves."""

    def __init__(self, works: Sequence[dist.Work | None] = ()) -> None:
        self._works = [work for work in works if work is not None]

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """On CPU blocks the host; on CUDA makes the current stream wait. Raises `RuntimeError` when
        it failed.
        """
        for work in self._works:
            work.wait()

    def when_complete(self, tell: Callable[[], None]) -> None:
        """Calls `tell` on the worker that completes the last of them; at once where there is
        nothing to move.
        """
        if not self._works:
            tell()
            return
        self._works[-1].get_future().add_done_callback(lambda _: tell())


class Comm(Protocol):
    """What the engine needs of a communication library.

    Buffers are 1-D and contiguous; a bucket's buffer is `world` equal shards in rank order.
    """

    rank: int
    world: int
    device: torch.device
    chunks: int
    window: int | None
    """Buckets in flight unless the configuration says otherwise; None means all."""

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """Starts moving `send` (world x n,) so that `recv` (chunks x n,) sums up to this rank's
        shard. Asynchronous.
        """

    def all_gather(self, buffer: Tensor) -> Work:
        """Starts filling `buffer` (world x n,) in place: each rank's own shard is already there.
        Asynchronous.
        """

    def all_reduce(self, values: Tensor) -> None:
        """Sums small `values` over the ranks, in place."""

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Copies `buffer` from rank `source` to all, in place."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Slow: for set-up, saving and failures."""

    def failure(self, what: str, error: Exception) -> CommError:
        """The error to raise when `what`, a collective, failed with `error`."""

    def close(self) -> None:
        """Gives the groups back."""


class LocalComm:
    """One process: the null communicator, which satisfies the same contract."""

    rank, world, chunks = 0, 1, 1
    window: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """Nothing to move: `recv` is `send`."""
        return Work()

    def all_gather(self, buffer: Tensor) -> Work:
        """Nothing to move."""
        return Work()

    def all_reduce(self, values: Tensor) -> None:
        """The sum over one rank."""

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Nothing to move."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The value itself."""
        return [value]

    def failure(self, what: str, error: Exception) -> CommError:
        """One process has no peers to name."""
        return CommError(f"{what} failed: {error}")

    def close(self) -> None:
        """Nothing to give back."""


class _TorchComm:
    """Three groups of the engine's own: gradients, parameters and control never queue behind one
    another.
    """

    backend: ClassVar[str]
    window: int | None
    chunks: int

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self._gradients, self._parameters, self._control = (
            self._new_group(timeout) for _ in range(3)
        )
        self._peers = self._meet()
        weakref.finalize(self, _let_workers_go, [self._gradients, self._parameters, self._control])

    def _meet(self) -> Peers:
        """Learns who the others are; rank 0 names the engine, so that several leave word side by
        side.
        """
        met = self.gather_objects((peers.myself(), uuid.uuid4().hex))
        # Without the job's store (a private name of torch's) words of ranks that time out cannot be
        # gathered.
        store = getattr(dist.distributed_c10d, "_get_default_store", lambda: None)()
        return Peers([peer for peer, _ in met], self.rank, met[0][1], store)

    def _new_group(self, timeout: timedelta) -> dist.ProcessGroup:
        group = dist.new_group(backend=self.backend, timeout=timeout)
        if not isinstance(group, dist.ProcessGroup):
            raise CommError("this process is not a member of torch.distributed's default group")
        return group

    def all_reduce(self, values: Tensor) -> None:
        """On the control group; blocks the host on CPU, the stream on CUDA."""
        with self._named("all_reduce"):
            dist.all_reduce(values, group=self._control)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """On the control group."""
        with self._named("broadcast"):
            dist.broadcast(buffer, source, group=self._control)

    def gather_objects(self, value: Any) -> list[Any]:
        """Pickled, on the control group."""
        values: list[Any] = [None] * self.world
        with self._named("all_gather_object"):
            dist.all_gather_object(values, value, group=self._control)
        return values

    def close(self) -> None:
        """Destroys the three groups; the job's own stays."""
        for group in (self._gradients, self._parameters, self._control):
            if dist.is_initialized():
                dist.destroy_process_group(group)

    @contextmanager
    def _named(self, operation: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise self.failure(operation, error) from error

    def failure(self, what: str, error: Exception) -> CommError:
        """The error to raise when `what`, a collective, failed with `error`."""
        if not dist.is_initialized():
            return CommError(
                f"rank {self.rank}: {what} failed because torch.distributed's process group was "
                "destroyed: call engine.destroy() first, and the process group after it"
            )
        return CommError(
            f"rank {self.rank}: {what} failed: {self._peers.told(what)}. The cause as reported: "
            f"{error}"
        )


class GlooComm(_TorchComm):
    """CPU tensors over gloo: all-to-all for reduce-scatter, one in-place broadcast per rank for
    all-gather.
    """

    backend = "gloo"
    window: int | None = None

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        super().__init__(device, timeout)
        self.chunks = self.world

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """Every rank's piece of this rank's shard, in rank order."""
        with self._named("all_to_all"):
            return Work([dist.all_to_all_single(recv, send, group=self._gradients, async_op=True)])

    def all_gather(self, buffer: Tensor) -> Work:
        """One broadcast per rank, in rank order, on its slice."""
        # gloo's all_gather stages through fresh buffers: three times the CPU time of these
        # broadcasts.
        shards = buffer.chunk(self.world)
        with self._named("broadcast"):
            return Work(
                [
                    dist.broadcast(shard, rank, group=self._parameters, async_op=True)
                    for rank, shard in enumerate(shards)
                ]
            )


class NcclComm(_TorchComm):
    """CUDA tensors over NCCL: SUM in place, all-gather in place; 1/N is folded into the sum that
    follows.
    """

    backend = "nccl"
    chunks = 1
    window: int | None = 4  # NCCL runs one after the other; more only holds memory

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Work:
        """Summed on the way; `recv` may be this rank's slice of `send`."""
        with self._named("reduce_scatter"):
            return Work([_reduce_scatter(recv, send, group=self._gradients, async_op=True)])

    def all_gather(self, buffer: Tensor) -> Work:
        """In place: this rank's slice is its contribution."""
        own = buffer.chunk(self.world)[self.rank]
        with self._named("all_gather"):
            return Work([_all_gather(buffer, own, group=self._parameters, async_op=True)])


def _let_workers_go(groups: list[dist.ProcessGroup]) -> None:
    """Drops `groups` a moment after their last use, when an engine is collected or the interpreter
    ends.

    A worker of gloo's that still holds a tensor of the last collective needs the interpreter to let
    go of it, and the group's destructor waits for the worker while it holds the interpreter: seen
    to hang for ever with torch 2.6.
    """
    time.sleep(0.02)
    groups.clear()


def init_distributed(
    dist_backend: str | None = None, *, timeout: timedelta = timedelta(minutes=5)
) -> bool:
    """Initialises torch.distributed from torchrun's environment, unless that was done or there is
    none.

    `dist_backend` is "nccl" or "gloo", by default what suits the device. Returns whether a process
    group exists afterwards. Raises `ConfigError` when RANK is set and the rest is not. Mirrors
    deepspeed.init_distributed.
    """
    if dist.is_initialized():
        return True
    if "RANK" not in os.environ:
        return False
    missing = [
        name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)
    ]
    if missing:
        raise ConfigError(
            f"RANK={os.environ['RANK']} is set but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: start the job with torchrun, or unset "
            "RANK to run one process"
        )
    if torch.cuda.is_available():
        # More ranks than GPUs share them, which NCCL allows from 2.30 on when it is told to.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    chosen = dist_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    dist.init_process_group(chosen, timeout=timeout)
    return True


def connect(timeout: timedelta, device: torch.device | None = None) -> Comm:
    """The communicator of this job: adopts torch.distributed, initialises it under torchrun, or
    runs alone.

    `device` is where the model lives when it already lives on a GPU. Raises `ConfigError` and
    `CommError`.
    """
    grouped = init_distributed(timeout=timeout)
    place = device or _default_device(grouped)
    if not grouped or dist.get_world_size() == 1:
        return LocalComm(place)
    kind: type[NcclComm] | type[GlooComm] = NcclComm if place.type == "cuda" else GlooComm
    try:
        return kind(place, timeout)
    except (RuntimeError, ValueError) as error:
        raise CommError(f"cannot make process groups on torch.distributed: {error}") from error


def _default_device(grouped: bool) -> torch.device:
    on_cpu = not torch.cuda.is_available() or (grouped and dist.get_backend() == "gloo")
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
