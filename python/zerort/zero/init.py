"""`zero.Init`: a model whose parameters are sharded as soon as each of its modules is made. Mirrors
deepspeed.zero.Init.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ContextDecorator
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from torch import nn

from zerort.config import Config, load_part
from zerort.device.random import random_states, restore_random_states
from zerort.errors import ConfigError
from zerort.memory import DTYPES, HeldBucket, Origin, Present
from zerort.mesh import Control, Mesh, is_whole_job
from zerort.zero.born import Born
from zerort.zero.building import Building
from zerort.zero.legacy import Legacy
from zerort.zero.norms import is_affine_batch_norm
from zerort.zero.nursery import Nursery

__all__ = [
    "Init",
    "born_of",
    "cast_born",
    "close_if_empty",
    "inherit",
    "opened",
    "origin_of",
    "rank_zeros_numbers",
    "stay_whole",
]

_log = logging.getLogger("zerort")

_SECTIONS = ("zero_optimization", "fp16", "bf16", "torch_autocast", "amp", "zerort")
_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_nursery: Nursery | None = None
_running: list[Init] = []
"""Those that are entered, the outermost first."""


class Init(ContextDecorator):
    """Within, a module's parameters are cut into equal parts, one a rank, when its constructor is
    over: while the model is built a rank holds its part of it, and one module. All ranks build the
    same model at the same time, on rank 0's random numbers; where a constructor has made other
    values on another rank, rank 0's count. What a constructor does to the parameters of modules
    that it has made is right, whatever it is, if all ranks do it.

    `module` is cut at once, with rank 0's values. The dtype is `dtype`, else the configuration's
    (`bf16`, `fp16`, `amp`), else each parameter's own; constructors see each parameter's own, and
    it is cast when the model is complete. Without a configuration, or with one of stage 3,
    parameters are sharded; below stage 3, and where it is not `enabled`, nothing happens. Sizes
    that are "auto" in the configuration need not be known yet. `mem_efficient_linear` and
    `pin_memory` have nothing to do here.

    Parameters keep their shapes. Their values are to be had in `GatheredParameters`, and the model
    goes to `initialize`. Raises `ConfigError` for arguments that ask for what is not built, and
    `PlanError` on all ranks where ranks build different models or one raises within.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: Any = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
    ) -> None:
        refused = {
            "mpu": mpu,
            "zero_param_parallel_group": zero_param_parallel_group,
            "zero_quantized_weights": zero_quantized_weights or None,
            "zero_quantized_nontrainable_weights": zero_quantized_nontrainable_weights or None,
            "param_swapper": param_swapper,
        }
        given = config_dict_or_path if config_dict_or_path is not None else config
        settings = None if given is None else load_part(given, _SECTIONS)
        self._enabled = enabled and (
            settings is None or settings.zero_optimization.shards_parameters
        )
        self._dtype = dtype or _dtype_of(settings)
        self._keeps_norms = dtype is None and settings is not None and settings.keeps_norms
        self._timeout = timedelta(seconds=Config().zerort.timeout)
        if settings is not None:
            self._timeout = timedelta(seconds=settings.zerort.timeout)
        if self._enabled:
            _refuse(refused, data_parallel_group, sequence_data_parallel_group, remote_device)
        self._undo: Callable[[], None] | None = None
        if module is not None and self._enabled:
            self._cut(module)

    def __enter__(self) -> Init:
        if self._enabled:
            nursery = opened(self._timeout)
            if not _running:
                nursery.meet("enters zero.Init")
                self._undo = rank_zeros_numbers(nursery)
                _building.begin()
            _running.append(self)
            nursery.building += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._enabled:
            return
        assert _nursery is not None
        try:
            if len(_running) == 1:
                _building.end(completes=error is None)
                _nursery.finish(error)
            elif error is None:
                _building.look()
        finally:
            _running.remove(self)
            _nursery.building -= 1
            if self._undo is not None:
                self._undo()
                self._undo = None

    def _cut(self, module: nn.Module) -> None:
        """Shards a module that is there already."""
        nursery = opened(self._timeout)
        for prefix, part in module.named_modules():
            for last, parameter in part.named_parameters(recurse=False):
                if _can_be_born(nursery, parameter):
                    name = f"{prefix}.{last}" if prefix else last
                    nursery.bear(parameter, name, self._dtype_in(part, parameter), source=0)
        if not _running:
            nursery.cast()

    def complete(self, module: nn.Module, made_here: Callable[[nn.Parameter], bool]) -> None:
        """A module's constructor is over."""
        assert _nursery is not None
        kind = type(module).__name__
        own = {id(one): (name, one) for name, one in module._parameters.items() if one is not None}
        ready = {name: one for name, one in own.values() if _can_be_born(_nursery, one)}
        made = {name: one for name, one in ready.items() if made_here(one)}
        alike = made.keys() - (_nursery.differing(kind, made) if made else set())
        for name, parameter in ready.items():
            source = None if name in alike else 0
            dtype = self._dtype_in(module, parameter)
            _nursery.bear(parameter, f"{kind}.{name}", dtype, source=source)

    def _dtype_in(self, module: nn.Module, parameter: nn.Parameter) -> torch.dtype:
        kept = self._keeps_norms and is_affine_batch_norm(module)
        return parameter.dtype if kept or self._dtype is None else self._dtype


def _complete(module: nn.Module, made_here: Callable[[nn.Parameter], bool]) -> None:
    _running[-1].complete(module, made_here)


def _pending(module: nn.Module) -> bool:
    assert _nursery is not None
    return any(
        parameter is not None and _can_be_born(_nursery, parameter)
        for parameter in module._parameters.values()
    )


_building = Building(_complete, _pending)


def _can_be_born(nursery: Nursery, parameter: nn.Parameter) -> bool:
    """Codes of quantised weights, masks and what is on the meta device stay as they are."""
    return nursery.born(parameter) is None and (
        parameter.dtype in DTYPES
        and not parameter.is_meta
        and parameter.layout is torch.strided
        and not nn.parameter.is_lazy(parameter)
    )


def opened(timeout: timedelta) -> Nursery:
    """The process's nursery, connected. All ranks call it."""
    nursery = _made(timeout)
    nursery.connect()
    return nursery


def _made(timeout: timedelta) -> Nursery:
    global _nursery  # noqa: PLW0603
    if _nursery is None:
        _nursery = Nursery(timeout)
    return _nursery


def rank_zeros_numbers(nursery: Nursery) -> Callable[[], None]:
    """All ranks go on with rank 0's random numbers; the result gives this rank its own back."""
    device, rank = nursery.mesh.device, nursery.mesh.rank
    own = random_states(device)
    first = nursery.mesh.control.gather_objects(own if rank == 0 else None)[0]
    if rank == 0:
        return lambda: None
    restore_random_states(first, device)
    return lambda: restore_random_states(own, device)


def _dtype_of(settings: Config | None) -> torch.dtype | None:
    if settings is None or settings.compute_dtype == "fp32":
        return None
    return _FLOATS[settings.compute_dtype]


def _refuse(refused: Mapping[str, Any], group: Any, sequence_group: Any, remote: Any) -> None:
    for name, value in refused.items():
        if value is not None:
            raise ConfigError(
                f"zero.Init({name}=...) is refused: it asks for what is not built; leave it out"
            )
    for name, given in (
        ("data_parallel_group", group),
        ("sequence_data_parallel_group", sequence_group),
    ):
        if given is not None and not is_whole_job(given):
            raise ConfigError(
                f"zero.Init({name}=...) is refused: parameters are cut among all ranks of the job; "
                "leave it out"
            )
    if remote not in (None, "none", "cpu"):  # a home on the host is taken at initialize
        raise ConfigError(
            f"zero.Init(remote_device={remote!r}) is refused: offloading to NVMe is not built; "
            "leave it out, and give zero_optimization.offload_param for a home on the host"
        )


# What `initialize` asks.


def origin_of(parameter: nn.Parameter) -> Origin:
    """Where a parameter's values are."""
    born = born_of(parameter)
    return Present(parameter) if born is None else born


def stay_whole(parameter: nn.Parameter) -> None:
    """Makes a parameter whole for good, if it is sharded. All ranks call it."""
    born = born_of(parameter)
    if born is not None:
        born.stay()


def cast_born(parameter: nn.Parameter, dtype: torch.dtype) -> bool:
    """Casts a parameter that is sharded; False where it is not."""
    born = born_of(parameter)
    if born is not None:
        born.cast(dtype)
    return born is not None


def close_if_empty(control: Control) -> None:
    """Gives back what parameters without an engine need, if no rank has any. All ranks call it."""
    global _nursery  # noqa: PLW0603
    if _running:
        return
    # a rank may have none, because an engine that others have collected is still there
    left = control.gather_objects(_nursery is not None and _nursery.part())
    if not any(left) and _nursery is not None:
        _nursery.close()
        _nursery = None


# What engines leave.


def inherit(buckets: Sequence[HeldBucket], mesh: Mesh, state: int, timeout: timedelta) -> None:
    """The engine of `mesh` has gone, when values had been published `state` times: its sharded
    parameters keep their values in `buckets`' shards. No other rank is asked.
    """
    if buckets:
        left = Legacy(mesh.control.name, mesh.shard.rank, mesh.shard.world, state)
        nursery = _made(timeout)
        for bucket in buckets:
            nursery.inherit(bucket, left)


def born_of(parameter: nn.Parameter) -> Born | None:
    """What is held of a parameter that is sharded and in no engine; else None."""
    return None if _nursery is None else _nursery.born(parameter)
