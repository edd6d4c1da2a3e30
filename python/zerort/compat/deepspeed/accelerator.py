"""DeepSpeed's `get_accelerator()`: one object with the calls of torch's device modules.

What `torch.cuda` has by the same name is handed on; on the CPU, where there is nothing to order and
nothing to count, streams are None, contexts do nothing and memory is the process's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from zerort.device import default_place

__all__ = ["TORCH_INFO", "Accelerator", "get_accelerator", "set_accelerator"]

TORCH_INFO = {
    "version": ".".join(torch.__version__.split(".")[:2]),
    "cuda_version": torch.version.cuda or "0.0",
    "hip_version": torch.version.hip or "0.0",
    "nccl_version": "0.0",
    "bf16_support": True,
}
"""What DeepSpeed's extensions were built against: here torch as it is; "0.0" is what is unknown."""

_PASSED = (
    "current_stream",
    "default_stream",
    "empty_cache",
    "get_rng_state",
    "initial_seed",
    "is_bf16_supported",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "reset_max_memory_allocated",
    "reset_peak_memory_stats",
    "set_rng_state",
    "stream",
    "synchronize",
)
"""Of torch's device module, by their own names."""

_OLD = {
    "memory_cached": "memory_reserved",
    "max_memory_cached": "max_memory_reserved",
    "reset_max_memory_cached": "reset_peak_memory_stats",
}


class Accelerator:
    """The device that this process computes on."""

    def __init__(self, kind: str) -> None:
        self._name = kind
        self._module: Any = torch.get_device_module(kind)
        self._waits = kind == "cpu"
        self._compiler = "inductor"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        there = _OLD.get(name, name)
        if there not in _PASSED:
            raise AttributeError(f"get_accelerator() has no {name!r} here", name=name, obj=self)
        return _ON_CPU[there] if self._waits else getattr(self._module, there)

    # What kind of device it is.

    def is_synchronized_device(self) -> bool:
        """Whether a call returns when its work is done."""
        return self._waits

    use_host_timers = resolves_data_dependency = is_synchronized_device
    handles_memory_backpressure = is_synchronized_device

    def is_available(self) -> bool:
        """Whether there is such a device."""
        return self._waits or bool(self._module.is_available())

    def communication_backend_name(self) -> str:
        """The collective library that suits it."""
        return str(torch.distributed.get_default_backend_for_device(self._name))

    def device_name(self, device_index: int | None = None) -> str:
        """ "cuda", or "cuda:1"."""
        return self._name if self._waits or device_index is None else f"{self._name}:{device_index}"

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        """Within, the device is the current one."""
        if self._waits:
            return nullcontext()
        context: AbstractContextManager[Any] = self._module.device(device_index)
        return context

    def set_device(self, device_index: int) -> None:
        """Makes it the current one."""
        if not self._waits:
            self._module.set_device(device_index)

    def current_device(self) -> int:
        """The current one's index; on the CPU this process's place on its host."""
        if self._waits:
            return int(os.environ.get("LOCAL_RANK", "0"))
        return int(self._module.current_device())

    def current_device_name(self) -> str:
        """The current one's name, as torch.device takes it."""
        return self.device_name(self.current_device())

    def device_count(self) -> int:
        """How many this host has; on the CPU how many processes it has been given."""
        if self._waits:
            return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        return int(self._module.device_count())

    # Numbers.

    def is_fp16_supported(self) -> bool:
        """Whether kernels take it."""
        return True

    is_fp64_supported = is_fp16_supported

    def supported_dtypes(self) -> list[torch.dtype]:
        """What a model may compute in."""
        return [torch.float32, torch.float16, torch.bfloat16]

    def random(self) -> Any:
        """The module of random numbers."""
        return torch.random

    def default_generator(self, device_index: int) -> Any:
        """The generator of a device."""
        if self._waits:
            return torch.default_generator
        return self._module.default_generators[device_index]

    # Streams.

    @property
    def Stream(self) -> Any:
        """The class; None on the CPU."""
        return None if self._waits else self._module.Stream

    @property
    def Event(self) -> Any:
        """The class; None on the CPU."""
        return None if self._waits else self._module.Event

    def is_current_stream_capturing(self) -> bool:
        """Whether a graph is being captured."""
        return not self._waits and bool(self._module.is_current_stream_capturing())

    # Memory, in bytes.

    def total_memory(self, device_index: int | None = None) -> int:
        """The device's, or the host's."""
        if self._waits:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(self._module.get_device_properties(device_index).total_memory)

    def available_memory(self, device_index: int | None = None) -> int:
        """What is free of it."""
        if self._waits:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        return int(self._module.mem_get_info(device_index)[0])

    def pin_memory(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """A copy in memory that the device reads directly; on the CPU the tensor itself."""
        return tensor if self._waits else tensor.pin_memory()

    def is_pinned(self, tensor: Any) -> bool:
        """Whether it is in such memory."""
        return not self._waits and bool(tensor.is_pinned())

    def on_accelerator(self, tensor: Any) -> bool:
        """Whether a tensor is on this kind of device."""
        return bool(tensor.device.type == self._name)

    # The rest.

    def range_push(self, msg: str, *args: Any, **kwargs: Any) -> None:
        """Begins a range of NVTX, where there is that."""
        if self._name == "cuda":
            self._module.nvtx.range_push(msg)

    def range_pop(self, *args: Any, **kwargs: Any) -> None:
        """Ends it."""
        if self._name == "cuda":
            self._module.nvtx.range_pop()

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        """Calls it now."""
        return callback()

    def is_triton_supported(self) -> bool:
        """Whether Triton compiles for it."""
        return self._name == "cuda"

    def visible_devices_envs(self) -> list[str]:
        """The variables that choose devices."""
        return [] if self._waits else ["CUDA_VISIBLE_DEVICES"]

    def get_compile_backend(self) -> str:
        """What torch.compile is given."""
        return self._compiler

    def set_compile_backend(self, backend: str) -> None:
        """Chooses it."""
        self._compiler = backend

    def create_op_builder(self, class_name: str) -> None:
        """None: there are no kernels to be built."""

    get_op_builder = create_op_builder

    def export_envs(self) -> list[str]:
        """Prefixes of the variables that a launcher hands on."""
        return ["NCCL", "LD_LIBRARY", "PATH"]


def _tensors(kind: str) -> Any:
    def get(self: Accelerator) -> Any:
        return getattr(torch if self._waits else self._module, f"{kind}Tensor")

    return property(get, doc="The class of tensors on this device.")


for _kind in ("BFloat16", "Byte", "Double", "Float", "Half", "Int", "Long"):
    setattr(Accelerator, f"{_kind}Tensor", _tensors(_kind))


def _resident(*_: Any) -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _nothing(*_: Any) -> None:
    return None


_ON_CPU: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_PASSED, _nothing),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    "initial_seed": torch.initial_seed,
    "manual_seed": torch.manual_seed,
    "manual_seed_all": torch.manual_seed,
    "is_bf16_supported": lambda *_: True,
    "stream": nullcontext,
    **dict.fromkeys(
        ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
        _resident,
    ),
    "memory_stats": lambda *_: {"allocated_bytes.all.current": _resident()},
}


@cache
def get_accelerator() -> Accelerator:
    """The one of this process: the current accelerator, else the CPU."""
    return Accelerator(default_place().type)


def set_accelerator(accelerator: Any) -> None:
    """Nothing: the model's device decides."""
