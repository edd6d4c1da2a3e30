"""Sections of what an engine does beside gradients (`zerort.features`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from zerort.config.section import Count, Names, Section, whole

__all__ = [
    "ActivationCheckpointing",
    "CommsLogger",
    "FlopsProfiler",
    "ProgressiveLayerDrop",
    "ThroughputTimer",
    "Timers",
]


class ThroughputTimer(Section):
    """`timers.throughput`: samples a second."""

    enabled: bool = True


class Timers(Section):
    """`timers`."""

    throughput: ThroughputTimer = Field(default_factory=ThroughputTimer)


class CommsLogger(Section):
    """`comms_logger`: what collectives have taken."""

    enabled: bool = False
    verbose: bool = False
    """A line of log for each."""
    prof_all: bool = True
    prof_ops: Names = Field(default_factory=list)
    """Names of collectives to keep, without `prof_all`."""


class ActivationCheckpointing(Section):
    """`activation_checkpointing`: nothing of it is asked for, see the table of keys."""


class ProgressiveLayerDrop(Section):
    """`progressive_layer_drop`: how often the module is asked to keep its layers."""

    enabled: bool = False
    theta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """What the share of layers that are kept falls to."""
    gamma: Annotated[float, Field(ge=0)] = 0.001
    """How fast it falls, per step."""


class FlopsProfiler(Section):
    """`flops_profiler`: a report of one step's first forward."""

    enabled: bool = False
    profile_step: Annotated[int, BeforeValidator(whole), Field(ge=0, le=2**53)] = 1
    """Steps before the one that is profiled."""
    recompute_fwd_factor: Annotated[float, Field(ge=0)] = 0.0
    """Part of the forward that the backward computes anew."""
    module_depth: Annotated[int, BeforeValidator(whole), Field(ge=-1, le=2**31 - 1)] = -1
    """Depths of modules in the aggregated part; -1 for all but the deepest."""
    top_modules: Count = 1
    """Classes of modules at each."""
    detailed: bool = True
    output_file: str | None = None
    """None is standard output."""
