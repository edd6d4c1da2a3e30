"""The configuration, and the communicator that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from zerort.config import Config
from zerort.device import place_of
from zerort.errors import PlanError
from zerort.mesh import Comm, Consensus, connect
from zerort.start.compare import compare_settings

__all__ = ["agreed", "connected"]

T = TypeVar("T")


def connected(read: Callable[[], Config], model: Any) -> tuple[Config, Comm]:
    """The configuration, and a communicator with its time-out; until it is read, the default has to
    do.
    """
    default = timedelta(minutes=5)
    device = _device_of(model)
    comm = connect(default, device)
    try:
        settings = agreed(comm, read)
        compare_settings(comm, settings)
    except BaseException:
        comm.close()
        raise
    wanted = timedelta(seconds=settings.zerort.timeout)
    if wanted != default:
        comm.close()
        comm = connect(wanted, device)
    return settings, comm


def agreed(comm: Comm, attempt: Callable[[], T]) -> T:
    """Runs `attempt` on all ranks. Where it raised on one, that rank raises its own error and the
    others `PlanError` with its reason.
    """
    return Consensus(comm, PlanError).agree("no rank starts, because one cannot", attempt)


def _device_of(model: Any) -> torch.device | None:
    """The accelerator the model is on already, if it is on one; what cannot be trained is refused
    later.
    """
    if not isinstance(model, nn.Module):
        return None
    try:
        return place_of(model.named_parameters())
    except Exception:
        return None  # raised again where the peers hear of it
