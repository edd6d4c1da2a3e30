"""Where a model's values are before an engine has them, where its tensors go, and which of its
parameters stay out of the buckets.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
from torch import Tensor, nn

from zerort.errors import PlanError
from zerort.memory import Present
from zerort.mesh import Control
from zerort.params.sharded import keeper_of
from zerort.start import gathered
from zerort.zero.init import born_of, opened, origin_of, stay_whole

__all__ = ["gather_loose", "log_never", "log_whole", "meet_heirs", "move", "unplanned"]

_log = logging.getLogger("zerort")

Unplanned = Sequence[tuple[str, nn.Parameter]]
"""Parameters by name that no bucket holds."""

_NAMED = 8
"""Names in a line of the log."""


def meet_heirs(model: nn.Module | None, control: Control, timeout: timedelta) -> None:
    """All ranks, before an engine takes the parameters of `model`: what engines that have gone have
    left of them may come together from now on.

    Raises `PlanError` on all ranks where values are not at like places, or do not make one model.
    """
    params = {} if model is None else dict(model.named_parameters())
    _compare(gathered(control, lambda: _whereabouts(params)))
    found = [born for p in params.values() if (born := born_of(p)) is not None]
    if any(born.legacy is not None for born in found):
        opened(timeout).meet_heirs(found)


def _whereabouts(params: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Where the values are of those that do not have them."""
    found = {}
    for name, parameter in params.items():
        born = born_of(parameter)
        if born is not None and born.legacy is not None:
            found[name] = f"in the shards of engine {born.legacy.engine}"
        elif born is not None:
            found[name] = "in the parts that zero.Init has made"
        elif keeper_of(parameter) is not None:
            found[name] = "with an engine that is alive"
    return found


def _compare(views: Sequence[Mapping[str, str]]) -> None:
    for rank, theirs in enumerate(views):
        for name in {**views[0], **theirs}:
            here, there = (view.get(name, "whole") for view in (views[0], theirs))
            if here != there:
                raise PlanError(
                    f"the values of parameter {name} are {here} on rank 0 and {there} on rank "
                    f"{rank}: give zerort.initialize the same model on all ranks"
                )


def move(model: nn.Module, device: torch.device) -> None:
    """Moves the model to `device`. What is sharded is where it belongs."""
    if all(_is_here(parameter) for parameter in model.parameters()):
        model.to(device)
        return
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, nn.Parameter) or _is_here(tensor):
            tensor.data = tensor.data.to(device)


def gather_loose(model: nn.Module, planned: Sequence[Tensor]) -> None:
    """What no bucket will hold is whole on every rank. All ranks call it."""
    for _, parameter in unplanned(model, planned):
        stay_whole(parameter)


def unplanned(model: nn.Module, planned: Sequence[Tensor]) -> Unplanned:
    """What of `model` no bucket will hold, where all hold the `planned`."""
    held = {id(parameter) for parameter in planned}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in held]


def log_never(left: Unplanned) -> None:
    """Which parameters require grad and are in no group of the optimizer."""
    never = [name for name, parameter in left if parameter.requires_grad]
    if never:
        _log.warning("not in the optimizer, so never updated: %s", ", ".join(never))


def log_whole(left: Unplanned, threshold: int) -> None:
    """Which have more than `threshold` elements, where parameters are sharded."""
    large = [(name, parameter) for name, parameter in left if parameter.numel() > threshold]
    if large:
        _log.warning(
            "whole on every rank, %d bytes, because they require grad and are not in the "
            "optimizer, or are no floating-point array of their own: %s%s",
            sum(p.numel() * p.itemsize for _, p in large),
            ", ".join(name for name, _ in large[:_NAMED]),
            f" and {len(large) - _NAMED} more" if len(large) > _NAMED else "",
        )


def _is_here(parameter: nn.Parameter) -> bool:
    return isinstance(origin_of(parameter), Present)
