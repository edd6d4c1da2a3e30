"""Where tensors lie and kernels run: the only room that names a device, a stream or an event.

A `Device` says how work on it is ordered, and does what torch does not do alike everywhere. There
are two kinds: the CPU, where everything happens in the order of the program, and an accelerator,
where the host runs ahead and streams order what it has enqueued. One implementation drives whatever
torch.accelerator drives with streams, 64-bit floats and a collective library of its own: CUDA, ROCm
(which torch calls cuda) and XPU. Any other device is refused by name; nothing is moved to the CPU
in silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from zerort.device import accelerator
from zerort.device.accelerator import Accelerator
from zerort.device.contract import (
    LINE,
    Device,
    Figures,
    Flat,
    Host,
    Lane,
    Mark,
    Rounding,
    Streams,
)
from zerort.device.cpu import Cpu
from zerort.device.quantize import GROUP, residual_bytes
from zerort.errors import ConfigError

__all__ = [
    "GROUP",
    "LINE",
    "Device",
    "Figures",
    "Flat",
    "Host",
    "Lane",
    "Mark",
    "Rounding",
    "Streams",
    "default_place",
    "device_for",
    "place_of",
    "residual_bytes",
    "select",
]

CPU = Cpu()

_accelerator = cache(Accelerator)


def device_for(place: torch.device) -> Device:
    """What drives `place`. Raises `ConfigError` naming a device that nothing here drives."""
    if place.type == "cpu":
        return CPU
    reason = accelerator.why_not(place)
    if reason is not None:
        raise ConfigError(
            f"device {place} is not supported: {reason}. Move the model to one that is, "
            f"{' or '.join(_supported())}, before zerort.initialize"
        )
    return _accelerator(place)


def place_of(tensors: Iterable[tuple[str, Tensor]]) -> torch.device | None:
    """The accelerator that the named tensors are on, None where they are on the CPU or have no
    values yet.

    Raises `ConfigError` naming a device that is not supported, and two tensors on different
    accelerators.
    """
    found: tuple[str, torch.device] | None = None
    for name, tensor in tensors:
        place = tensor.device
        if place.type in ("cpu", "meta"):
            continue
        if found is None:
            device_for(place)
            found = name, place
        elif place != found[1]:
            raise ConfigError(
                f"{found[0]} is on {found[1]} and {name} on {place}: a model is trained on one "
                "device a rank; move it there before zerort.initialize"
            )
    return found[1] if found is not None else None


def default_place() -> torch.device:
    """The current accelerator, where there is one that is supported; else the CPU."""
    place = accelerator.current()
    return torch.device("cpu") if place is None else place


def select(local_rank: int) -> None:
    """Makes one accelerator of this host the current one; more ranks than devices share them."""
    accelerator.select(local_rank)


def _supported() -> list[str]:
    place = accelerator.current()
    return ["cpu"] if place is None else ["cpu", place.type]
