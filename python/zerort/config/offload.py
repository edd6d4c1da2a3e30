"""Sections of offloading to the host, and their old spellings.

`device: nvme`, and what belongs to it, is refused by name. The keys that tell how DeepSpeed makes
room and time for copies are ignored: buckets have homes, and a copy belongs to a bucket's hops.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from zerort.config.section import Section, lower, number

__all__ = [
    "CPU_ADAMS",
    "OffloadDeviceEnum",
    "OffloadOptimizer",
    "OffloadParam",
    "OffloadStateTypeEnum",
    "refuse_unfit",
]


class OffloadDeviceEnum(str, Enum):
    """Where something may be offloaded to; DeepSpeed's."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, Enum):
    """What `engine.offload_states` may be asked for; DeepSpeed's."""

    optim_states = "optim_states"
    """What the optimizer keeps."""
    hp_params = "hp_params"
    """Masters that are memory of their own."""
    lp_params = "lp_params"
    """Parameters, or this rank's shards of them; their masters too, where they are their own."""
    lp_grads = "lp_grads"
    """Gradient sums."""
    contiguous_grad_buffer = "contiguous_grad_buffer"
    """Memory of gradients on their way, which holds nothing between steps."""


CPU_ADAMS = frozenset({"cpuadam", "deepspeedcpuadam"})
"""Names of DeepSpeed's Adam that steps on the host, in lower case."""


def _built(value: Any) -> Any:
    if value == "nvme":
        raise ValueError("refused: offloading to NVMe is not built; give cpu, or none")
    return value


OffloadDevice = Annotated[
    Literal["cpu", "none"] | None, BeforeValidator(_built), BeforeValidator(lower)
]


class OffloadParam(Section):
    """`offload_param`: where shards of sharded parameters are at home."""

    device: OffloadDevice = "none"
    pin_memory: bool = False
    """Page-locked, so that no copy makes the host wait."""

    @property
    def on_host(self) -> bool:
        """Whether it asks for anything."""
        return self.device == "cpu"


class OffloadOptimizer(OffloadParam):
    """`offload_optimizer`: where masters, sums and optimizer state are at home."""

    ratio: Annotated[float, BeforeValidator(number), Field(ge=0, le=1)] = 1.0
    """Of the trained elements, how many are on the host."""


def refuse_unfit(stage: int, optimizer: OffloadOptimizer) -> None:
    """Raises `ValueError` for what the stage cannot do. `offload_param` below stage 3 is no error:
    integrations write it into every configuration, and it asks for nothing there.
    """
    if optimizer.on_host and stage == 0:
        raise ValueError(
            "offload_optimizer.device is cpu at stage 0, which keeps the optimizer whole: "
            "offloading it is for stages 1 to 3"
        )
    if optimizer.on_host and optimizer.ratio < 1.0 and stage != 3:
        raise ValueError(
            f"offload_optimizer.ratio is {optimizer.ratio:g} at stage {stage}: a part of the "
            "optimizer is offloaded at stage 3 only; leave it out"
        )
