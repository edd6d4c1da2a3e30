"""What all ranks must have alike beyond their models: the configuration, and what their optimizers
were made with.

Another clipping norm, loss scale or learning rate on one rank would train on without an error, each
shard by its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from zerort.config import Config
from zerort.errors import PlanMismatch
from zerort.mesh import Comm

__all__ = ["compare_optimizers", "compare_settings"]

_OF_ONE_RANK: Any = {
    "steps_per_print": True,
    "wall_clock_breakdown": True,
    "dump_state": True,
    "zerort": {"trace"},
}
"""What is printed and recorded may differ."""


def compare_settings(comm: Comm, settings: Config) -> None:
    """Raises `PlanMismatch` on all ranks if their configurations differ, naming the first key."""
    _compare(
        comm,
        dict(_leaves("", settings.model_dump(exclude=_OF_ONE_RANK))),
        "give all ranks the same configuration",
    )


def compare_optimizers(comm: Comm, optimizer: Optimizer) -> None:
    """Raises `PlanMismatch` on all ranks if their optimizers differ in class or in a number of a
    group.
    """
    facts = {"optimizer": type(optimizer).__name__}
    for index, group in enumerate(optimizer.param_groups):
        facts |= {f"{key} of optimizer group {index}": value for key, value in _numbers(group)}
    _compare(comm, facts, "make the optimizer alike on all ranks")


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


def _compare(comm: Comm, facts: Mapping[str, Any], advice: str) -> None:
    views = comm.gather_objects(facts)
    for rank, theirs in enumerate(views):
        for key in {**views[0], **theirs}:
            ours, other = (
                repr(view[key]) if key in view else "nothing" for view in (views[0], theirs)
            )
            if ours != other:
                raise PlanMismatch(
                    f"ranks have different settings: {key} is {ours} on rank 0 and {other} on rank "
                    f"{rank}; {advice}"
                )
