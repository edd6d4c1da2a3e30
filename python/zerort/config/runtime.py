"""The section `zerort`: what DeepSpeed has no key for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from zerort.config.monitors import Mlflow
from zerort.config.problems import shown
from zerort.config.section import Count, Section, Size, whole

__all__ = ["CheckpointPolicy", "Loader", "Runtime", "Trace"]


class Trace(Section):
    """`zerort.trace`: where runtime events go."""

    enabled: bool = True
    path: str | None = None
    """File per run; the rank is put into its name. None writes nothing."""
    capacity: Count = 1 << 18
    """Events kept in the ring."""

    @property
    def active(self) -> bool:
        """Whether events are recorded."""
        return self.enabled and self.path is not None


class Loader(Section):
    """`zerort.loader`: the loader that `initialize` makes from training_data."""

    workers: Annotated[int, BeforeValidator(whole), Field(ge=0, le=1024)] = 0
    """Processes of each rank that fetch samples; 0 fetches them in the rank's own."""
    persistent_workers: bool = False
    """Workers stay from one epoch to the next."""
    pin_memory: bool = True
    """Batches go through page-locked memory; without effect on a CPU."""


class CheckpointPolicy(Section):
    """`zerort.checkpoint`: saving and loading; the first three are defaults of `save_checkpoint`'s
    keywords.
    """

    overwrite: bool = False
    keep_last: Count | None = None
    asynchronous: bool = False
    """State is copied, and written beside training."""
    timeout: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds that a rank may write or read nothing while the others wait for it."""


def _hierarchy(value: Any) -> Any:
    inner = whole(value["inner"]) if isinstance(value, dict) and [*value] == ["inner"] else None
    if value not in ("auto", "flat") and not (type(inner) is int and inner > 0):
        raise ValueError(
            f'expected "auto", "flat" or {{"inner": ranks of a host}}, got {shown(value)}'
        )
    return value if inner is None else inner


class Runtime(Section):
    """`zerort`: what DeepSpeed has no key for."""

    window: Count | Literal["all"] | None = None
    """Launched and unretired buckets; None lets the back end choose."""
    bucket_bytes: Size | None = None
    """Upper bound of a bucket in bytes, instead of `reduce_bucket_size`."""
    tune: bool = False
    """Before the first update buckets and window are chosen by what is measured."""
    wire: str | None = None
    """Name of a wire format; None follows `communication_data_type`."""
    wire_error_feedback: Literal["auto", "checkpoint"] | bool = "auto"
    """Whether what "int8" rounds off is added to the next gradient, and is in checkpoints; "auto"
    where no rank shards gradients.
    """
    hierarchy: Annotated[Literal["auto", "flat"] | int, BeforeValidator(_hierarchy)] = "auto"
    """Whether gradients are summed inside hosts before they leave them; a number is how many
    consecutive ranks are as one host.
    """
    reduce_at: Literal["micro_batch", "boundary"] | None = None
    """When gradients are reduced; None means at the boundary below stage 2, from there on in every
    micro-batch.
    """
    publish: Literal["auto", "overlapped", "step"] = "auto"
    """Whether `step` waits for the other ranks' updated parameters, or modules of the next forward
    do; "auto" measures what there is to win.
    """
    transport: Literal["auto", "gloo", "shared"] = "auto"
    """What carries gradients and parameters between ranks on CPU; "auto" shares memory where all
    ranks of a group can.
    """
    reshard_after_forward: bool | None = None
    """Stage 3 in FSDP2's words: true is the smallest room, false room for the whole model; None
    follows `stage3_max_live_parameters`.
    """
    whole_padding: Annotated[float, Field(ge=0, le=1000)] = 0.1
    """How much longer a bucket may become, as a share of its length, so that no border between
    shards cuts a parameter which the optimizer has to see whole; where it is not enough, the
    parts are exchanged at the boundary.
    """
    load_from: str | None = None
    """Stage 3: a safetensors file, its index or their folder, for parameters on the meta device."""
    on_nonfinite: Literal["skip", "raise"] = "skip"
    unused_parameters: Literal["zero", "raise"] | None = None
    """A parameter without a gradient: None follows `ignore_unused_parameters`."""
    sparse_gradients: Literal["refuse", "densify"] = "refuse"
    timeout: Annotated[float, Field(ge=1, le=2_000_000)] = 300.0
    """Seconds a rank waits for its peers; the largest is what 31 bits of milliseconds hold."""
    peak_flops: Annotated[float, Field(gt=0)] | None = None
    """Floating-point operations that one device does a second at most; None looks it up."""
    trace: Trace = Field(default_factory=Trace)
    mlflow: Mlflow = Field(default_factory=Mlflow)
    loader: Loader = Field(default_factory=Loader)
    checkpoint: CheckpointPolicy = Field(default_factory=CheckpointPolicy)
