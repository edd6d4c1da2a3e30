"""The typed configuration: every key that zerort acts upon, with its type, range and default.

A field's name is the key in the file, its default DeepSpeed's unless a comment says otherwise.
Models are strict (no "true" for true), frozen and closed: which other keys exist, and what becomes
of them, is the table in `keys`. What a scheduler, optimizer or wire format is called is known where
they are built, and checked there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator

from zerort.config.amp import Amp
from zerort.config.batch import Batch
from zerort.config.features import (
    ActivationCheckpointing,
    CommsLogger,
    FlopsProfiler,
    ProgressiveLayerDrop,
    Timers,
)
from zerort.config.given import Given
from zerort.config.monitors import Comet, MonitorFolder, Trackio, Wandb
from zerort.config.offload import CPU_ADAMS, OffloadOptimizer, OffloadParam
from zerort.config.precision import Autocast, Bf16, DataTypes, Fp16
from zerort.config.problems import shown
from zerort.config.quantize import Eigenvalue, QuantizeTraining, conflicts
from zerort.config.runtime import Runtime
from zerort.config.section import (
    Count,
    Dtype,
    DtypeName,
    Factor,
    Section,
    Size,
    lower,
    never,
    upper,
    zero_or_normal,
)
from zerort.config.zero import Zero
from zerort.log import LEVELS

__all__ = ["Checkpoint", "Config", "Optimizer", "Scheduler"]

_QUANTIZED = "int8"
LEAST_ROOM = 50_000_000
"""Elements that may be whole at once, unless the file says how many."""


def _without_clipping(params: dict[str, Any]) -> dict[str, Any]:
    if "max_grad_norm" in params:
        raise ValueError(
            "max_grad_norm is not an optimizer parameter; clip by the top-level key "
            "gradient_clipping"
        )
    return params


def _known_level(name: str) -> str:
    if name.lower() not in LEVELS:
        raise ValueError(f"expected one of {', '.join(LEVELS)}, got {shown(name)}")
    return name


class Optimizer(Section):
    """`optimizer`: a name and the keyword arguments of its constructor."""

    type: str
    params: Annotated[dict[str, Any], AfterValidator(_without_clipping)] = Field(
        default_factory=dict
    )


class Scheduler(Section):
    """`scheduler`: a name and the keyword arguments of its constructor."""

    type: str
    params: dict[str, Any] = Field(default_factory=dict)


class Checkpoint(Section):
    """`checkpoint`."""

    tag_validation: Annotated[Literal["WARN", "IGNORE", "FAIL"], BeforeValidator(upper)] = "WARN"
    """What happens when ranks name different tags."""


class Config(Given):
    """A whole configuration. Made by `zerort.config.load`; the properties are what the keys mean
    together. As a mapping it is what was given.
    """

    train_batch_size: Count | None = None
    train_micro_batch_size_per_gpu: Count | None = None
    gradient_accumulation_steps: Count | None = None
    managed_gradient_accumulation: bool = True
    """Windows end at every `gradient_accumulation_steps`-th `step`; false: at every one."""
    gradient_clipping: Annotated[float, Field(ge=0), AfterValidator(zero_or_normal)] = 1.0
    """Largest norm of the averaged gradient; 0 turns clipping off."""
    prescale_gradients: bool = False
    gradient_predivide_factor: Factor = 1.0
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], BeforeValidator(lower)] = "mean"
    communication_data_type: Dtype | None = None
    """Element type on the wire; None means the compute dtype."""
    steps_per_print: Annotated[Size | None, BeforeValidator(never)] = None
    """Steps between lines of progress; None, and Infinity in the file, mean never."""
    wall_clock_breakdown: bool = False
    dump_state: bool = False
    log_level: Annotated[str, AfterValidator(_known_level)] | None = None
    """Of the logger `zerort`, on every rank; None leaves it."""
    dataloader_drop_last: bool = False
    data_types: DataTypes = Field(default_factory=DataTypes)
    fp16: Fp16 = Field(default_factory=Fp16)
    bf16: Bf16 = Field(default_factory=Bf16)
    torch_autocast: Autocast = Field(default_factory=Autocast)
    amp: Amp = Field(default_factory=Amp)
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    flops_profiler: FlopsProfiler = Field(default_factory=FlopsProfiler)
    timers: Timers = Field(default_factory=Timers)
    comms_logger: CommsLogger = Field(default_factory=CommsLogger)
    activation_checkpointing: ActivationCheckpointing = Field(
        default_factory=ActivationCheckpointing
    )
    progressive_layer_drop: ProgressiveLayerDrop = Field(default_factory=ProgressiveLayerDrop)
    eigenvalue: Eigenvalue = Field(default_factory=Eigenvalue)
    quantize_training: QuantizeTraining = Field(default_factory=QuantizeTraining)
    tensorboard: MonitorFolder = Field(default_factory=MonitorFolder)
    csv_monitor: MonitorFolder = Field(default_factory=MonitorFolder)
    wandb: Wandb = Field(default_factory=Wandb)
    comet: Comet = Field(default_factory=Comet)
    trackio: Trackio = Field(default_factory=Trackio)
    zero_optimization: Zero = Field(default_factory=Zero)
    zerort: Runtime = Field(default_factory=Runtime)

    _ignored: tuple[str, ...] = PrivateAttr(default=())

    @property
    def ignored(self) -> tuple[str, ...]:
        """Paths of the keys given that have no effect here and whose absence changes no result."""
        return self._ignored

    @property
    def gradient_clipping_defaulted(self) -> bool:
        """Whether the file left clipping out, so that the default of 1.0 is worth a line in the
        log.
        """
        return "gradient_clipping" not in self.model_fields_set

    @property
    def compute_dtype(self) -> DtypeName:
        """Element type that parameters are cast to; fp32 where they are not."""
        if self.amp.enabled:
            return self.amp.level.low if self.amp.level.casts else "fp32"
        if self.fp16.enabled:
            return "fp16"
        return "bf16" if self.bf16.enabled else "fp32"

    @property
    def low_masters(self) -> bool:
        """Whether parameters of a low precision are their own masters."""
        bf16, fp16 = self.bf16, self.fp16
        return (bf16.enabled and bf16.bf16_master_weights_and_grads) or (
            fp16.enabled and fp16.fp16_master_weights_and_grads
        )

    @property
    def wide_states(self) -> bool:
        """Whether the optimizer computes, and keeps its state, in more than such masters are."""
        narrow = self.bf16.bf16_optimizer_states or self._states_like_masters
        return self.low_masters and not (self.bf16.enabled and narrow)

    @property
    def _states_like_masters(self) -> bool:
        """Whether DeepSpeed's Adam for the CPU is to keep its state in the dtype of masters."""
        chosen = self.optimizer
        return (
            chosen is not None
            and chosen.type.lower() in CPU_ADAMS
            and chosen.params.get("fp32_optimizer_states") is False
        )

    @property
    def sums(self) -> DtypeName:
        """What gradients are added up in."""
        by_masters = self.compute_dtype if self.low_masters else "fp32"
        return self.data_types.grad_accum_dtype or by_masters

    @property
    def keeps_norms(self) -> bool:
        """Whether batch norms are not cast to it."""
        return self.amp.enabled and self.amp.level.casts and self.amp.keeps_norms

    @property
    def breaks_down(self) -> bool:
        """Whether the times of a step are kept and logged."""
        return self.wall_clock_breakdown or self.flops_profiler.enabled

    @property
    def wire(self) -> str | None:
        """Name of the format that gradients are to be sent in; None where it follows from each
        parameter, or from `communication_data_type`.
        """
        quantized = self.zero_optimization.zero_quantized_gradients
        return self.zerort.wire or (_QUANTIZED if quantized else None)

    @property
    def wire_feedback(self) -> bool:
        """Whether what a format rounds off is added to the next gradient."""
        asked, zero = self.zerort.wire_error_feedback, self.zero_optimization
        if asked == "auto":
            return not zero.shards_gradients and not zero.zero_quantized_gradients
        return bool(asked)

    @property
    def cap_elements(self) -> int | None:
        """Upper bound of a bucket in elements, where the file gives it so."""
        return self.zero_optimization.reduce_bucket_size

    @property
    def cap_bytes(self) -> int | None:
        """Upper bound of a bucket in bytes, where the file gives it so. Where it gives neither, the
        bound follows from the model.
        """
        return self.zerort.bucket_bytes

    @property
    def offloads(self) -> tuple[OffloadOptimizer, OffloadParam]:
        """What is at home on the host; DeepSpeed's Adam for the CPU asks for it too, where the
        optimizer is sharded.
        """
        zero = self.zero_optimization
        state, shards = zero.offloads
        kind = self.optimizer.type.lower() if self.optimizer is not None else ""
        if kind in CPU_ADAMS and zero.shards_optimizer and zero.offload_optimizer is None:
            pinned = bool(zero.cpu_offload_use_pin_memory)
            state = OffloadOptimizer(device="cpu", pin_memory=pinned)
        return state, shards

    def room(self, whole: int, largest: int) -> int:
        """Elements that may be whole at once where parameters are sharded, `whole` in all and
        `largest` of them in one unit, which is gathered alone where that is more.
        """
        match self.zerort.reshard_after_forward:
            case True:
                return 3 * largest
            case False:
                return whole
        given = self.zero_optimization.stage3_max_live_parameters
        return max(3 * largest, LEAST_ROOM) if given is None else given

    def reduces_every_micro_batch(self, by_stage: bool) -> bool:
        """Whether gradients are reduced in every backward; `by_stage` is what the stage's rules say
        where it was not asked for.
        """
        return by_stage if self.zerort.reduce_at is None else self.zerort.reduce_at == "micro_batch"

    @property
    def unused_parameters(self) -> Literal["zero", "raise"]:
        """What a parameter without a gradient is: a zero gradient, or an error."""
        if self.zerort.unused_parameters is not None:
            return self.zerort.unused_parameters
        return "zero" if self.zero_optimization.ignore_unused_parameters else "raise"

    def resolve_batch(self, world: int) -> Batch:
        """Batch sizes for `world` ranks. Raises `ConfigError`, see `Batch.resolve`."""
        return Batch.resolve(
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
            world,
        )

    @model_validator(mode="after")
    def _one_precision(self) -> Config:
        sections = ("fp16", "bf16", "torch_autocast", "amp")
        enabled = [name for name in sections if getattr(self, name).enabled]
        alike = enabled == [self.torch_autocast.dtype, "torch_autocast"]
        if len(enabled) > 1 and not alike:
            raise ValueError(f"{' and '.join(enabled)} cannot be enabled together; choose one")
        return self

    @model_validator(mode="after")
    def _features_fit(self) -> Config:
        found = conflicts(
            self.eigenvalue,
            self.quantize_training,
            shards_parameters=self.zero_optimization.shards_parameters,
            masters=self.compute_dtype != "fp32" and not self.low_masters,
        )
        if found:
            raise ValueError("; ".join(found))
        return self

    @model_validator(mode="after")
    def _one_parameter_type(self) -> Config:
        wanted = self.data_types.param_dtype
        if wanted not in (None, self.compute_dtype):
            raise ValueError(
                f"data_types.param_dtype is {wanted}, and parameters are {self.compute_dtype}: "
                "fp16.enabled and bf16.enabled decide it; enable one of them, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _no_states_of_fp16(self) -> Config:
        if self._states_like_masters and self.low_masters and self.fp16.enabled:
            raise ValueError(
                "optimizer.params.fp32_optimizer_states is false, and masters are fp16, by "
                "fp16_master_weights_and_grads: state beside them is kept in fp32; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _one_wire(self) -> Config:
        quantized, wire = self.zero_optimization.zero_quantized_gradients, self.zerort.wire
        if quantized and wire not in (None, _QUANTIZED):
            raise ValueError(
                f'zero_optimization.zero_quantized_gradients is zerort.wire "{_QUANTIZED}", and '
                f"zerort.wire is {shown(wire)}: give one"
            )
        feedback = self.zerort.wire_error_feedback
        if feedback in (True, "checkpoint") and self.wire != _QUANTIZED:
            raise ValueError(
                f"zerort.wire_error_feedback is {shown(feedback)}, and only zerort.wire "
                f'"{_QUANTIZED}" has error feedback: leave one out'
            )
        return self

    @model_validator(mode="after")
    def _one_bucket_size(self) -> Config:
        if (
            self.zero_optimization.reduce_bucket_size is not None
            and self.zerort.bucket_bytes is not None
        ):
            raise ValueError(
                "zerort.bucket_bytes and zero_optimization.reduce_bucket_size are both given; "
                "give one"
            )
        return self
