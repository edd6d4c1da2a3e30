"""What is written of a step: loss, learning rate, loss scale, and the readings of other features.

What it guarantees: losses belong to the window that is voted on. Those of a window that failed or
was dropped are in no mean, no graph is kept, and nothing is read from the device before the
boundary, where the host has waited for the vote already.

What it does not do: a loss that the engine is never handed (`loss.backward()`) is not seen; a
window with no other has no `train_loss`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from zerort.features.monitors import is_on, open_members
from zerort.features.monitors.monitor import Monitor
from zerort.features.site import Site
from zerort.step.events import Crossing, Feature

__all__ = ["OFF", "Monitored", "Reporting"]

_log = logging.getLogger("zerort")

OFF = Monitor(enabled=False)
"""Of an engine without monitors."""


class Monitored(Feature):
    """A rank of a job that is monitored; it writes nothing."""

    name = "monitors"

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    @staticmethod
    def open(site: Site) -> Monitored | None:
        """Where the configuration asks for a monitor; it is written on rank 0."""
        if not is_on(site.config):
            return None
        if not site.is_first:
            return Monitored(Monitor(enabled=True))
        return Reporting(Monitor(open_members(site.config), enabled=True), site)

    def close(self) -> None:
        """Closes the members."""
        self.monitor.close()


class Reporting(Monitored):
    """Rank 0, which writes at each boundary."""

    def __init__(self, monitor: Monitor, site: Site) -> None:
        super().__init__(monitor)
        self._boundary = site.parts.boundary
        self._device = site.parts.mesh.device
        self._scales = site.parts.precision.mode.is_half
        self._others = site.features  # the list itself: further ones are opened later
        self._losses: list[Tensor] = []
        self._voted: list[Tensor] = []
        self._fails = False

    def backward(self, loss: Tensor, steps: int) -> bool:
        """Keeps a copy of the loss, which the user may change, and a graph's replay overwrite."""
        self.scaled(loss.detach())
        return False

    def scaled(self, loss: Tensor) -> None:
        """The same of one whose backward was the user's own."""
        self._losses.append(loss.reshape(()).to(self._device, torch.float32, copy=True))

    def before_vote(self, *, failed: bool) -> None:
        """The window ends here, whatever becomes of it."""
        self._voted, self._losses = self._losses, []

    def dropped(self) -> None:
        """What the window has seen does not count."""
        self._voted, self._losses = [], []

    def crossed(self, crossing: Crossing) -> None:
        """Writes."""
        losses, self._voted = self._voted, []
        try:
            events = [(name, value, crossing.samples) for name, value in self._values(losses)]
        except Exception as error:  # another feature's reading; it only observes, as this does
            if not self._fails:
                self._fails = True
                _log.warning(
                    "what monitors show of a step raised %s: %s; it is not written",
                    type(error).__name__,
                    error,
                    exc_info=error,
                )
            return
        self.monitor.write_events(events)

    def _values(self, losses: list[Tensor]) -> Iterator[tuple[str, float]]:
        if losses:
            yield "Train/Samples/train_loss", torch.stack(losses).mean().item()
        yield "Train/Samples/lr", float(self._boundary.optimizer.optimizer.param_groups[0]["lr"])
        if self._scales:
            yield "Train/Samples/loss_scale", self._boundary.loss_scale.scale
        for feature in self._others:
            yield from feature.readings()
