"""An accelerator on the CPU, for tests of the order that work is put into.

Its streams run later than the host: an event has not passed until the host has waited for it.
Operations give their results at once, so values are those of the CPU, and what a real device would
do is followed by vector clocks: every operation of torch's, seen by a dispatch mode, is one piece
of work on the stream that is current, and knows which work of other streams is over before it. Two
accesses to the same memory of which at least one writes, and neither of which is known to be over
before the other, are a *race*. So is memory that was freed to the stream it was allocated on, while
another stream still uses it: a caching allocator would hand it out again there.

Time passes too: each operation takes a millisecond of its stream, each collective as long as the
test says, and a wait takes a stream to the moment it waits for.

Memory that copies use on the host is another's: an operation that takes it together with the
device's is no copy and raises, a copy that does not say that it may run later makes the host wait,
and what the host itself does there is work of its own, in the order of the program, behind what it
has waited for.

Not followed: kernels of the core, which this device does not call, and copies between hosts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import zerort.device
from zerort.device import Accelerator, accelerator, host
from zerort.mesh import mesh
from zerort.mesh.gloo import GlooComm
from zerort.mesh.local import LocalComm, LocalControl

__all__ = ["Machine", "Race", "Simulated", "SimulatedAlone", "SimulatedComm", "Site", "on_stream"]

GRANULE = 64  # bytes; parameters and allocations start on such a boundary
Clock = dict[int, int]
Site = tuple[str, int]
"""File and line of a call that orders streams."""


class Race(NamedTuple):
    """Two accesses in no order: what, and on which stream."""

    earlier: str
    later: str


class Access(NamedTuple):
    """The count of a stream at an access."""

    stream: int
    count: int
    what: str


class Cell:
    """The last write and the reads since, of one granule of memory."""

    __slots__ = ("excused", "reads", "write")

    def __init__(self) -> None:
        self.write: Access | None = None
        self.reads: dict[int, Access] = {}
        self.excused: set[int] = set()

    def all(self) -> list[Access]:
        return [*([self.write] if self.write else ()), *self.reads.values()]


class Stream:
    """In the shape of torch.Stream."""

    def __init__(self, machine: Machine, name: str, device_index: int = 0) -> None:
        self.machine = machine
        self.name = name
        self.device_index = device_index
        self.stream_id = len(machine.streams)
        self.clock: Clock = {}
        self.ms = 0.0
        machine.streams.append(self)

    def wait_stream(self, other: Stream) -> None:
        if self.machine.ordered():
            self.merge(other.clock, other.ms)

    def wait_event(self, event: Event) -> None:
        if self.machine.ordered():
            self.merge(event.clock, event.ms)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.machine)
        if self.machine.ordered():
            event.record(self)
        return event

    def merge(self, clock: Clock, ms: float) -> None:
        for stream, count in clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), count)
        self.ms = max(self.ms, ms)


class Event:
    """In the shape of torch.Event."""

    def __init__(self, machine: Machine, enable_timing: bool = False) -> None:
        self.machine = machine
        self.clock: Clock = {}
        self.ms = 0.0

    def record(self, stream: Stream) -> None:
        self.clock, self.ms = dict(stream.clock), stream.ms

    def query(self) -> bool:
        return all(self.machine.host.get(s, 0) >= count for s, count in self.clock.items())

    def synchronize(self) -> None:
        if self.machine.ordered():
            self.machine.sync(self.clock)

    def elapsed_time(self, end: Event) -> float:
        assert self.query() and end.query(), "asked before the device had passed it"
        return end.ms - self.ms


class Machine(TorchDispatchMode):
    """One accelerator, its streams and its memory. Within `running`, zerort sees it for the CPU."""

    def __init__(self, dropped: Site | None = None) -> None:
        super().__init__()
        self.streams: list[Stream] = []
        self.main = self.current = Stream(self, "main")
        self.links = Stream(self, "links")
        """Where collectives run, one after the other."""
        self.cpu = Stream(self, "host")
        """What the host itself does in memory that copies use."""
        self.streams.remove(self.cpu)
        self.cpu.stream_id = -1
        self.host: Clock = self.cpu.clock
        self.syncs: list[str] = []
        self.races: list[Race] = []
        self.sites: set[Site] = set()
        self.dropped = dropped
        """A call that is left out: what it orders is in no order."""
        self.device_index = 0
        self.collective_ms = 1.0
        self._memory: dict[int, Cell] = {}
        self._hosted: set[int] = set()
        self._host_live: list[tuple[StorageWeakRef, range]] = []
        self._live: list[tuple[StorageWeakRef, Stream, range]] = []
        self._free: dict[int, list[Access]] = {}

    # What is put in torch's place.

    @contextmanager
    def running(self, comms: Simulated | None = None) -> Iterator[None]:
        """In torch.accelerator's place, as the device of CPU tensors, with these communicators."""
        comms = comms or Simulated()
        comms.several.machine = comms.alone.machine = self  # type: ignore[attr-defined]
        saved_comms = mesh.GlooComm, mesh.LocalComm
        mesh.GlooComm, mesh.LocalComm = comms  # type: ignore[misc,assignment]
        facade = Facade(self)
        device = Accelerator(torch.device("cpu", 0))
        saved = {name: getattr(accelerator, name) for name in ("torch", *facade.indices)}
        saved_host = host.torch
        variable = torch.autograd.Variable
        saved_cpu, saved_engine = zerort.device.CPU, variable._execution_engine
        saved_tolist = torch.Tensor.tolist
        accelerator.torch = host.torch = facade  # type: ignore[attr-defined]
        for name, function in facade.indices.items():
            setattr(accelerator, name, function)
        zerort.device.CPU = device  # type: ignore[assignment]
        variable._execution_engine = Autograd(self, saved_engine)
        torch.Tensor.tolist = self._syncing(saved_tolist)  # type: ignore[method-assign]
        try:
            with self:
                yield
        finally:
            mesh.GlooComm, mesh.LocalComm = saved_comms  # type: ignore[misc]
            zerort.device.CPU, variable._execution_engine = saved_cpu, saved_engine
            torch.Tensor.tolist = saved_tolist  # type: ignore[method-assign]
            host.torch = saved_host  # type: ignore[attr-defined]
            for name, value in saved.items():
                setattr(accelerator, name, value)

    def _syncing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def syncing(tensor: Tensor) -> Any:
            if tensor.numel() and self._known(tensor):
                self.syncs.append("tolist")
                self._access([tensor], [], "tolist")
                self.sync(self.current.clock)
            return function(tensor)

        return syncing

    def _known(self, tensor: Tensor) -> bool:
        """Whether it lies on the device: what torch.tensor makes of numbers lies on the host."""
        return any(
            address in self._memory and address not in self._hosted for address in _granules(tensor)
        )

    def host_zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host that copies may use while the host goes on."""
        with _disable_current_modes():
            tensor = torch.zeros(numel, dtype=dtype)
        self._host(tensor)
        return tensor

    def _host(self, tensor: Tensor) -> None:
        addresses = _granules(tensor)
        self._hosted.update(addresses)
        self._memory.update((address, Cell()) for address in addresses)
        self._host_live.append((StorageWeakRef(tensor.untyped_storage()), addresses))

    def _is_hosted(self, tensor: Tensor) -> bool:
        return any(address in self._hosted for address in _granules(tensor))

    def _across(self, reads: list[Tensor], writes: list[Tensor], name: str, waits: bool) -> None:
        """An operation with memory of the host: a copy from or to the device, or the host's own."""
        # memory that storages are resized to is not seen to be the device's
        across = not waits or any(t.numel() > 1 and self._known(t) for t in (*reads, *writes))
        if not across:
            hosted = [[t for t in given if self._is_hosted(t)] for given in (reads, writes)]
            self.host[-1] = self.host.get(-1, 0) + 1
            self.touch(self.cpu, *hosted, name)
            return
        assert name == "copy_", f"{name} with memory of the device and of the host"
        self._access(reads, writes, name)
        if waits:
            self.syncs.append("copy")
            self.sync(self.current.clock)

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """As Tensor.record_stream: the allocator waits for that stream's use of it."""
        for address in _granules(tensor):
            self._memory.setdefault(address, Cell()).excused.add(stream.stream_id)

    def forget(self, tensor: Tensor) -> None:
        """It lies on the host."""
        for address in _granules(tensor):
            self._memory.pop(address, None)

    @contextmanager
    def on(self, stream: Stream, *, after: Stream) -> Iterator[None]:
        """A user's own stream, behind what `after` has done."""
        stream.merge(after.clock, after.ms)
        outside, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = outside

    def sync(self, clock: Clock) -> None:
        """The host waits."""
        for stream, count in clock.items():
            self.host[stream] = max(self.host.get(stream, 0), count)

    def ordered(self) -> bool:
        """Notes who puts streams in order, and whether this call counts."""
        frame = sys._getframe(2)
        site = (Path(frame.f_code.co_filename).name, frame.f_lineno)
        self.sites.add(site)
        return site != self.dropped

    # What runs.

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._sweep()
        out = function(*args, **kwargs)
        schema = function._schema
        reads, writes = _operands(schema, args, kwargs)
        results = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        name = schema.name.removeprefix("aten::")
        if name.startswith("c10d::"):  # of the control group, on the host
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self.forget(tensor)
            return out
        if name == "lift_fresh":  # what torch.tensor makes of numbers
            self.forget(out)
            return out
        if _is_view(schema) or name == "is_pinned":  # which reads no value
            return out
        if name == "_local_scalar_dense":
            if self._known(reads[0]):
                self.syncs.append("item")
                self._access(reads, [], name)
                self.sync(self.current.clock)
            return out
        fresh = [] if writes else results
        if any(self._is_hosted(tensor) for tensor in (*reads, *writes)):
            self._across(reads, writes, name, waits=not _is_asynchronous(schema, args, kwargs))
            for tensor in fresh:
                self._host(tensor)
        else:
            self._run(reads, writes, fresh, name)
        return out

    def _run(
        self, reads: list[Tensor], writes: list[Tensor], fresh: list[Tensor], name: str
    ) -> None:
        if writes or any(self._known(tensor) for tensor in reads) or not reads:
            for tensor in fresh:
                self._allocate(tensor)
            self._access(reads, [*writes, *fresh], name)
        else:
            for tensor in fresh:
                self.forget(tensor)

    def _allocate(self, tensor: Tensor) -> None:
        for address in _granules(tensor):
            self._memory[address] = Cell()
        storage = tensor.untyped_storage()
        span = range(
            storage.data_ptr() // GRANULE, -(-(storage.data_ptr() + storage.nbytes()) // GRANULE)
        )
        self._live.append((StorageWeakRef(storage), self.current, span))
        freed = self._free.pop(self.current.stream_id, [])
        for access in freed:
            if not self._over(access, self.current):
                self.races.append(Race(access.what, f"new memory on {self.current.name}"))

    def _sweep(self) -> None:
        """What has been freed goes back to the stream it was allocated on."""
        for weak, span in [row for row in self._host_live if row[0].expired()]:
            self._host_live.remove((weak, span))
            self._hosted.difference_update(span)
            for address in span:
                self._memory.pop(address, None)
        living = []
        for storage, stream, span in self._live:
            if not storage.expired():
                living.append((storage, stream, span))
                continue
            for address in span:
                cell = self._memory.pop(address, None)
                if cell is not None:
                    self._free.setdefault(stream.stream_id, []).extend(
                        access for access in cell.all() if access.stream not in cell.excused
                    )
        self._live = living

    def _access(self, reads: list[Tensor], writes: list[Tensor], what: str) -> None:
        stream = self.current
        self.work(stream, 1.0)
        self.touch(stream, reads, writes, what)

    def work(self, stream: Stream, ms: float) -> None:
        """One more piece of work, enqueued by the host."""
        stream.merge(self.host, stream.ms)
        stream.clock[stream.stream_id] = stream.clock.get(stream.stream_id, 0) + 1
        stream.ms += ms

    def touch(self, stream: Stream, reads: list[Tensor], writes: list[Tensor], what: str) -> None:
        """The work reads and writes memory."""
        access = Access(
            stream.stream_id, stream.clock[stream.stream_id], f"{what} on {stream.name}"
        )
        for tensor in reads:
            for address in _granules(tensor):
                cell = self._memory.setdefault(address, Cell())
                self._compare([cell.write] if cell.write else [], stream, access)
                cell.reads[stream.stream_id] = access
        for tensor in writes:
            for address in _granules(tensor):
                cell = self._memory.setdefault(address, Cell())
                self._compare(cell.all(), stream, access)
                cell.write, cell.reads = access, {}

    def _compare(self, earlier: list[Access], stream: Stream, access: Access) -> None:
        for other in earlier:
            if not self._over(other, stream):
                self.races.append(Race(other.what, access.what))

    def _over(self, access: Access, stream: Stream) -> bool:
        return stream.clock.get(access.stream, 0) >= access.count


class Autograd:
    """Autograd's engine: at the end of a backward, before its callbacks, the caller's stream waits
    for all that the backward has used.
    """

    def __init__(self, machine: Machine, engine: Any) -> None:
        self._machine = machine
        self._engine = engine
        self._caller = machine.main

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        self._caller = self._machine.current
        try:
            return self._engine.run_backward(*args, **kwargs)
        finally:
            self._join()

    def queue_callback(self, callback: Callable[[], None]) -> None:
        def call() -> None:
            self._join()
            callback()

        self._engine.queue_callback(call)

    def _join(self) -> None:
        for stream in self._machine.streams:
            if stream.name == "user":
                self._caller.merge(stream.clock, stream.ms)
        self._machine.current = self._caller


class _Generator:
    """torch.cuda, as far as random numbers go: they are the CPU's."""

    def get_rng_state(self, place: torch.device) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, place: torch.device) -> None:
        torch.set_rng_state(state)


class Facade:
    """torch, with this machine for its accelerator."""

    def __init__(self, machine: Machine) -> None:
        self.accelerator = self
        self.machine = machine
        self.indices = {
            "_device_index": lambda: machine.device_index,
            "_set_device_index": lambda index: setattr(machine, "device_index", index),
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def Stream(self, place: torch.device) -> Stream:
        return Stream(self.machine, "sums", place.index or 0)

    def Event(self, place: torch.device, enable_timing: bool = False) -> Event:
        return Event(self.machine, enable_timing)

    def zeros(self, numel: int, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        return self.machine.host_zeros(numel, dtype)

    def get_device_module(self, place: torch.device) -> Any:
        return _Generator() if place.type == "cpu" else torch.get_device_module(place)

    def is_available(self) -> bool:
        return False  # models go where CPU tensors are, which is the machine

    def current_stream(self, place: torch.device) -> Stream:
        return self.machine.current

    def set_stream(self, stream: Stream) -> None:
        self.machine.current = stream
        self.machine.device_index = stream.device_index


def _granules(tensor: Tensor) -> range:
    if not tensor.numel():
        return range(0)
    last = sum((s - 1) * stride for s, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return range(start // GRANULE, (start + (last + 1) * tensor.itemsize - 1) // GRANULE + 1)


def _operands(schema: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for index, argument in enumerate(schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        leaves = value if isinstance(value, list | tuple) else [value]
        written = argument.alias_info is not None and argument.alias_info.is_write
        (writes if written else reads).extend(t for t in leaves if isinstance(t, Tensor))
    return reads, writes


def _is_asynchronous(schema: Any, args: Any, kwargs: Any) -> bool:
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("non_blocking"))


def _is_view(schema: Any) -> bool:
    infos = [result.alias_info for result in schema.returns]
    return any(info is not None and not info.is_write for info in infos)


# Collectives.


class SimulatedWork:
    """One collective on the links, behind the stream that starts it."""

    def __init__(
        self, machine: Machine, run: Callable[[], tuple[list[Tensor], list[Tensor]]]
    ) -> None:
        self._machine = machine
        self._run = run
        self._end: Event | None = None

    def start(self) -> SimulatedWork:
        if self._end is None:
            machine, links = self._machine, self._machine.links
            links.merge(machine.current.clock, machine.current.ms)
            with _disable_current_modes():
                reads, writes = self._run()
            machine.work(links, machine.collective_ms)
            machine.touch(links, reads, writes, "collective")
            self._end = Event(machine)
            self._end.record(links)
        return self

    def is_completed(self) -> bool:
        raise AssertionError("a collective on an accelerator was asked whether it is complete")

    def wait(self) -> None:
        assert self._end is not None
        if self._machine.ordered():
            self._machine.current.merge(self._end.clock, self._end.ms)

    def taken(self) -> None:
        """Nobody else reads what has arrived."""

    def when_complete(self, call: Callable[[], None]) -> None:
        """Nobody on the host finds out."""


class SimulatedComm(GlooComm):
    """As NCCL's: sums on the way, in place, on a stream of its own. The bytes go over gloo."""

    machine: Machine
    window = 4

    def pieces(self, *, adds: bool) -> int:
        return 1

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Any:
        def run() -> tuple[list[Tensor], list[Tensor]]:
            total = send.clone()
            dist.all_reduce(total, group=self._groups[self.gradients])
            recv.copy_(total.chunk(self.world)[self.rank])
            return [send], [recv]

        return SimulatedWork(self.machine, run)

    def all_gather(self, buffer: Tensor) -> Any:
        def run() -> tuple[list[Tensor], list[Tensor]]:
            pieces = buffer.chunk(self.world)
            for rank, piece in enumerate(pieces):
                dist.broadcast(piece, rank, group=self._groups[self.parameters])
            others = [piece for rank, piece in enumerate(pieces) if rank != self.rank]
            return [pieces[self.rank]], others

        return SimulatedWork(self.machine, run)


class Alone(LocalControl):
    """Nobody to tell; what would be told lies on the host."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def all_reduce(self, values: Tensor) -> None:
        self._machine.forget(values)

    def broadcast(self, values: Tensor, source: int = 0) -> None:
        self._machine.forget(values)


class SimulatedAlone(LocalComm):
    """One process, on the machine: there is nothing that a sum could wait for."""

    machine: Machine

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.control = Alone(self.machine)


class Simulated(NamedTuple):
    """The communicators of engines on the machine."""

    several: type[SimulatedComm] = SimulatedComm
    alone: type[LocalComm] = SimulatedAlone


class _OnStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, machine: Machine, stream: Stream, after: Stream) -> Tensor:
        ctx.machine, ctx.stream, ctx.after = machine, stream, after
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.stream.merge(ctx.after.clock, ctx.after.ms)
        ctx.machine.record_stream(gradient, ctx.stream)
        ctx.machine.current = ctx.stream
        return gradient, None, None, None


def on_stream(x: Tensor, machine: Machine, stream: Stream, after: Stream) -> Tensor:
    """`x`, of which the backward goes on on `stream`, behind what `after` has done: the one that
    made the gradient, as autograd does.
    """
    out: Tensor = _OnStream.apply(x, machine, stream, after)
    return out
