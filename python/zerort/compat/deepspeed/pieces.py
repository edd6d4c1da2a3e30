"""Small things by DeepSpeed's names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NoReturn

import torch
from torch import Tensor

from zerort.compat.deepspeed import comm
from zerort.config import Batch, Config, load
from zerort.errors import ConfigError
from zerort.zero import OffloadDeviceEnum, OffloadStateTypeEnum

__all__ = [
    "DeepSpeedConfig",
    "OffloadDeviceEnum",
    "OffloadStateTypeEnum",
    "ZeroStageEnum",
    "clone_tensors_for_torch_save",
    "command",
    "is_compile_supported",
    "launch",
    "required_torch_version",
    "zero_wrapper_for_fp_tensor_constructor",
]


class ZeroStageEnum(IntEnum):
    """The stages by DeepSpeed's names."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class DeepSpeedConfig:
    """A configuration, read: what `DeepSpeedConfig(...)` makes is zerort's own, typed."""

    def __new__(cls, config: Any, mpu: Any = None, mesh_device: Any = None) -> Config:  # type: ignore[misc]
        """With all batch sizes, for the ranks of this job. Raises `ConfigError` for what is wrong
        in it, batch sizes that do not multiply up too.
        """
        loaded = load(config, None, None)
        return with_sizes(loaded, loaded.resolve_batch(comm.get_world_size()))


def with_sizes(config: Config, batch: Batch) -> Config:
    """It with all batch sizes, those that follow from the others too."""
    sizes = (batch.train, batch.micro, batch.accumulation)
    return config.model_copy(update=dict(zip(_SIZES, sizes, strict=True)))


def clone_tensors_for_torch_save(item: Any, device: Any = "cpu") -> Any:
    """`item`, whose tensors are copies on `device`, in lists, tuples and dicts too."""
    if isinstance(item, Tensor):
        there = item.detach().to(device)
        return there.clone() if there.data_ptr() == item.data_ptr() else there
    if isinstance(item, dict):
        made = {key: clone_tensors_for_torch_save(value, device) for key, value in item.items()}
        return made if type(item) is dict else type(item)(made)
    if isinstance(item, list | tuple):
        parts = [clone_tensors_for_torch_save(value, device) for value in item]
        return parts if isinstance(item, list) else tuple(parts)
    return item


def is_compile_supported() -> bool:
    """Whether `engine.compile` works: always."""
    return True


def required_torch_version(
    min_version: float | str | None = None, max_version: float | str | None = None
) -> bool:
    """Whether torch is of a version between these, as "2.6" or 2.6."""

    def parts(version: object) -> tuple[int, int]:
        major, minor = (str(version).split("+")[0] + ".0").split(".")[:2]
        return int(major), int(minor)

    here = parts(torch.__version__)
    return (min_version is None or here >= parts(min_version)) and (
        max_version is None or here <= parts(max_version)
    )


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> Callable[..., Any]:
    """`fn`: zero.Init leaves constructors of tensors alone, and casts parameters itself."""
    return fn


def launch(args: Any = None) -> NoReturn:
    """Raises `ConfigError`: torchrun starts the ranks."""
    raise ConfigError(
        "the command deepspeed has no launcher here: in place of `deepspeed --num_gpus=N train.py` "
        "use `torchrun --nproc_per_node=N -m zerort.compat.run train.py`"
    )


def command() -> int:
    """The command `deepspeed`: says the same, and returns 2."""
    try:
        launch()
    except ConfigError as reason:
        print(reason, file=sys.stderr)
    return 2
