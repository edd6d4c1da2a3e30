"""A small model, and what an engine over it takes and sends, counted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import zerort
from stand_in import GRANULE, Machine
from tap import tapped
from weighing import alive, covered, private, reserved

__all__ = ["Counts", "count", "long", "make", "of_shapes", "partly_frozen"]

WIDTH, LAYERS = 128, 12


def make() -> nn.Module:
    """Of layers whose biases stay whole at stage 3, with a buffer."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    model.register_buffer("table", torch.zeros(5000))
    return model


def partly_frozen() -> nn.Module:
    """The same, of which every other layer is frozen."""
    model = make()
    for layer in list(model)[::2]:  # type: ignore[call-overload]
        layer.requires_grad_(False)
    return model


def long() -> nn.Module:
    """12.7 MB in fp32, of which a tenth are two layers."""
    torch.manual_seed(0)
    pairs = [(nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)) for _ in range(12)]
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


def of_shapes() -> nn.Module:
    """Matrices tall and wide, a convolution, and vectors; one layer is frozen."""
    torch.manual_seed(0)
    wide = [nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(5 * WIDTH, WIDTH)]
    square = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5)]
    conv = [nn.Unflatten(1, (32, -1)), nn.Conv1d(32, 32, 3, padding=1), nn.Flatten()]
    square[2].requires_grad_(False)
    return nn.Sequential(*wide, *square, *conv, nn.Linear(WIDTH, WIDTH))


class Counts(NamedTuple):
    """Bytes of one rank."""

    device: int
    """Between steps, under every tensor."""
    host: int
    gathered: int
    """The most that has been whole at once, where parameters are sharded."""
    sent: int
    """In a step."""
    to_host: int
    to_device: int
    crossing: int = 0
    """Of what is sent, between hosts or copies."""


def count(
    rank: int, model: Callable[[], nn.Module], config: dict[str, Any], machine: Machine | None
) -> Counts:
    """Trains three steps, on `machine` where there is one, and counts the last."""
    with ExitStack() as stack:
        if machine is not None:
            stack.enter_context(machine.running())
        gc.freeze()
        before = covered(alive())
        module = model()
        engine = zerort.initialize(model=module, config=config)[0]
        whole = _Whole(engine)
        for step in range(2):
            _step(engine, rank, step)
        copied = _copied(engine)
        with tapped() as calls:
            _step(engine, rank, 2)
        sent = sum(call.sent for call in calls if call.op in ("broadcast", "all_to_all_single"))
        apart = _apart(engine)
        crossing = sum(call.sent for call in calls if call.ranks in apart)
        calls.clear()
        to_host, to_device = (now - then for now, then in zip(_copied(engine), copied, strict=True))
        whole.close()
        tensors = private(alive())
        hosted = [t for t in tensors if machine is not None and _is_hosted(machine, t)]
        host = covered(hosted)
        found = Counts(
            covered(tensors) + reserved(engine.world_size) - before - host,
            host,
            whole.most,
            sent,
            to_host,
            to_device,
            crossing,
        )
        del tensors, hosted
        engine.destroy()
        del engine, module
        gc.unfreeze()
    return found


def _apart(engine: Any) -> list[tuple[int, ...]]:
    """Ranks of the groups between hosts and between copies, where there are such."""
    mesh = engine._parts.mesh
    nested = 1 < mesh["inner"].world < mesh.shard.world
    found = [mesh["outer"]] if nested else []
    return [comm.ranks for comm in [*found, mesh.replica] if comm.world > 1]


def _is_hosted(machine: Machine, tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    return bool(storage.nbytes()) and storage.data_ptr() // GRANULE in machine._hosted


class _Whole:
    """Watches how much of the sharded parameters is whole."""

    def __init__(self, engine: Any) -> None:
        self.most = 0
        self._buckets = [b for b in engine._parts.boundary.flat.buckets if b.spec.sharded]
        layers = list(engine.module)
        self._hooks = [layer.register_forward_hook(self._look) for layer in layers]
        self._hooks += [layer.register_full_backward_pre_hook(self._look) for layer in layers]

    def _look(self, *_: Any) -> None:
        whole = [b for b in self._buckets if b.values.is_whole]
        self.most = max(self.most, sum(b.spec.numel * b.owned.tensor.itemsize for b in whole))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._buckets = []


def _step(engine: Any, rank: int, number: int) -> None:
    for micro in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(_batch(engine, rank, number + micro)).float().square().mean())
        engine.step()


def _batch(engine: Any, rank: int, number: int) -> Tensor:
    drawn = torch.Generator().manual_seed(7 * number + rank)
    dtype = next(iter(engine.module.parameters())).dtype
    return torch.randn(1, WIDTH, generator=drawn).to(dtype)


def _copied(engine: Any) -> tuple[int, int]:
    """To the host and to the device so far."""
    buckets = engine._parts.boundary.flat.buckets
    hosts = {id(b.own.host): b.own.host for b in buckets if b.own.host is not None}
    rooms = [b.sums._room for b in engine._parts.boundary.flat.trained if b.is_on_host]
    hosts |= {id(room.host): room.host for room in rooms}
    return sum(h.received for h in hosts.values()), sum(h.sent for h in hosts.values())
