"""`zero_optimization`: how model state is placed among ranks, and between a device and its host."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from zerort.config.offload import OffloadOptimizer, OffloadParam, refuse_unfit
from zerort.config.section import Many, Names, Section, Size, number

__all__ = ["LeafModules", "Zero"]


class LeafModules(Section):
    """`leaf_module`: modules whose parameters are needed together, whole, when one is called."""

    classes: Names = Field(default_factory=list)
    names: Names = Field(default_factory=list)
    name_suffixes: Names = Field(default_factory=list)


class Zero(Section):
    """`zero_optimization`: how model state is placed."""

    stage: Annotated[int, BeforeValidator(number), Field(ge=0, le=3)] = 0
    reduce_bucket_size: Annotated[Size | None, BeforeValidator(number)] = None
    """Upper bound of a bucket in elements. DeepSpeed's default of 5e8 would leave nothing to
    overlap.
    """
    ignore_unused_parameters: bool = True
    stage3_max_live_parameters: Annotated[Size | None, BeforeValidator(number)] = None
    """*Room*: elements that may be whole at once; None is three units, and at least 5e7.
    DeepSpeed's default of 1e9 would keep most models whole.
    """
    stage3_prefetch_bucket_size: Annotated[Many, BeforeValidator(number)] = 50_000_000
    """Elements that are gathered before they are needed, at most."""
    stage3_param_persistence_threshold: Annotated[Many, BeforeValidator(number)] = 100_000
    """Parameters of at most so many elements stay whole on every rank."""
    stage3_model_persistence_threshold: Annotated[Many, BeforeValidator(number)] = 2**53
    """Elements of all that stay whole together, at most."""
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_gather_fp16_weights_on_model_save: bool = False
    zero_quantized_gradients: bool = False
    """Gradients are sent as bytes, and what is rounded off is lost."""
    mics_shard_size: Annotated[int, BeforeValidator(number)] = -1
    """Consecutive ranks that hold one copy of the model state; all where it is not above 0."""
    zero_hpz_partition_size: Annotated[int, BeforeValidator(number), Field(ge=0)] = 1
    """Consecutive ranks that keep together what one gather from all has brought, until parameters
    change; nothing is kept where it is at most 1.
    """
    leaf_module: LeafModules = Field(default_factory=LeafModules)
    offload_optimizer: OffloadOptimizer | None = None
    offload_param: OffloadParam | None = None
    cpu_offload: bool | None = None
    cpu_offload_param: bool | None = None
    cpu_offload_params: bool | None = None
    cpu_offload_use_pin_memory: bool | None = None

    @property
    def offloads(self) -> tuple[OffloadOptimizer, OffloadParam]:
        """What is at home on the host, in whichever spelling; parameters at stage 3 only."""
        old = {"device": "cpu", "pin_memory": bool(self.cpu_offload_use_pin_memory)}
        optimizer, param = self.offload_optimizer, self.offload_param
        if self.cpu_offload:
            optimizer = OffloadOptimizer.model_validate(old)
        if self.cpu_offload_param or self.cpu_offload_params:
            param = OffloadParam.model_validate(old)
        if not self.shards_parameters:
            param = None
        return optimizer or OffloadOptimizer(), param or OffloadParam()

    @property
    def idle(self) -> list[str]:
        """Keys of this section that ask for what its stage has no use for."""
        asked = {
            "offload_param": self.offload_param is not None and self.offload_param.on_host,
            "cpu_offload_param": self.cpu_offload_param,
            "cpu_offload_params": self.cpu_offload_params,
            "zero_hpz_partition_size": self.zero_hpz_partition_size > 1,
        }
        return [] if self.shards_parameters else [name for name, on in asked.items() if on]

    @model_validator(mode="after")
    def _one_spelling(self) -> Zero:
        pairs = (
            ("cpu_offload", "offload_optimizer"),
            ("cpu_offload_param", "offload_param"),
            ("cpu_offload_params", "offload_param"),
        )
        for old, new in pairs:
            if getattr(self, old) and getattr(self, new) is not None:
                raise ValueError(f"{old} is an old spelling of {new}, which is given too: give one")
        refuse_unfit(self.stage, self.offloads[0])
        return self

    @property
    def secondary_size(self) -> int | None:
        """Ranks that keep parameters together from one gather to the next, where some do."""
        size = self.zero_hpz_partition_size
        return size if self.shards_parameters and size > 1 else None

    @property
    def shards_optimizer(self) -> bool:
        """Whether the stage shards the optimizer, and its state."""
        return self.stage > 0

    @property
    def shards_gradients(self) -> bool:
        """Whether the stage shards gradients too."""
        return self.stage >= 2

    @property
    def shards_parameters(self) -> bool:
        """Whether the stage shards parameters between their uses."""
        return self.stage == 3

    @property
    def gathers_weights(self) -> bool:
        """Whether `save_16bit_model` writes a sharded model's weights."""
        return (
            self.stage3_gather_16bit_weights_on_model_save
            or self.stage3_gather_fp16_weights_on_model_save
        )
