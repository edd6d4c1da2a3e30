"""How much memory a model's states take, before anything is started. Mirrors deepspeed's
estimate_zero2_* and estimate_zero3_*, with what zerort really allocates.

Counted are parameters, gradient sums, masters and Adam's two moments, for N ranks, P parameters
that train and F frozen ones, which the optimizer does not have:

```text
           stage 2                 stage 3
bf16       2(P + F) + 16P/N        (18P + 2F)/N + 2 x room
fp32       4(P + F) + 12P/N        (16P + 4F)/N + 4 x room
```

*Room* is what may be whole at once, by default three of the largest unit (or 5e7 elements, where
the model has as many). Not counted are activations, `.grad` until it leaves, and buckets in flight.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

__all__ = [
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "rank_bytes",
]

_ROOM = 50_000_000
_STATE = {"bf16": (2, 16), "fp32": (4, 12)}
"""Bytes of a parameter, and of what there is of it beside."""


def rank_bytes(
    stage: int, dtype: str, total: int, largest: int, ranks: int, frozen: int = 0
) -> int:
    """Bytes of one rank's states: `total` parameters, `largest` of them in one layer, `frozen` of
    them outside the optimizer.
    """
    item, beside = _STATE[dtype]
    state = beside * (total - frozen)
    if stage < 3:
        return item * total + state // ranks
    room = min(total, max(3 * largest, _ROOM))
    return (item * total + state) // ranks + item * room


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Prints what a model's states take at stage 2 on one rank, and what its construction takes on
    one host, times `additional_buffer_factor`.
    """
    _print(2, _counted(model), num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """The same by the number of parameters."""
    counted = Counted(total_params, 0)
    _print(2, counted, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Prints what a model's states take at stage 3 on one rank, and what its construction takes on
    one host, within zero.Init and without, times `additional_buffer_factor`.
    """
    _print(3, _counted(model), num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """The same by the number of parameters of the model, and of its largest layer."""
    counted = Counted(total_params, largest_layer_params)
    _print(3, counted, num_gpus_per_node, num_nodes, additional_buffer_factor)


class Counted(NamedTuple):
    """Parameters of a model."""

    total: int
    largest: int
    """Of the module that has the most itself."""
    frozen: int = 0


def _counted(model: nn.Module) -> Counted:
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return Counted(sum(p.numel() for p in model.parameters()), max(own, default=0), frozen)


def _print(stage: int, counted: Counted, per_node: int, nodes: int, factor: float) -> None:
    total, largest, frozen = counted
    model = [f"{total / 1e6:.0f}M parameters"]
    model += [f"{frozen / 1e6:.0f}M frozen, outside the optimizer"] if frozen else []
    model += [f"{largest / 1e6:.0f}M in its largest layer"] if stage == 3 else []
    lines = [
        f"Estimated memory for parameters, gradients and Adam's states at stage {stage}, for "
        f"{nodes} node{'s' if nodes > 1 else ''} of {per_node} rank{'s' if per_node > 1 else ''}.",
        f"Model: {', '.join(model)}.",
        " building, per host | training, per rank | options",
    ]
    ranks = nodes * per_node
    for dtype in _STATE:
        rank = rank_bytes(stage, dtype, total, largest, ranks, frozen)
        for sharded in (True, False) if stage == 3 else (False,):
            whole = 4 * (total // ranks + largest if sharded else total)
            host = whole * per_node * factor
            born = f", zero_init={int(sharded)}" if stage == 3 else ""
            lines.append(f" {host / 2**30:15.2f} GB | {rank / 2**30:15.2f} GB | {dtype}{born}")
    print("\n".join(lines))
