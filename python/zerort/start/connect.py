"""The configuration, and the mesh that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from zerort.config import Config
from zerort.device import place_of
from zerort.mesh import Mesh, meet, usual_device
from zerort.start import agreed
from zerort.start.compare import compare_settings

__all__ = ["connected"]

_UNTIL_READ = timedelta(minutes=5)
"""The time-out of the ranks' first meeting: the configuration's is not known yet."""


def connected(read: Callable[[], Config], model: Any, undo: ExitStack) -> tuple[Config, Mesh]:
    """What all ranks were configured with, and their mesh, which `undo` gives back."""
    control = meet(_UNTIL_READ)
    undo.callback(control.close)
    settings, device = agreed(control, lambda: (read(), _device_of(model)))
    compare_settings(control, settings, device)
    mesh = Mesh(control, device, timedelta(seconds=settings.zerort.timeout))
    undo.callback(mesh.close)
    return settings, mesh


def _device_of(model: Any) -> torch.device:
    """Where the model will be trained: on the accelerator that it is on, if it is on one."""
    place = place_of(model.named_parameters()) if isinstance(model, nn.Module) else None
    return place or usual_device()
