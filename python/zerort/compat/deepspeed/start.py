"""`initialize` and `init_distributed`, by DeepSpeed's signatures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import zerort
from zerort.compat.deepspeed.engine import DeepSpeedEngine
from zerort.compat.deepspeed.failures import as_deepspeed_fails
from zerort.compat.deepspeed.optimizer import mark
from zerort.compat.deepspeed.stage3 import mark_parameters

__all__ = ["initialize"]

_log = logging.getLogger("zerort")


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
    """`zerort.initialize`, whose engine is then a `DeepSpeedEngine`.

    Keys with a dot in them, which TRL puts into a dict beside the sections they name, are ignored,
    as DeepSpeed ignores them.
    """
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
        config=_plain(config),
        mesh_param=mesh_param,
        config_params=_plain(config_params),
    )
    engine.__class__ = DeepSpeedEngine
    mark(engine)
    if engine.zero_optimization_partition_weights():
        mark_parameters(engine.module)
    assert isinstance(engine, DeepSpeedEngine)
    return engine, chosen, loader, scheduler


def _plain(config: Any) -> Any:
    """Without keys that are paths."""
    if not isinstance(config, Mapping):
        return config
    paths = [key for key in config if isinstance(key, str) and "." in key]
    if not paths:
        return config
    _log.info("no keys of a configuration, and ignored: %s", ", ".join(paths))
    return {key: value for key, value in config.items() if key not in paths}
