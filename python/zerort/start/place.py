"""Where a model's tensors go before they are planned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zerort.memory import Present
from zerort.zero.init import origin_of, stay_whole

__all__ = ["gather_loose", "move"]


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
    held = {id(parameter) for parameter in planned}
    for parameter in model.parameters():
        if id(parameter) not in held:
            stay_whole(parameter)


def _is_here(parameter: nn.Parameter) -> bool:
    return isinstance(origin_of(parameter), Present)
