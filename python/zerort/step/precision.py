"""What the module computes in, what is sent, and by how much the loss is scaled."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zerort import _core
from zerort.config import Config
from zerort.config.amp import Amp
from zerort.config.section import SMALLEST
from zerort.errors import ConfigError
from zerort.step.casting import cast, cast_buffers, explained
from zerort.step.mode import DTYPES, Mode
from zerort.wire import FORMATS, number_of

__all__ = ["FixedScale", "LossScale", "Precision"]

_COMPUTED_LOW = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What autocast computes in low precision; DeepSpeed's list."""


_APEX_WINDOW = 2000
"""Clean steps after which its scale doubles; it has no key."""


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
    """The configuration's precision."""

    mode: Mode
    loss_scale: LossScale
    low_modules: tuple[type[nn.Module], ...]
    """Classes whose gradients are sent in the dtype that autocast computes them in."""
    wire: str | None
    """The format that gradients are sent in where it suits them; None where it follows from each
    parameter.
    """
    sums: torch.dtype
    predivide: float
    """By how much gradients are divided before the sum over ranks; it is undone after it."""
    others: str | None = None
    """The format of those that `wire` does not suit; None is 16 bits."""
    low_masters: bool = False
    """Whether parameters of a low precision are their own masters."""
    wide_states: bool = False
    """Whether the optimizer computes, and keeps its state, in more than such masters are."""
    buffers: torch.dtype | None = None
    """What floating-point buffers are cast to, of whichever module."""

    @classmethod
    def of(cls, config: Config) -> Precision:
        """Reads fp16, bf16, torch_autocast, amp and communication_data_type.

        Raises `ConfigError` for an unknown wire, a module class that is none, and two keys that
        name a wire.
        """
        wire = config.wire or config.communication_data_type
        if wire is not None and wire not in FORMATS:
            raise ConfigError(f"zerort.wire: expected one of {', '.join(FORMATS)}, got {wire!r}")
        mode = Mode.of(config)
        return cls(
            mode=mode,
            loss_scale=_loss_scale(config, mode),
            low_modules=_low_modules(config, mode, wire),
            wire=wire,
            others=config.communication_data_type,
            sums=DTYPES[config.sums],
            predivide=config.gradient_predivide_factor if config.prescale_gradients else 1.0,
            low_masters=config.low_masters,
            wide_states=config.wide_states,
            buffers=DTYPES[wanted] if (wanted := config.data_types.buffer_dtype) else None,
        )

    @property
    def scales_loss(self) -> bool:
        """Whether a loss is, or may come to be, multiplied by something before its backward."""
        return self.loss_scale != FixedScale()

    def cast(self, module: nn.Module) -> None:
        """Casts the module in place where it computes in a low precision; see `casting`."""
        if self.mode.compute is not None:
            cast(module, self.mode.compute, keeps_norms=self.mode.keeps_norms)
        if self.buffers is not None:
            cast_buffers(module, self.buffers)

    def wires(self, module: nn.Module) -> Callable[[nn.Parameter], int]:
        """Tells the number of the wire format that the gradient of each of `module`'s parameters
        is sent in.

        It is the configured one where that suits, else the dtype that autocast computes it in, else
        the parameter's; fp64 stays whole.
        """
        embeddings = {
            id(part.weight)
            for part in module.modules()
            if isinstance(part, nn.Embedding | nn.EmbeddingBag)
        }
        low = {
            id(parameter)
            for part in module.modules()
            if type(part) in self.low_modules
            for parameter in part.parameters(recurse=False)
        }

        def number(parameter: nn.Parameter) -> int:
            dtype = parameter.dtype
            if dtype != torch.float64 and self.wire is not None:
                embeds = id(parameter) in embeddings
                if FORMATS[self.wire].suits(parameter.shape, embeds=embeds):
                    return number_of(self.wire)
                return number_of(self.others or _sixteen_bits(dtype, self.mode.autocast))
            if dtype == torch.float32 and id(parameter) in low and self.mode.autocast is not None:
                dtype = self.mode.autocast
            return next(i for i, wire in enumerate(FORMATS.values()) if wire.dtype == dtype)

        return number

    def inputs(self, value: Any) -> Any:
        """The module's arguments, cast where the mode asks for it."""
        return _floats_to(self.mode.compute, value) if self.mode.casts_inputs else value

    def outputs(self, value: Any) -> Any:
        """What the module returned, in fp32 where the mode asks for it."""
        return _floats_to(torch.float32, value) if self.mode.widens_outputs else value

    def context(
        self, module: nn.Module, device: torch.device, args: tuple[Any, ...], kwargs: Any
    ) -> AbstractContextManager[Any]:
        """What the forward over these arguments runs in."""
        if self.mode.autocast:
            return torch.autocast(device.type, self.mode.autocast)
        return (
            nullcontext()
            if self.mode.compute is None
            else explained(module, self.mode, args, kwargs)
        )


def _sixteen_bits(dtype: torch.dtype, autocast: torch.dtype | None) -> str:
    """The parameter's own, else what autocast computes in, else bf16."""
    fp16 = torch.float16 in (dtype, autocast)
    return "fp16" if fp16 else "bf16"


def _floats_to(dtype: torch.dtype | None, value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, value)


def _low_modules(config: Config, mode: Mode, wire: str | None) -> tuple[type[nn.Module], ...]:
    names = config.torch_autocast.lower_precision_safe_modules if not config.amp.enabled else None
    if mode.autocast is None:
        return ()
    if names is None:
        return _COMPUTED_LOW if wire is None else ()
    if wire is not None:
        raise ConfigError(
            "torch_autocast.lower_precision_safe_modules chooses what is sent in low precision, "
            f"and so does communication_data_type or zerort.wire ({wire}): give one of them"
        )
    return tuple(_module_class(name) for name in names)


def _module_class(name: str) -> type[nn.Module]:
    package, _, last = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(package), last)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"torch_autocast.lower_precision_safe_modules: {name!r} cannot be imported ({error}): "
            "give the full name of a class, as in torch.nn.Linear"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(
            f"torch_autocast.lower_precision_safe_modules: {name} is no class of modules"
        )
    return found


def _loss_scale(config: Config, mode: Mode) -> LossScale:
    fp16 = config.fp16
    if config.amp.enabled:
        return _apex_scale(config.amp)
    if not mode.is_half:
        return FixedScale()
    if fp16.enabled and not fp16.dynamic:
        return FixedScale(fp16.loss_scale)
    return _core.LossScale(
        initial=fp16.initial_scale,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive=fp16.consecutive_hysteresis,
        minimum=fp16.min_loss_scale,
    )


def _apex_scale(amp: Amp) -> LossScale:
    """Apex's, which is torch's GradScaler between two bounds: it halves at each overflow, of which
    none is an error, and doubles at the last of so many clean steps.
    """
    if amp.scale != "dynamic":
        return FixedScale(amp.scale)
    return _core.LossScale(
        initial=amp.initial_scale,
        window=_APEX_WINDOW,
        counts_through=True,
        hysteresis=1,
        consecutive=False,
        minimum=SMALLEST if amp.min_loss_scale is None else amp.min_loss_scale,
        forgives_at_minimum=True,
        maximum=amp.max_loss_scale,
    )
