"""Keys of offloading to the host, within `zero_optimization`, and their old spellings."""

from __future__ import annotations

from collections.abc import Sequence

from zerort.config.key import Key, ignored, off, refused, same

__all__ = ["ROWS"]

_DISK = "of offloading to disk, which is refused where it is asked for"
_OPTIMIZER = "zero_optimization.offload_optimizer"
_PARAM = "zero_optimization.offload_param"

ROWS: Sequence[Key] = (
    same(_OPTIMIZER, "where masters, sums and optimizer state are at home", off),
    same(f"{_OPTIMIZER}.device", "cpu: on the host, which steps; nothing on a CPU engine"),
    same(f"{_OPTIMIZER}.pin_memory", "page-locked memory for what is copied"),
    same(f"{_OPTIMIZER}.ratio", "stage 3: how much of the trained elements"),
    ignored(f"{_OPTIMIZER}.nvme_path", _DISK),
    ignored(f"{_OPTIMIZER}.buffer_count", _DISK),
    ignored(f"{_OPTIMIZER}.fast_init", _DISK),
    ignored(f"{_OPTIMIZER}.pipeline_read", _DISK),
    ignored(f"{_OPTIMIZER}.pipeline_write", _DISK),
    ignored(f"{_OPTIMIZER}.pipeline", _DISK),
    ignored(f"{_OPTIMIZER}.convert_grad_on_cpu", "sums are the device's, in fp32 from the start"),
    ignored(f"{_OPTIMIZER}.cpuadam_cores_perc", "of super_offload; torch's threads step"),
    refused(f"{_OPTIMIZER}.super_offload", "it is not built; every bucket travels by itself"),
    same(_PARAM, "where shards of parameters are at home at stage 3; below it nothing", off),
    same(f"{_PARAM}.device", "cpu: on the host, copied before they are gathered"),
    same(f"{_PARAM}.pin_memory", "page-locked memory for shards"),
    ignored(f"{_PARAM}.nvme_path", _DISK),
    ignored(f"{_PARAM}.buffer_count", _DISK),
    ignored(f"{_PARAM}.buffer_size", _DISK),
    ignored(f"{_PARAM}.max_in_cpu", _DISK),
    same("zero_optimization.cpu_offload", "the old spelling of offload_optimizer"),
    same("zero_optimization.cpu_offload_param", "the old spelling of offload_param"),
    same("zero_optimization.cpu_offload_params", "the oldest spelling of offload_param"),
    same("zero_optimization.cpu_offload_use_pin_memory", "pin_memory of the old spellings"),
)
