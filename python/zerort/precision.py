"""What the module computes in, what travels, and by how much the loss is scaled."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zerort import _core
from zerort.config import Config
from zerort.errors import ConfigError
from zerort.wire import FORMATS, WireFormat

__all__ = ["FixedScale", "LossScale", "Precision"]

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LossScale(Protocol):
    """What the loss is multiplied by, so that small gradients survive fp16."""

    @property
    def scale(self) -> float:
        """The factor of this step."""

    def update(self, overflow: bool) -> bool:
        """A boundary has passed. False: it overflowed and the scale cannot go lower."""


@dataclass(frozen=True)
class FixedScale:
    """A scale that stays: 1 for fp32 and bf16, the configured one for fp16 with a static scale."""

    scale: float = 1.0

    def update(self, overflow: bool) -> bool:
        """An overflow skips the step and changes nothing."""
        return True


@dataclass(frozen=True)
class Precision:
    """The configuration's precision: `compute` is the parameters' dtype, None where the model keeps its own."""

    compute: torch.dtype | None
    loss_scale: LossScale
    autocast: torch.dtype | None
    casts_inputs: bool
    wire: str | None
    sums: torch.dtype
    predivide: float
    """By how much gradients are divided before the sum over ranks; it is undone after it."""

    @classmethod
    def of(cls, config: Config) -> Precision:
        """Reads fp16, bf16, torch_autocast and communication_data_type. Raises `ConfigError` for an unknown wire."""
        wire = config.zerort.wire or config.communication_data_type
        if wire is not None and wire not in FORMATS:
            raise ConfigError(f"zerort.wire: expected one of {', '.join(FORMATS)}, got {wire!r}")
        autocast = DTYPES[config.torch_autocast.dtype] if config.torch_autocast.enabled else None
        half = config.fp16.enabled or autocast == torch.float16
        return cls(
            compute=DTYPES[config.compute_dtype] if config.compute_dtype != "fp32" else None,
            loss_scale=_loss_scale(config) if half else FixedScale(),
            autocast=autocast,
            casts_inputs=config.fp16.enabled and config.fp16.auto_cast,
            wire=wire,
            sums=DTYPES[config.data_types.grad_accum_dtype or "fp32"],
            predivide=config.gradient_predivide_factor if config.prescale_gradients else 1.0,
        )

    def cast(self, module: nn.Module) -> None:
        """Casts floating-point parameters in place; buffers keep their dtype."""
        if self.compute is None:
            return
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self.compute)

    def wire_for(self, dtype: torch.dtype) -> WireFormat:
        """How gradients of this dtype travel: as configured, else as they are; fp64 always whole."""
        own = next(name for name, form in FORMATS.items() if form.dtype == dtype)
        return FORMATS[own if self.wire is None or dtype == torch.float64 else self.wire]

    def inputs(self, value: Any) -> Any:
        """The module's arguments, cast where fp16.auto_cast asks for it."""
        if not self.casts_inputs:
            return value
        return tree_map_only(Tensor, lambda t: t.to(self.compute) if t.is_floating_point() else t, value)

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """What the forward runs in."""
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()


def _loss_scale(config: Config) -> LossScale:
    fp16 = config.fp16
    if fp16.enabled and not fp16.dynamic:
        return FixedScale(fp16.loss_scale)
    return _core.LossScale(
        initial=fp16.initial_scale,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive=fp16.consecutive_hysteresis,
        minimum=fp16.min_loss_scale,
    )
