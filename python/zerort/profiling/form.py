"""What a report is made of beside the costs of modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zerort.device import Device

__all__ = ["Form", "Iteration", "Peak", "Times"]


@dataclass(frozen=True)
class Form:
    """How much a report says."""

    depth: int = -1
    """Depths of the aggregated part; -1 for all but the deepest."""
    top: int = 1
    """Classes of modules in each."""
    detailed: bool = True
    """Whether the tree is shown."""


@dataclass(frozen=True)
class Times:
    """Seconds of a micro-batch, in the mean of its window."""

    forward: float
    backward: float
    step: float


@dataclass(frozen=True)
class Iteration:
    """What an engine adds."""

    world: int
    """Ranks."""
    micro_batch: int
    """Samples of one backward on one rank."""
    times: Times | None = None
    """None where there are no timers."""
    recompute: float = 0.0
    """Part of the forward that the backward computes anew."""


@dataclass(frozen=True)
class Peak:
    """What a device can do at most."""

    device: str
    flops: float
    """A second."""

    @classmethod
    def of(cls, device: Device, dtype: torch.dtype, given: float | None) -> Peak | None:
        """As it is given, else as it is known of the device in `dtype`; None where it is not."""
        flops = device.peak(dtype) if given is None else given
        return None if flops is None else cls(device.name(), flops)
