"""What DeepSpeed's callers find on the optimizer that `initialize` returns.

It is the torch optimizer itself, which schedulers and user code may go on holding; it has some
attributes more, and DeepSpeed's classes of optimizers call it an instance of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zerort.compat.deepspeed.stage3 import ParameterOffload
from zerort.engine import Engine

__all__ = [
    "DeepSpeedOptimizer",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "LossScaler",
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


@dataclass
class LossScaler:
    """What `optimizer.loss_scaler` says, and `loss_scale_config`, which DeepSpeed has at stage 0: a
    report. To change it changes nothing.
    """

    dynamic: bool
    scale_window: int
    min_scale: float
    cur_scale: float = 1.0
    cur_iter: int = 0
    """Boundaries so far, skipped ones too."""
    scale_factor: float = 2.0

    @property
    def loss_scale(self) -> float:
        """`cur_scale`."""
        return self.cur_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        """`dynamic`."""
        return self.dynamic

    @property
    def min_loss_scale(self) -> float:
        """`min_scale`."""
        return self.min_scale


def mark(engine: Engine) -> None:
    """Gives `engine`'s optimizer what DeepSpeed's has."""
    optimizer: Any = engine.optimizer
    if optimizer is None:
        return
    optimizer._global_grad_norm = 0.0
    setattr(optimizer, _MARK, engine.zero_optimization_stage())
    scales = engine.scales_loss
    optimizer.optimizer = optimizer
    optimizer.needs_scaler = lambda: scales
    optimizer.dynamic_loss_scale = scales and engine.dynamic_loss_scale()
    fp16 = engine.config.fp16
    optimizer.loss_scaler = optimizer.loss_scale_config = LossScaler(
        optimizer.dynamic_loss_scale, fp16.loss_scale_window, fp16.min_loss_scale
    )
    if engine.zero_optimization_partition_weights():
        optimizer.parameter_offload = ParameterOffload()
    follow(engine)


def follow(engine: Engine) -> None:
    """Brings the attributes up to date: whether the last step was skipped, the loss scale, and the
    norm of the last step that was not.
    """
    optimizer: Any = engine.optimizer
    if optimizer is None:
        return
    optimizer.overflow = engine.overflow
    optimizer.loss_scale = optimizer.cur_scale = engine.loss_scale
    norm = Engine.get_global_grad_norm(engine)
    if norm is not None and not engine.overflow:
        optimizer._global_grad_norm = norm
    optimizer.loss_scaler.cur_scale = engine.loss_scale
    optimizer.loss_scaler.cur_iter = engine.global_steps
