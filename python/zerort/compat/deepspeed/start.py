"""`initialize` and `init_distributed`, by DeepSpeed's signatures."""

from __future__ import annotations

from typing import Any

import zerort
from zerort.compat.deepspeed.engine import DeepSpeedEngine
from zerort.compat.deepspeed.failures import as_deepspeed_fails
from zerort.compat.deepspeed.optimizer import mark
from zerort.compat.deepspeed.stage3 import mark_parameters

__all__ = ["initialize"]


@as_deepspeed_fails
def initialize(
    args: Any = None,
    model: Any = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """`zerort.initialize`, whose engine is then a `DeepSpeedEngine`."""
    engine, chosen, loader, scheduler = zerort.initialize(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=config,
        mesh_param=mesh_param,
        config_params=config_params,
    )
    engine.__class__ = DeepSpeedEngine
    mark(engine)
    if engine.zero_optimization_partition_weights():
        mark_parameters(engine.module)
    assert isinstance(engine, DeepSpeedEngine)
    return engine, chosen, loader, scheduler
