"""What all ranks must have alike: their models, the configuration, and what their optimizers were
made with.

Another clipping norm, loss scale or learning rate on one rank would train on without an error, each
shard by its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from zerort.config import Config
from zerort.errors import PlanMismatch
from zerort.memory import PlannedParameter, Signature
from zerort.mesh import Control
from zerort.optim import name_of
from zerort.start import gathered
from zerort.start.loader import TrainingLoader

__all__ = ["compare_data", "compare_optimizers", "compare_plans", "compare_settings"]

_OF_ONE_RANK: Any = {
    "steps_per_print": True,
    "wall_clock_breakdown": True,
    "dump_state": True,
    "timers": True,
    "comms_logger": True,
    "flops_profiler": {"output_file"},
    "tensorboard": True,
    "csv_monitor": True,
    "wandb": True,
    "comet": True,
    "trackio": True,
    "zerort": {"trace", "mlflow"},
}
"""What is printed and recorded may differ."""


def compare_settings(control: Control, settings: Config, device: torch.device) -> None:
    """Raises `PlanMismatch` on all ranks if their configurations differ, naming the first key, or
    the kinds of their devices.
    """
    _compare(
        control,
        lambda: {"the device": device.type},
        "move the model to the same kind of device on all ranks",
    )
    _compare(
        control,
        lambda: dict(_leaves("", settings.model_dump(exclude=_OF_ONE_RANK))),
        "give all ranks the same configuration",
    )


def compare_optimizers(control: Control, optimizer: Optimizer | None) -> None:
    """Raises `PlanMismatch` on all ranks if their optimizers differ in class or in a number of a
    group, or some have none.
    """

    def facts() -> dict[str, Any]:
        if optimizer is None:
            return {"optimizer": "none"}
        found: dict[str, Any] = {"optimizer": name_of(optimizer)}
        for index, group in enumerate(optimizer.param_groups):
            found |= {f"{key} of optimizer group {index}": value for key, value in _numbers(group)}
        return found

    _compare(control, facts, "make the optimizer alike on all ranks")


def compare_data(control: Control, loader: TrainingLoader | None) -> None:
    """Raises `PlanMismatch` on all ranks if they would not read the same dataset."""

    def facts() -> dict[str, str]:
        if loader is None:
            return {"training_data": "none"}
        length = loader.state_dict()["length"]
        return {"training_data": "iterable" if length is None else f"{length} samples"}

    _compare(control, facts, "give all ranks the whole dataset, of which each takes its part")


def compare_plans(control: Control, planned: Sequence[PlannedParameter], own: int) -> None:
    """Raises `PlanMismatch` on all ranks if they planned different things, naming the first
    difference; `own` is the digest of this rank's plan.
    """
    views = gathered(control, lambda: ([member.signature() for member in planned], own))
    ours, digest = views[0]
    for rank, (theirs, other) in enumerate(views):
        for a, b in zip(ours, theirs, strict=False):
            if a != b:
                raise PlanMismatch(
                    f"ranks have different models, first in {_described(a)} on rank 0 and "
                    f"{_described(b)} on rank {rank}"
                )
        if len(ours) != len(theirs):
            longer, more = (0, ours) if len(ours) > len(theirs) else (rank, theirs)
            raise PlanMismatch(
                f"ranks have different models: rank 0 has {len(ours)} parameters and rank {rank} "
                f"{len(theirs)}; the first that only rank {longer} has is "
                f"{_described(more[min(len(ours), len(theirs))])}"
            )
        if other != digest:
            raise PlanMismatch(
                f"rank {rank} has rank 0's parameters but another plan: give all ranks the same "
                "configuration, the sections zero_optimization and zerort and what is sent "
                "(communication_data_type, torch_autocast) above all"
            )


def compare_loose(control: Control, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Raises `PlanMismatch` on all ranks if what lies in no bucket differs in name, shape or dtype:
    rank 0's values would not fit.
    """

    def facts() -> dict[str, str]:
        return {
            name: f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in tensors
        }

    advice = "make frozen parameters and buffers alike on all ranks"
    _compare(control, facts, advice, what="models")


def _described(signature: Signature) -> str:
    name, shape, order, dtype, group = signature
    strides = f"strides {list(order)} " if order else ""
    of = "in no group" if group is None else f"group {group}"
    return f"{name} {list(shape)} {strides}{dtype.removeprefix('torch.')} ({of})"


def _numbers(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in group.items():
        plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(plain, bool | int | float | str | tuple) and key != "params":
            yield key, plain


def _leaves(prefix: str, section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _compare(
    control: Control,
    facts: Callable[[], Mapping[str, Any]],
    advice: str,
    *,
    what: Literal["models", "settings"] = "settings",
) -> None:
    views = gathered(control, facts)
    for rank, theirs in enumerate(views):
        for key in {**views[0], **theirs}:
            ours, other = (
                repr(view[key]) if key in view else "nothing" for view in (views[0], theirs)
            )
            if ours != other:
                raise PlanMismatch(
                    f"ranks have different {what}: {key} is {ours} on rank 0 and {other} on rank "
                    f"{rank}; {advice}"
                )
