"""`flops_profiler`: what one forward costs, by module, reported at the boundary of one step.

The first forward of the step's window that trains is counted, on all ranks alike, so that nothing
depends on the rank; rank 0 reports. What torch.compile has compiled runs uncompiled in it, and in
its backward, where activations that are computed anew have to be the same. The times of forward,
backward and step are the window's, a micro-batch's share: they begin and end with the events of a
step, so that a pause between `backward` and `step` is the backward's.

Nothing here makes the host wait before the report. A checkpoint holds nothing of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zerort.config.features import FlopsProfiler
from zerort.device import Device, device_for
from zerort.errors import ConfigError, StepError
from zerort.features.site import Site
from zerort.grads.tasks import in_backward
from zerort.profiling.costs import tree
from zerort.profiling.form import Form, Iteration, Peak, Times
from zerort.profiling.laps import Laps
from zerort.profiling.recording import Recording
from zerort.step.events import Crossing, Feature

__all__ = ["FlopsProfile"]

_log = logging.getLogger("zerort")


class _Window:
    """The window that is profiled, as far as it has come."""

    def __init__(self, device: Device, samples: int) -> None:
        self.recording: Recording | None = None
        self.laps = Laps(device)
        self.samples = samples
        """Of the boundaries before it."""
        self.micro_batches = 1
        self.uncompiled = ExitStack()
        """Until the end of the micro-batch that was counted."""
        self._running: dict[str, Any] = {}

    def begin(self, part: str) -> None:
        """`part` runs from now on, unless it does already."""
        self._running.setdefault(part, self.laps.now())

    def end(self, part: str) -> None:
        """It is over, if it ran."""
        since = self._running.pop(part, None)
        if since is not None:
            self.laps.add(part, since)

    def runs(self, part: str) -> bool:
        """Whether it has not ended."""
        return part in self._running

    def times(self) -> Times | None:
        """Of a micro-batch; None where the backward was not the engine's."""
        sums = [self.laps.seconds(part) for part in ("forward", "backward", "step")]
        if None in sums:
            return None
        return Times(*((seconds or 0.0) / self.micro_batches for seconds in sums))


class FlopsProfile(Feature):
    """Profiles step `profile_step`, counted from 0."""

    name = "flops_profiler"

    def __init__(self, settings: FlopsProfiler, site: Site) -> None:
        self._settings = settings
        self._site = site
        self._device = device_for(site.parts.mesh.device)
        self._window: _Window | None = None
        self.utilisation: float | None = None
        """Of all devices, by one sample a second, as the profiled step had it; on rank 0, where the
        device's peak is known.
        """

    @classmethod
    def open(cls, site: Site) -> FlopsProfile | None:
        """Where the configuration asks for it. Raises `ConfigError` for a file that cannot be
        written.
        """
        settings = site.config.flops_profiler
        if not settings.enabled:
            return None
        if settings.output_file and site.is_first:
            _claim(Path(settings.output_file))
        return cls(settings, site)

    def forward(self) -> AbstractContextManager[None]:
        """Counts the window's first, and times all of them."""
        due = self._site.counters.global_steps == self._settings.profile_step
        if due and torch.is_grad_enabled() and not in_backward():
            return self._profiled()
        return nullcontext()

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        if self._window is None:
            self._window = _Window(self._device, self._site.counters.global_samples)
        window = self._window
        with nullcontext() if window.recording else self._counted(window):
            since = window.laps.now()
            yield
            window.laps.add("forward", since)

    @contextmanager
    def _counted(self, window: _Window) -> Iterator[None]:
        recording = Recording(self._site.module, self._device)
        with ExitStack() as held:
            held.enter_context(torch.compiler.set_stance("force_eager"))
            recording.start()
            try:
                with recording.within(self._site.module):
                    yield
            except NotImplementedError as error:
                _explain(error)
                raise
            finally:
                recording.stop()
            window.recording, window.uncompiled = recording, held.pop_all()

    def backward(self, loss: Tensor, steps: int) -> bool:
        """A backward begins."""
        if self._window is not None:
            self._window.begin("backward")
        return False

    def before_vote(self, *, failed: bool) -> None:
        """The backward is over and the step begins."""
        if self._window is not None:
            self._window.uncompiled.close()
            self._window.end("backward")
            self._window.begin("step")
            if failed:
                self._window = None

    def ended(self) -> None:
        """The micro-batch is over."""
        if self._window is None:
            return
        self._window.uncompiled.close()
        self._window.end("backward")
        self._window.micro_batches += 1
        if self._window.runs("step"):  # another rank has failed: the window begins anew
            self._window = None

    def crossed(self, crossing: Crossing) -> None:
        """Reports, at the boundary of the step."""
        window, self._window = self._window, None
        if window is not None and window.recording is not None and self._site.is_first:
            window.end("step")
            self._report(window, window.recording, crossing.samples)

    def close(self) -> None:
        """Nothing stays uncompiled."""
        if self._window is not None:
            self._window.uncompiled.close()

    def _report(self, window: _Window, recording: Recording, samples: int) -> None:
        # Imported where it is used: it brings rich along.
        from zerort.profiling import report  # noqa: PLC0415

        settings, world = self._settings, self._site.parts.mesh.world
        iteration = Iteration(
            world,
            (samples - window.samples) // world // window.micro_batches,
            window.times(),
            settings.recompute_fwd_factor,
        )
        form = Form(settings.module_depth, settings.top_modules, settings.detailed)
        root, step = tree(self._site.module, recording), settings.profile_step
        peak = Peak.of(self._device, self._dtype(), self._site.config.zerort.peak_flops)
        if peak is not None and iteration.micro_batch:
            passes = 3.0 + settings.recompute_fwd_factor
            needed = passes * root.cost.flops / iteration.micro_batch
            self.utilisation = needed / (peak.flops * world)
        try:
            report.write(root, form, step, iteration, peak, settings.output_file)
        except OSError as error:
            # The step stands, and training does not end for a report.
            _log.error("flops_profiler.output_file: %s; the report is printed", error)
            report.write(root, form, step, iteration, peak)

    def _dtype(self) -> torch.dtype:
        """What most is computed in."""
        mode, first = self._site.parts.precision.mode, next(self._site.module.parameters())
        return mode.autocast or mode.compute or first.dtype


def _explain(error: NotImplementedError) -> None:
    """Raises `StepError` where it is torch that has no formula."""
    if "no rule registered for HOP" in str(error):
        raise StepError(
            f"flops_profiler: this torch cannot count what the forward calls: {error}. Leave "
            "flops_profiler out, or take a newer torch"
        ) from error


def _claim(path: Path) -> None:
    """Writes nothing, by the way in which the report will be written."""
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        was_there = path.exists()
        path.open("a", encoding="utf-8").close()
        if not was_there:
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"flops_profiler.output_file: expected a file that can be written, got '{path}': "
            f"{error}. Name another path, or leave it out to have the report printed"
        ) from error
