"""How much memory a model's states take, before anything is started. Mirrors deepspeed's
estimate_zero2_* and estimate_zero3_*, with what zerort really allocates.

Counted are parameters, masters, gradient sums and the optimizer's state, for N ranks, P parameters
that train and F frozen ones, which the optimizer does not have. With Adam's two moments that is

```text
                              stage 2                 stage 3
bf16                          2(P + F) + 16P/N        (18P + 2F)/N + 2 x room
bf16 without fp32 masters     2(P + F) + 10P/N        (12P + 2F)/N + 2 x room
  nor fp32 states             2(P + F) +  6P/N        ( 8P + 2F)/N + 2 x room
fp32                          4(P + F) + 12P/N        (16P + 4F)/N + 4 x room
```

on the device, or in part on the host, beside an accelerator. *Room* is what may be whole at once,
by default three of the largest unit (or 5e7 elements, where the model has as many). Not counted are
activations, `.grad` until it leaves, and buckets in flight; `zerort config --numel` has these too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from zerort import optim
from zerort.config import Config, load_part
from zerort.config.zero import Zero
from zerort.errors import ConfigError
from zerort.memory import Dtypes, Piece, Places, Shape, pieces

__all__ = [
    "Counted",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "rank_bytes",
    "state_bytes",
    "whole_state_bytes",
]

SECTIONS = ("zero_optimization", "fp16", "bf16", "amp", "data_types", "optimizer", "zerort")
"""Of a configuration, which decide it."""

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": {"enabled": True}},
    "bf16, bf16 masters": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    "bf16, bf16 masters and states": {
        "bf16": {
            "enabled": True,
            "bf16_master_weights_and_grads": True,
            "bf16_optimizer_states": True,
        }
    },
    "fp32": {},
}
_ON_HOST = {"device": "cpu"}
_HOMES: dict[str, dict[str, Any]] = {
    "": {},
    "offload_optimizer": {"offload_optimizer": _ON_HOST},
    "offload_optimizer, offload_param": {
        "offload_optimizer": _ON_HOST,
        "offload_param": _ON_HOST,
    },
}
_PROBED = 64
"""Rows and columns of the matrix by which an optimizer's state is counted."""
_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37)
"""Sides of a parameter by which the state of a whole one is counted."""


class Counted(NamedTuple):
    """Parameters of a model."""

    total: int
    largest: int
    """Of the module that has the most itself."""
    frozen: int = 0


def rank_bytes(settings: Config, counted: Counted, ranks: int) -> tuple[int, int]:
    """Bytes of one rank's states at the configuration's stage, on an accelerator and on the host
    beside it.
    """
    on_device = on_host = 0
    for piece in _pieces(settings, counted, ranks):
        on_host += piece.nbytes if piece.on_host else 0
        on_device += 0 if piece.on_host else piece.nbytes
    zero, dtypes = settings.zero_optimization, _dtypes(settings)
    if zero.shards_parameters:
        room = settings.room(counted.total, counted.largest)
        on_device += dtypes.values.itemsize * min(counted.total, max(room, counted.largest))
    return on_device, on_host


def state_bytes(settings: Config, dtype: torch.dtype, numel: int, *, matrices: bool = True) -> int:
    """What the configuration's optimizer, or Adam where it has none, keeps of `numel` elements of
    matrices, or of vectors, that it computes in `dtype`.

    Raises `ConfigError` for an optimizer that cannot be tried.
    """
    shape = (_PROBED, _PROBED) if matrices else (_PROBED**2,)
    held = _probed(*_named(settings), dtype, shape)
    return numel * sum(item * kept for item, kept in held) // _PROBED**2


def whole_state_bytes(settings: Config, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """What the configuration's optimizer keeps of a parameter that it updates whole in `dtype`:
    that may be of shapes of its own, such as a number for each row.

    Each size of it is taken for a product of sides. Raises `ConfigError` for an optimizer that
    cannot be tried.
    """
    sides = _PRIMES[: len(shape)]
    held = _probed(*_named(settings), dtype, sides)
    return sum(item * _scaled(kept, sides, shape) for item, kept in held)


def _scaled(numel: int, sides: Sequence[int], shape: Sequence[int]) -> int:
    """`numel` with each of the prime `sides` that it is a product of changed for its side of
    `shape`.
    """
    for prime, side in zip(sides, shape, strict=True):
        while numel and numel % prime == 0:
            numel = numel // prime * side
    return numel


def _named(settings: Config) -> tuple[str, _Options]:
    chosen = settings.optimizer
    if chosen is None:
        return "AdamW", _Options()
    return chosen.type, _Options(chosen.params)


class _Options(dict[str, Any]):
    """An optimizer's, as a key of a cache."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


@cache
def _probed(
    kind: str, options: _Options, dtype: torch.dtype, shape: tuple[int, ...]
) -> Sequence[tuple[int, int]]:
    """Of each tensor of state after one step over a parameter, bytes of an element and elements."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    asked = {key: value for key, value in options.items() if key != "capturable"}
    optimizer = optim.build(kind, [parameter], asked, nn.ParameterList([parameter]))
    try:
        optimizer.step()
    except Exception as error:  # of any kind: the options come from a file
        raise ConfigError(
            f"optimizer.type: the state of {kind} cannot be counted: a step over one parameter "
            f"raised {type(error).__name__}: {error}"
        ) from error
    held = optimizer.state[parameter].values()
    tensors = [value for value in held if isinstance(value, torch.Tensor)]
    return [(each.itemsize, each.numel()) for each in tensors if each.numel() > 1]


def _dtypes(settings: Config) -> Dtypes:
    return Dtypes.of(_FLOATS[settings.compute_dtype], _Asked.of(settings))


@dataclass(frozen=True)
class _Asked:
    """Of the configuration."""

    sums: torch.dtype
    low_masters: bool
    wide_states: bool

    @classmethod
    def of(cls, settings: Config) -> _Asked:
        return cls(_FLOATS[settings.sums], settings.low_masters, settings.wide_states)


def _pieces(settings: Config, counted: Counted, ranks: int) -> Iterator[Piece]:
    """As of one bucket of all that trains, and one of all that does not."""
    zero, dtypes = settings.zero_optimization, _dtypes(settings)
    state, shards = settings.offloads
    on_host = shards.on_host and zero.shards_parameters
    rows = []
    for numel, trained in ((counted.total - counted.frozen, True), (counted.frozen, False)):
        # the part of the optimizer that stays is another bucket
        away = int(numel * state.ratio) if state.on_host and trained else 0
        for part, homed in ((away, True), (numel - away, False)):
            owned = part // ranks if zero.shards_optimizer else part
            shape = Shape(
                dtypes,
                part,
                owned,
                part // ranks,
                trained=trained,
                sharded=zero.shards_parameters,
                state_bytes=state_bytes(settings, dtypes.state, owned) if trained else 0,
            )
            rows.append((shape, Places(homed, on_host)))
    for shape, places in rows:
        yield from pieces(shape, places)


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
    *,
    config: Any = None,
) -> None:
    """Prints what a model's states take at stage 2 on one rank, and what its construction takes on
    one host, times `additional_buffer_factor`.

    With a `config`, as `initialize` takes it, for that one: its precision, optimizer and homes.
    Otherwise for Adam, in each precision and with each way to offload. Raises `ConfigError`.
    """
    hosts = Hosts(num_gpus_per_node, num_nodes, additional_buffer_factor)
    _print(2, _counted(model), hosts, config)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
    *,
    config: Any = None,
) -> None:
    """The same by the number of parameters."""
    hosts = Hosts(num_gpus_per_node, num_nodes, additional_buffer_factor)
    _print(2, Counted(total_params, 0), hosts, config)


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
    *,
    config: Any = None,
) -> None:
    """Prints what a model's states take at stage 3 on one rank, and what its construction takes on
    one host, within zero.Init and without, times `additional_buffer_factor`; `config` as for
    stage 2.
    """
    hosts = Hosts(num_gpus_per_node, num_nodes, additional_buffer_factor)
    _print(3, _counted(model), hosts, config)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
    *,
    config: Any = None,
) -> None:
    """The same by the number of parameters of the model, and of its largest layer."""
    hosts = Hosts(num_gpus_per_node, num_nodes, additional_buffer_factor)
    _print(3, Counted(total_params, largest_layer_params), hosts, config)


def _counted(model: nn.Module) -> Counted:
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return Counted(sum(p.numel() for p in model.parameters()), max(own, default=0), frozen)


class Hosts(NamedTuple):
    """Where it is built and trained."""

    per_node: int
    nodes: int
    factor: float
    """Of what construction takes for a time."""

    def building(self, counted: Counted, *, sharded: bool) -> float:
        """Bytes of one host while the model is made in fp32."""
        whole = counted.total
        if sharded:
            whole = whole // (self.per_node * self.nodes) + counted.largest
        return 4 * whole * self.per_node * self.factor


def _cases(stage: int, config: Any) -> Iterator[tuple[str, Config]]:
    """What is estimated, under its name."""
    if config is not None:
        own = load_part(config, SECTIONS)
        zero = own.zero_optimization.model_copy(update={"stage": stage})
        yield "the configuration", own.model_copy(update={"zero_optimization": zero})
        return
    for precision, section in _PRECISIONS.items():
        for homes, keys in _HOMES.items():
            given = {**section, "zero_optimization": {"stage": stage, **keys}}
            settings = load_part(given, SECTIONS)
            if not settings.zero_optimization.idle:
                yield ", ".join(filter(None, (precision, homes))), settings


def _print(stage: int, counted: Counted, hosts: Hosts, config: Any) -> None:
    total, largest, frozen = counted
    sharded = Zero(stage=stage).shards_parameters
    model = [f"{total / 1e6:.0f}M parameters"]
    model += [f"{frozen / 1e6:.0f}M frozen, outside the optimizer"] if frozen else []
    model += [f"{largest / 1e6:.0f}M in its largest layer"] if sharded else []
    per_node, nodes, _ = hosts
    lines = [
        f"Estimated memory for parameters, gradients and the optimizer's states at stage {stage}, "
        f"for {nodes} node{'s' if nodes > 1 else ''} of {per_node} "
        f"rank{'s' if per_node > 1 else ''}.",
        f"Model: {', '.join(model)}.",
    ]
    building = [_gigabytes(hosts.building(counted, sharded=False))]
    head = "building, per host"
    if sharded:
        building.append(_gigabytes(hosts.building(counted, sharded=True)))
        head += ", and in zero.Init"
    lines.append(f"{head}: {', '.join(building)}.")
    lines.append(" device, per rank | host, per rank | options")
    for name, settings in _cases(stage, config):
        device, host = rank_bytes(settings, counted, per_node * nodes)
        lines.append(f" {_gigabytes(device):>16} | {_gigabytes(host):>14} | {name}")
    print("\n".join(lines))


def _gigabytes(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GB"
