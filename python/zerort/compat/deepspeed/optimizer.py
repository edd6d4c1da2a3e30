"""What DeepSpeed's callers find on the optimizer that `initialize` returns.

It is the torch optimizer itself, which schedulers and user code may go on holding; it has some
attributes more, and DeepSpeed's classes of optimizers call it an instance of theirs.
"""

from __future__ import annotations

from typing import Any

from zerort.compat.deepspeed.stage3 import ParameterOffload
from zerort.engine import Engine

__all__ = [
    "DeepSpeedOptimizer",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "ZeROOptimizer",
    "follow",
    "mark",
]

_MARK = "_deepspeed_stage"


class _Marked(type):
    """Has instances that were never made by it."""

    stages: frozenset[int]

    def __instancecheck__(cls, instance: object) -> bool:
        return getattr(instance, _MARK, None) in cls.stages


class DeepSpeedOptimizer(metaclass=_Marked):
    """Every optimizer that `initialize` has returned."""

    stages = frozenset({0, 1, 2, 3})


class ZeROOptimizer(DeepSpeedOptimizer):
    """One whose state is sharded."""

    stages = frozenset({1, 2, 3})


class DeepSpeedZeroOptimizer(ZeROOptimizer):
    """One whose parameters are not."""

    stages = frozenset({1, 2})


class DeepSpeedZeroOptimizer_Stage3(ZeROOptimizer):
    """One whose parameters are sharded too."""

    stages = frozenset({3})


def mark(engine: Engine) -> None:
    """Gives `engine`'s optimizer what DeepSpeed's has."""
    optimizer: Any = engine.optimizer
    if optimizer is None:
        return
    setattr(optimizer, _MARK, engine.zero_optimization_stage())
    scales = engine.scales_loss
    optimizer.optimizer = optimizer
    optimizer.needs_scaler = lambda: scales
    optimizer.dynamic_loss_scale = scales and engine.dynamic_loss_scale()
    if engine.zero_optimization_partition_weights():
        optimizer.parameter_offload = ParameterOffload()
    follow(engine)


def follow(engine: Engine) -> None:
    """Brings the attributes up to date: whether the last step was skipped, and the loss scale."""
    optimizer: Any = engine.optimizer
    if optimizer is None:
        return
    optimizer.overflow = engine.overflow
    optimizer.loss_scale = optimizer.cur_scale = engine.loss_scale
