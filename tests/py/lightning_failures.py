"""A rank that fails beside one that waits in a collective of Lightning's."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist
from torch import Tensor

import lightning_flows
from lightning_flows import Net, data, raised, trainer
from zerort.compat.lightning import ZerortStrategy


class Breaks(Net):
    """Raises on one rank in the third batch, where the other logs."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        if index == 2 and dist.get_rank() == 1:
            raise KeyError("batch 2")
        loss: Tensor = super().training_step(batch, index)
        return loss


def broken(stage: int) -> tuple[str, float]:
    """What the rank that waits hears, and after how many seconds; the other one raises."""
    lightning_flows.elastic()
    running = trainer(ZerortStrategy(stage, {**lightning_flows.CUT, "zerort": {"timeout": 10.0}}))
    begun = time.monotonic()
    if dist.get_rank() == 1:
        running.fit(Breaks(), data())
    heard = raised(lambda: running.fit(Breaks(), data()))
    return heard, time.monotonic() - begun
