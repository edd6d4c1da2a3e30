"""Sections of what a block's curvature and its bits are computed by: `eigenvalue` and
`quantize_training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from zerort.config.section import Count, Section, Size, lower, whole

__all__ = ["Eigenvalue", "QuantizeTraining", "conflicts"]


def _named(value: str) -> str:
    if not all(value.split(".")):
        raise ValueError(f"expected a dotted path from the module to its blocks, got {value!r}")
    return value


class Eigenvalue(Section):
    """`eigenvalue`: the largest eigenvalue of the loss's Hessian over each block of the module."""

    enabled: bool = False
    verbose: bool = False
    """Each block's eigenvalue in the log."""
    max_iter: Count = 100
    tol: Annotated[float, Field(gt=0)] = 1e-2
    """Relative change of the eigenvalue at which the iteration ends."""
    stability: Annotated[float, Field(ge=0)] = 1e-6
    """Added to the norm that vectors are divided by."""
    gas_boundary_resolution: Count = 1
    """Boundaries from one computation to the next."""
    layer_name: Annotated[str, AfterValidator(_named)] = "bert.encoder.layer"
    """Dotted path from the module to its list of blocks."""
    layer_num: Annotated[int, BeforeValidator(whole), Field(ge=0, le=2**31 - 1)] = 0
    """Blocks, from the first on."""

    @model_validator(mode="after")
    def _some_blocks(self) -> Eigenvalue:
        if self.enabled and not self.layer_num:
            raise ValueError("enabled without layer_num: say how many blocks layer_name has")
        return self


Bits = Annotated[int, BeforeValidator(whole), Field(ge=1, le=16)]
Kind = Annotated[Literal["symmetric", "asymmetric"], BeforeValidator(lower)]


class QuantizeBits(Section):
    """`quantize_training.quantize_bits`: what bits fall from and to."""

    start_bits: Bits = 16
    target_bits: Bits

    @model_validator(mode="after")
    def _falling(self) -> QuantizeBits:
        if self.target_bits > self.start_bits:
            raise ValueError(
                f"target_bits is {self.target_bits}, above start_bits, {self.start_bits}: bits "
                "only fall"
            )
        return self


class QuantizeSchedule(Section):
    """`quantize_training.quantize_schedule`: when bits fall, in steps."""

    quantize_period: Size = 1000
    """Steps to the first fall; each period is at least twice the one before."""
    schedule_offset: Annotated[int, BeforeValidator(whole), Field(ge=0, le=2**53)] = 1000
    """Steps before anything is quantized."""


class QuantizeAlgorithm(Section):
    """`quantize_training.quantize_algo`."""

    q_type: Kind | None = None
    rounding: Annotated[Literal["nearest", "stochastic"], BeforeValidator(lower)] = "nearest"


class MixedQuantize(Section):
    """`quantize_training.fp16_mixed_quantize`: a parameter and its quantized values, mixed."""

    enabled: bool = False
    quantize_change_ratio: Annotated[float, Field(ge=0, le=1)] = 0.001
    """How much less of the parameter itself there is with each step."""


class QuantizeTraining(Section):
    """`quantize_training`: parameters in few bits, over masters in fp32 (MoQ)."""

    enabled: bool = False
    quantize_verbose: bool = False
    """Each fall of a layer's bits in the log."""
    quantize_groups: Count = 1
    """Runs of equal length that a parameter is cut into, each with a scale of its own."""
    quantize_type: Kind | None = None
    """An older place of `quantize_algo.q_type`."""
    quantize_bits: QuantizeBits = Field(default_factory=lambda: QuantizeBits(target_bits=8))
    quantize_schedule: QuantizeSchedule = Field(default_factory=QuantizeSchedule)
    quantize_algo: QuantizeAlgorithm = Field(default_factory=QuantizeAlgorithm)
    fp16_mixed_quantize: MixedQuantize = Field(default_factory=MixedQuantize)
    eigenvalue: Eigenvalue = Field(default_factory=Eigenvalue)
    """The same as the top-level section; steers the periods."""

    @property
    def symmetric(self) -> bool:
        """Whether codes lie alike on both sides of 0."""
        return (self.quantize_algo.q_type or self.quantize_type or "symmetric") == "symmetric"

    @property
    def stochastic(self) -> bool:
        """Whether rounding is stochastic."""
        return self.quantize_algo.rounding == "stochastic"

    @model_validator(mode="after")
    def _one_type(self) -> QuantizeTraining:
        both = {self.quantize_algo.q_type, self.quantize_type} - {None}
        if len(both) > 1:
            raise ValueError(
                f"quantize_type is {self.quantize_type} and quantize_algo.q_type "
                f"{self.quantize_algo.q_type}: give one of them"
            )
        return self

    @model_validator(mode="after")
    def _few_bits(self) -> QuantizeTraining:
        few = self.quantize_bits.target_bits
        if few < 3 and (self.stochastic or not self.symmetric):
            raise ValueError(
                f"quantize_bits.target_bits is {few}: below 3 bits quantize_algo has to be "
                "symmetric, and rounded to nearest"
            )
        return self


def conflicts(
    eigenvalue: Eigenvalue, moq: QuantizeTraining, *, shards_parameters: bool, masters: bool
) -> Sequence[str]:
    """What these sections ask for together, and of the rest of the file, that cannot be.
    `masters`: parameters are of fewer bits than the optimizer's.
    """
    inner = moq.enabled and moq.eigenvalue.enabled
    asked = {
        "eigenvalue": eigenvalue.enabled,
        "quantize_training.eigenvalue": inner,
        "quantize_training": moq.enabled,
    }
    found = [
        f"{path} is not there at stage 3, where no rank has whole parameters between their uses: "
        "use stage 2"
        for path, enabled in asked.items()
        if enabled and shards_parameters
    ]
    if eigenvalue.enabled and inner:
        found.append(
            "eigenvalue and quantize_training.eigenvalue are both enabled: keep one, either "
            "steers the bits"
        )
    if moq.enabled and not masters:
        found.append(
            "quantize_training needs fp16 or bf16 with fp32 masters, which keep what is rounded off"
        )
    return found
