"""The configuration, and the communicator that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import nn

from zerort.config import Config
from zerort.errors import PlanError, ZerortError
from zerort.mesh import Comm, connect
from zerort.start.compare import compare_settings

__all__ = ["agreed", "connected", "device_of"]

T = TypeVar("T")


def connected(read: Callable[[], Config], device: torch.device | None) -> tuple[Config, Comm]:
    """The configuration, and a communicator with its time-out; until it is read, the default has to
    do.
    """
    default = timedelta(minutes=5)
    comm = connect(default, device)
    settings = agreed(comm, read)
    compare_settings(comm, settings)
    wanted = timedelta(seconds=settings.zerort.timeout)
    if wanted != default:
        comm.close()
        comm = connect(wanted, device)
    return settings, comm


def agreed(comm: Comm, attempt: Callable[[], T]) -> T:
    """Runs `attempt` on all ranks, and raises on all if it failed on one: its error there, its
    reason elsewhere.
    """
    result, failure = None, None
    try:
        result = attempt()
    except (ZerortError, TypeError, ValueError, RuntimeError) as error:
        failure = error
    reasons = comm.gather_objects(
        None if failure is None else f"{type(failure).__name__}: {failure}"
    )
    if failure is not None:
        raise failure
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise PlanError(f"rank {rank} cannot start, so no rank does. {reason}")
    return cast(T, result)


def device_of(model: nn.Module) -> torch.device | None:
    """The GPU the model is on already, if it is on one."""
    return next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
