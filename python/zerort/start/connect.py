"""The configuration, and the mesh that it asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from zerort.config import Config
from zerort.device import place_of
from zerort.errors import ConfigError
from zerort.mesh import Hierarchy, Mesh, arrange, meet, this_seat, usual_device
from zerort.start import agreed
from zerort.start.compare import compare_settings
from zerort.wire import FORMATS

__all__ = ["connected", "hierarchy_of", "log_transport", "started"]

_log = logging.getLogger("zerort")

_STARTING = timedelta(minutes=5)
"""How long ranks wait for one another while they start, at least. The configured time-out is for
steps: ranks read a model or a dataset, and import what they need, at very different speeds.
"""


def connected(read: Callable[[], Config], model: Any, undo: ExitStack) -> tuple[Config, Mesh]:
    """What all ranks were configured with, and their mesh, which `undo` gives back.

    Until `started` its control group has the time-out of a start.
    """
    control = meet(_STARTING)
    undo.callback(control.close)
    settings, device = agreed(control, lambda: (read(), _device_of(model)))
    compare_settings(control, settings, device)
    timeout = timedelta(seconds=settings.zerort.timeout)
    control.set_timeout(max(timeout, _STARTING))
    transport = settings.zerort.transport
    if transport == "shared" and device.type != "cpu":
        raise ConfigError(
            'zerort.transport: "shared" is memory of the host, and this model is on '
            f'{device.type}; leave it out, or give "auto"'
        )
    asked = hierarchy_of(settings, on_host=device.type == "cpu")
    seats = agreed(control, lambda: control.gather_objects(this_seat()))
    arrangement = agreed(control, lambda: arrange(seats, asked))
    mesh = Mesh(control, device, timeout, transport=transport, arrangement=arrangement)
    undo.callback(mesh.close)
    if arrangement.remark is not None and mesh.rank == 0:
        _log.info("gradients are reduced among all ranks at once: %s", arrangement.remark)
    return settings, mesh


def hierarchy_of(settings: Config, *, on_host: bool) -> Hierarchy:
    """What is asked of the arrangement of ranks, which train on their hosts or on accelerators."""
    choice, zero = settings.zerort.hierarchy, settings.zero_optimization
    size = zero.mics_shard_size
    wire = FORMATS.get(settings.zerort.wire or "")
    quantized = zero.zero_quantized_gradients
    adds = not quantized and (wire is None or wire.adds)  # those that follow a dtype do
    return Hierarchy(
        choice,
        not on_host and adds,
        size if size > 0 else None,
        zero.secondary_size,
    )


def started(mesh: Mesh, settings: Config) -> None:
    """From now on ranks wait for one another as long as is configured."""
    mesh.control.set_timeout(timedelta(seconds=settings.zerort.timeout))


def log_transport(settings: Config, mesh: Mesh) -> None:
    """By what gradients and parameters go, where that was asked for and takes memory."""
    if settings.zerort.transport == "shared" and mesh.shared_bytes:
        _log.info(
            "gradients and parameters go through memory that the ranks of this host share, %d "
            "bytes a rank, the memory of buckets in flight among them",
            mesh.shared_bytes,
        )


def _device_of(model: Any) -> torch.device:
    """Where the model will be trained: on the accelerator that it is on, if it is on one."""
    place = place_of(model.named_parameters()) if isinstance(model, nn.Module) else None
    return place or usual_device()
