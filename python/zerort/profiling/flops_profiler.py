"""The flops profiler without an engine, under DeepSpeed's names: `get_model_profile`, which runs a
model, and `FlopsProfiler`, around forwards of the caller's own.

Flops are torch's `FlopCounterMode`'s, with what it takes for none added (`formulas`). Whatever is
raised meanwhile, nothing of it stays on the model or in torch.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zerort.device import Device, device_for
from zerort.errors import ConfigError
from zerort.profiling.costs import Cost, cost, tree
from zerort.profiling.form import Form, Iteration, Peak, Times
from zerort.profiling.recording import Recording
from zerort.profiling.strings import (
    duration_to_string,
    macs_to_string,
    number_to_string,
    params_to_string,
)

__all__ = ["FlopsProfiler", "get_model_profile"]


class FlopsProfiler:
    """Counts the flops of `model`'s forwards between `start_profile` and `stop_profile`.

    With `ds_engine`, a `zerort.Engine`, the report has its ranks and batch too, and what its timers
    say of backward and step. `recompute_fwd_factor` is the part of the forward that the backward
    computes anew. `peak` is what the device does at most, in flops a second; None looks the device
    up. Raises `ConfigError` for a model on a device that is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        ds_engine: Any = None,
        recompute_fwd_factor: float = 0.0,
        *,
        peak: float | None = None,
    ) -> None:
        self.model = model
        self.ds_engine = ds_engine
        self.recompute_fwd_factor = recompute_fwd_factor
        self.peak = peak
        self.started = False
        self._device = _device_of(model)
        self._recording = Recording(model, self._device)

    def start_profile(self, ignore_list: Collection[type[nn.Module]] | None = None) -> None:
        """Begins anew; modules of the classes of `ignore_list` count as part of their callers."""
        self._recording.stop()
        self._recording = Recording(self.model, self._device, ignore_list or ())
        self._recording.start()
        self.started = True

    def stop_profile(self) -> None:
        """Takes everything off the model; the numbers stay.

        Behind the backward, which is not counted, where compiled modules compute activations anew:
        until here they run uncompiled.
        """
        self._recording.stop()

    def reset_profile(self) -> None:
        """Drops the numbers; a profile under way goes on from zero."""
        self._recording.reset()

    def end_profile(self) -> None:
        """Stops, and drops the numbers."""
        self._recording.stop()
        self._recording.reset()
        self.started = False

    def get_total_flops(self, as_string: bool = False) -> int | str:
        """Floating-point operations of the forwards."""
        flops = self._total().flops
        return number_to_string(flops) if as_string else flops

    def get_total_macs(self, as_string: bool = False) -> int | str:
        """Multiply-accumulates of the forwards; a flop is half of one."""
        macs = self._total().macs
        return macs_to_string(macs) if as_string else macs

    def get_total_params(self, as_string: bool = False) -> int | str:
        """Elements of the model's parameters; at stage 3 of whole ones."""
        params = self._total().params
        return params_to_string(params) if as_string else params

    def get_total_duration(self, as_string: bool = False) -> float | str:
        """Seconds of the forwards."""
        seconds = self._total().seconds
        return duration_to_string(seconds) if as_string else seconds

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | os.PathLike[str] | None = None,
    ) -> None:
        """Prints the report, or writes it to `output_file`, which is overwritten; nothing before
        `start_profile` and after `end_profile`.

        `module_depth` is how many depths the aggregated part has, -1 for all but the deepest, and
        `top_modules` how many classes at each. Raises `OSError` where the file cannot be written.
        """
        if self.started:
            form = Form(module_depth, top_modules, detailed)
            root = tree(self.model, self._recording)
            peak = Peak.of(self._device, _first_of(self.model).dtype, self.peak)
            from zerort.profiling import report  # noqa: PLC0415 - it brings rich along

            report.write(root, form, profile_step, self._iteration(), peak, output_file)

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        """Prints the classes of modules that cost most at each depth."""
        if self.started:
            form = Form(module_depth, top_modules)
            from zerort.profiling import report  # noqa: PLC0415 - it brings rich along

            report.show_aggregated(tree(self.model, self._recording), form)

    def _total(self) -> Cost:
        return cost(self.model, self._recording)

    def _iteration(self) -> Iteration | None:
        engine = self.ds_engine
        if engine is None:
            return None
        world, micro = engine.world_size, engine.train_micro_batch_size_per_gpu()
        times = engine.get_wall_clock_timers()
        if not times:
            return Iteration(world, micro)
        count = engine.gradient_accumulation_steps()
        window = Times(*(times[name] / 1e3 / count for name in ("fwd", "bwd", "step")))
        return Iteration(world, micro, window, self.recompute_fwd_factor)


def get_model_profile(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | os.PathLike[str] | None = None,
    ignore_modules: Collection[type[nn.Module]] | None = None,
    mode: str = "forward",
    *,
    peak: float | None = None,
) -> tuple[int | str, int | str, int | str]:
    """(flops, MACs, parameters) of one call of `model` in evaluation mode: strings, or numbers.

    The input is zeros of `input_shape` in the dtype and on the device of the first parameter, or
    `args` and `kwargs`. `warm_up` calls come first. `mode` "generate" calls `model.generate`. The
    mode of training of each module is put back. Raises `ConfigError` for what is no module, for no
    input and for an unknown mode, whatever the model raises, and `OSError` where `output_file`
    cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError("model must be a PyTorch module")
    given = _inputs(model, input_shape, args), dict(kwargs or {})
    if not any(given):
        raise ConfigError("args and/or kwargs must be specified if input_shape is None")
    call = _call(model, mode)
    profiler = FlopsProfiler(model, peak=peak)
    with _evaluating(model):
        for _ in range(warm_up):
            call(*given[0], **given[1])
        profiler.start_profile(ignore_list=ignore_modules)
        try:
            with profiler._recording.within(model):
                call(*given[0], **given[1])
        finally:
            profiler.stop_profile()
    if print_profile:
        profiler.print_model_profile(warm_up, module_depth, top_modules, detailed, output_file)
    return (
        profiler.get_total_flops(as_string),
        profiler.get_total_macs(as_string),
        profiler.get_total_params(as_string),
    )


def _inputs(model: nn.Module, shape: tuple[int, ...] | None, args: Sequence[Any]) -> Sequence[Any]:
    if shape is None:
        return args
    if type(shape) is not tuple:
        raise ConfigError("input_shape must be a tuple")
    if not shape:
        raise ConfigError("input_shape must have at least one element")
    first = next(model.parameters(), torch.empty(0))
    return [torch.zeros(shape, dtype=first.dtype, device=first.device)]


def _call(model: nn.Module, mode: str) -> Any:
    if mode == "forward":
        return model
    if mode == "generate":
        if callable(getattr(model, "generate", None)):
            return model.generate
        raise ConfigError(f'mode "generate": {type(model).__name__} has no method generate')
    raise ConfigError(f'mode: expected "forward" or "generate", got {mode!r}')


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def _device_of(model: nn.Module) -> Device:
    place = _first_of(model).device
    # Without values there is nothing to run on, and shapes are counted all the same.
    return device_for(torch.device("cpu") if place.type == "meta" else place)


def _first_of(model: nn.Module) -> torch.Tensor:
    return next(model.parameters(), torch.empty(0))
