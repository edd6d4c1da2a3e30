"""Every name that is answered for, by DeepSpeed's modules. What is not here is a placeholder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed

import zerort
from zerort.compat.deepspeed import (
    accelerator,
    adam,
    comm,
    engine,
    experts,
    logging,
    ops,
    optimizer,
    pieces,
    settings,
    stage3,
    start,
)
from zerort.compat.deepspeed.groups import GROUPS
from zerort.compat.deepspeed.placeholder import placeholder
from zerort.errors import ConfigError
from zerort.optim.cycles import LRRangeTest, OneCycle
from zerort.optim.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR
from zerort.profiling import flops_profiler
from zerort.start.loader import TrainingLoader
from zerort.utils import zero_to_fp32
from zerort_as_deepspeed.version import SURFACE, VERSION

__all__ = ["FURTHER", "MODULES", "placeholder"]


def _of(module: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names or module.__all__}


_major, _minor, _patch = SURFACE.split(".")

_SCHEDULES = (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)

_OPTIMIZERS = {
    "ADAGRAD_OPTIMIZER": "adagrad",
    "ADAM_OPTIMIZER": "adam",
    "ADAMW_OPTIMIZER": "adamw",
    "LAMB_OPTIMIZER": "lamb",
    "ONEBIT_ADAM_OPTIMIZER": "onebitadam",
    "ZERO_ONE_ADAM_OPTIMIZER": "zerooneadam",
    "ONEBIT_LAMB_OPTIMIZER": "onebitlamb",
    "MUADAM_OPTIMIZER": "muadam",
    "MUADAMW_OPTIMIZER": "muadamw",
    "MUSGD_OPTIMIZER": "musgd",
    "LION_OPTIMIZER": "lion",
    "MUON_OPTIMIZER": "muon",
}
"""What DeepSpeed calls the values of `optimizer.type`, those that are refused too."""

_SCHEDULE_KEYS = (
    "lr_range_test_min_lr",
    "lr_range_test_step_rate",
    "lr_range_test_step_size",
    "lr_range_test_staircase",
    "cycle_first_step_size",
    "cycle_first_stair_count",
    "cycle_second_step_size",
    "cycle_second_stair_count",
    "decay_step_size",
    "cycle_min_lr",
    "cycle_max_lr",
    "decay_lr_rate",
    "cycle_min_mom",
    "cycle_max_mom",
    "decay_mom_rate",
    "warmup_min_lr",
    "warmup_max_lr",
    "warmup_num_steps",
    "warmup_type",
    "warmup_min_ratio",
    "cos_min_ratio",
    "total_num_steps",
)

_schedules = {
    **{schedule.__name__: schedule for schedule in _SCHEDULES},
    "VALID_LR_SCHEDULES": [schedule.__name__ for schedule in _SCHEDULES],
    "LR_SCHEDULE": "lr_schedule",
    "LR_RANGE_TEST": "LRRangeTest",
    "ONE_CYCLE": "OneCycle",
    "WARMUP_LR": "WarmupLR",
    "WARMUP_DECAY_LR": "WarmupDecayLR",
    "WARMUP_COSINE_LR": "WarmupCosineLR",
    **{name.upper(): name for name in _SCHEDULE_KEYS},
    "WARMUP_LOG_RATE": "log",
    "WARMUP_LINEAR_RATE": "linear",
}

_zero = {
    **_of(zerort.zero, ("GatheredParameters", "Init", "ZeroParamStatus")),
    **_of(zerort.zero, ("register_external_parameter", "unregister_external_parameter")),
    **_of(stage3, ("unwrap_model_for_generation",)),
}
_partition = {
    **_zero,
    **_of(accelerator, ("get_accelerator", "set_accelerator")),
    "_orig_torch_arange": torch.arange,
    "zero_wrapper_for_fp_tensor_constructor": pieces.zero_wrapper_for_fp_tensor_constructor,
}
_leaves = {name: getattr(zerort.utils, name) for name in dir(zerort.utils) if "z3_leaf" in name}
_safe = {name: getattr(zerort.utils, name) for name in dir(zerort.utils) if name.startswith("safe")}
_accelerator = _of(accelerator, ("get_accelerator", "set_accelerator"))
_logging = _of(logging, ("log_dist", "log_dist_once", "logger", "set_log_level_from_string"))
_optimizer = {"DeepSpeedOptimizer": optimizer.DeepSpeedOptimizer}
_loaders = {
    "RepeatingLoader": zerort.utils.RepeatingLoader,
    "DeepSpeedDataLoader": TrainingLoader,
}
_config = {"DeepSpeedConfig": pieces.DeepSpeedConfig, "DeepSpeedConfigError": ConfigError}
_engine = {"DeepSpeedEngine": engine.DeepSpeedEngine}
_checkpointing = {
    **_of(zerort.checkpointing),
    "CheckpointFunction": zerort.checkpointing.checkpoint,
}
_estimates = {name: getattr(zerort.zero, name) for name in dir(zerort.zero) if "estimate" in name}
_adam = _of(adam, ("FusedAdam", "DeepSpeedCPUAdam"))
_memory = _of(logging, ("see_memory_usage",))

MODULES: Mapping[str, Mapping[str, Any]] = {
    "deepspeed": {
        "__version__": VERSION,
        "__version_major__": int(_major),
        "__version_minor__": int(_minor),
        "__version_patch__": int(_patch),
        "__git_hash__": None,
        "__git_branch__": None,
        "version": VERSION,
        "git_hash": None,
        "git_branch": None,
        "HAS_TRITON": False,
        "initialize": start.initialize,
        "init_distributed": zerort.init_distributed,
        "add_config_arguments": zerort.add_config_arguments,
        "is_compile_supported": pieces.is_compile_supported,
        "dist": torch.distributed,
        **_engine,
        **_config,
        **_optimizer,
        **_accelerator,
        "DeepSpeedDataLoader": TrainingLoader,
        **_of(logging, ("log_dist", "logger")),
    },
    "deepspeed.accelerator": _accelerator,
    "deepspeed.accelerator.real_accelerator": _accelerator,
    "deepspeed.checkpoint": {},
    "deepspeed.checkpoint.utils": _of(pieces, ("clone_tensors_for_torch_save",)),
    "deepspeed.checkpointing": _checkpointing,
    "deepspeed.comm": _of(comm),
    "deepspeed.comm.comm": _of(comm),
    "deepspeed.git_version_info": {
        "version": VERSION,
        "git_hash": None,
        "git_branch": None,
        "compatible_ops": ops.COMPATIBLE,
        "torch_info": accelerator.TORCH_INFO,
    },
    "deepspeed.launcher": {},
    "deepspeed.launcher.launch": {"main": pieces.launch},
    "deepspeed.launcher.runner": {
        "DEEPSPEED_ENVIRONMENT_NAME": ".deepspeed_env",
        "main": pieces.launch,
    },
    "deepspeed.moe": {},
    "deepspeed.moe.utils": _of(experts),
    "deepspeed.ops": {"__compatible_ops__": ops.COMPATIBLE},
    "deepspeed.ops.adagrad": _of(adam, ("DeepSpeedCPUAdagrad",)),
    "deepspeed.ops.adam": _adam,
    "deepspeed.ops.adam.cpu_adam": _of(adam, ("DeepSpeedCPUAdam",)),
    "deepspeed.ops.adam.fused_adam": _of(adam, ("FusedAdam",)),
    "deepspeed.ops.lion": _of(adam, ("DeepSpeedCPULion", "FusedLion")),
    "deepspeed.ops.op_builder": ops.BUILDERS,
    "deepspeed.profiling": {},
    "deepspeed.profiling.flops_profiler": _of(flops_profiler),
    "deepspeed.profiling.flops_profiler.profiler": _of(flops_profiler),
    "deepspeed.runtime": {},
    "deepspeed.runtime.activation_checkpointing": {},
    "deepspeed.runtime.activation_checkpointing.checkpointing": _checkpointing,
    "deepspeed.runtime.base_optimizer": {
        **_optimizer,
        "ZeROOptimizer": optimizer.ZeROOptimizer,
    },
    "deepspeed.runtime.config": {
        **_config,
        **_OPTIMIZERS,
        **_of(settings, ("get_gradient_clipping", "get_log_level")),
    },
    "deepspeed.runtime.constants": settings.DEFAULTS,
    "deepspeed.runtime.dataloader": _loaders,
    "deepspeed.runtime.engine": _engine,
    "deepspeed.runtime.lr_schedules": _schedules,
    "deepspeed.runtime.precision_config": {
        **settings.PRECISIONS,
        **_of(settings, ("get_bfloat16_config", "get_float16_config")),
    },
    "deepspeed.runtime.swap_tensor": {"MIN_SWAPPABLE_BYTES": 1 << 20},
    "deepspeed.runtime.utils": _memory,
    "deepspeed.runtime.zero": _zero,
    "deepspeed.runtime.zero.config": _of(pieces, ("ZeroStageEnum",)),
    "deepspeed.runtime.zero.offload_config": _of(
        pieces, ("OffloadDeviceEnum", "OffloadStateTypeEnum")
    ),
    "deepspeed.runtime.zero.partition_parameters": _partition,
    "deepspeed.runtime.zero.stage3": {
        **_of(optimizer, ("DeepSpeedZeroOptimizer_Stage3",)),
        **_of(stage3, ("unwrap_model_for_generation",)),
        **{name: call for name, call in _estimates.items() if "zero3" in name},
    },
    "deepspeed.runtime.zero.stage_1_and_2": {
        **_of(optimizer, ("DeepSpeedZeroOptimizer",)),
        **{name: call for name, call in _estimates.items() if "zero2" in name},
    },
    "deepspeed.utils": {
        **_logging,
        **_safe,
        **_leaves,
        **_of(zerort.utils, ("RepeatingLoader", "instrument_w_nvtx")),
    },
    "deepspeed.utils.groups": GROUPS,
    "deepspeed.utils.logging": {**_logging, "print_rank_0": logging.print_rank_0},
    "deepspeed.utils.nvtx": _of(zerort.utils, ("instrument_w_nvtx",)),
    "deepspeed.utils.tensor_fragment": _safe,
    "deepspeed.utils.torch": _of(pieces, ("required_torch_version",)),
    "deepspeed.utils.z3_leaf_module": _leaves,
    "deepspeed.utils.zero_to_fp32": _of(zero_to_fp32),
    "deepspeed.zero": _zero,
    "deepspeed.zero.partition_parameters": _partition,  # both names are one there
}
"""Module -> its names."""

FURTHER: Mapping[str, Any] = {
    "deepspeed.comm": torch.distributed,
    "deepspeed.comm.comm": torch.distributed,
}
"""Module -> where a name that it lacks is looked up before it is a placeholder."""
