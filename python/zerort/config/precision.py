"""Sections of what is computed in, and of what gradients and buffers are kept in."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from zerort.config.section import (
    LARGEST,
    Count,
    Dtype,
    Factor,
    Section,
    dtype_name,
    number,
    zero_or_normal,
)

__all__ = ["Autocast", "Bf16", "DataTypes", "Fp16"]


class Fp16(Section):
    """`fp16`: half precision with a loss scale."""

    enabled: bool = False
    auto_cast: bool = False
    """Floating-point inputs of the module are cast to fp16."""
    loss_scale: Annotated[
        float,
        BeforeValidator(number),
        Field(ge=0, le=LARGEST),
        AfterValidator(zero_or_normal),
    ] = 0.0
    """0 means dynamic."""
    initial_scale_power: Annotated[int, BeforeValidator(number), Field(ge=0, le=127)] = 16
    loss_scale_window: Annotated[Count, BeforeValidator(number)] = 1000
    hysteresis: Annotated[Count, BeforeValidator(number)] = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Annotated[Factor, BeforeValidator(number)] = 1.0
    fp16_master_weights_and_grads: bool = False
    """Masters and sums of gradients are fp16; what the optimizer keeps beside is fp32."""

    @property
    def dynamic(self) -> bool:
        """Whether the scale moves with overflows."""
        return self.loss_scale == 0

    @property
    def initial_scale(self) -> float:
        """The scale of the first step."""
        return 2.0**self.initial_scale_power if self.dynamic else self.loss_scale

    @model_validator(mode="after")
    def _minimum_below(self) -> Fp16:
        if self.dynamic and self.min_loss_scale > self.initial_scale:
            raise ValueError(
                f"min_loss_scale is {self.min_loss_scale:g}, above the scale that the first step "
                f"begins with, 2 to the power of initial_scale_power: {self.initial_scale:g}"
            )
        return self


class Bf16(Section):
    """`bf16`: bfloat16 parameters, with fp32 masters unless these are given up."""

    enabled: bool = False
    bf16_master_weights_and_grads: bool = False
    """The parameters are the masters, and sums of gradients are bf16."""
    bf16_optimizer_states: bool = False
    """And what the optimizer keeps beside is bf16."""

    @model_validator(mode="after")
    def _states_of_such_masters(self) -> Bf16:
        if self.bf16_optimizer_states and not self.bf16_master_weights_and_grads:
            raise ValueError(
                "bf16_optimizer_states needs bf16_master_weights_and_grads: beside fp32 masters "
                "the optimizer keeps fp32"
            )
        return self


class Autocast(Section):
    """`torch_autocast`: torch chooses what is computed in low precision, over fp32 parameters, or
    over those of the very precision that it chooses.
    """

    enabled: bool = False
    dtype: Annotated[Literal["fp16", "bf16"], BeforeValidator(dtype_name)] = "bf16"
    lower_precision_safe_modules: list[str] | None = None
    """Classes of modules whose gradients are sent in `dtype`, by their dotted names; None means
    linear and convolution.

    Their operations are computed in `dtype`, so that is all their gradients hold.
    """


class DataTypes(Section):
    """`data_types`."""

    grad_accum_dtype: Dtype | None = None
    """What passes are added in; None means fp32, or what masters of less are."""
    param_dtype: Dtype | None = None
    """What parameters are cast to anyway; it decides nothing."""
    buffer_dtype: Dtype | None = None
    """What floating-point buffers are cast to; None leaves those of the model's own as they are."""
