"""A rank that fails beside one that waits in a collective of Lightning's, and goes on afterwards.
Imported in the ranks alone, because Lightning takes seconds to import.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor

import lightning_flows
from lightning_flows import CUT, Net, data, net, raised, trainer
from zerort.compat.lightning import ZerortStrategy


def _fails_here(index: int) -> bool:
    return index == 2 and dist.get_rank() == 1


class InStep(Net):
    """Raises on one rank in the third batch, where the other logs."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        if _fails_here(index):
            raise KeyError("in step")
        loss: Tensor = super().training_step(batch, index)
        return loss


class InBackward(Net):
    """Raises in the backward; the other logs behind it."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(batch)
        if _fails_here(index):
            loss.register_hook(_raise_in_backward)
        return loss

    def on_after_backward(self) -> None:
        self.log("behind", 1.0, sync_dist=True)


def _raise_in_backward(_: Tensor) -> None:
    raise KeyError("in backward")


class InValidation(Net):
    """Raises in a validation within the fit; the other logs at its end."""

    def validation_step(self, batch: Any, index: int) -> None:
        if _fails_here(index):
            raise KeyError("in validation")
        super().validation_step(batch, index)


class Between(Callback):
    """Raises on rank 0 behind a batch; the other goes on to the next."""

    def on_train_batch_end(self, running: Any, module: Any, *args: Any) -> None:
        if dist.get_rank() == 0 and running.global_step == 2:
            raise KeyError("between batches")


class Waits(Callback):
    """A barrier behind each batch, which one rank does not come to."""

    def on_train_batch_end(self, running: Any, module: Any, *args: Any) -> None:
        if _fails_here(running.global_step):
            raise KeyError("in callback")
        running.strategy.barrier()


def _options(case: str, folder: Path) -> tuple[Callable[..., Net], dict[str, Any]]:
    match case:
        case "in step":
            return InStep, {}
        case "in backward":
            return InBackward, {}
        case "in validation":
            return InValidation, {}
        case "in callback":
            return Net, {"callbacks": [Waits()]}
        case "between batches":
            return Net, {"callbacks": [Between()]}
        case _:
            saves = ModelCheckpoint(dirpath=folder, save_on_exception=True)
            return InStep, {"callbacks": [saves]}


CASES = (
    "in step",
    "in backward",
    "in validation",
    "in callback",
    "between batches",
    "saved on exception",
)


def goes_on(stage: int, folder: Path) -> dict[str, tuple[str, float]]:
    """What is raised in each case, and after how many seconds; whether the next fit works."""
    lightning_flows.elastic()
    found = {}
    for case in CASES:
        kind, options = _options(case, folder)
        strategy = ZerortStrategy(stage, {**CUT, "zerort": {"timeout": 40.0}})
        running = trainer(strategy, accumulate_grad_batches=1, max_epochs=1, **options)
        begun = time.monotonic()
        heard = raised(lambda running=running, kind=kind: running.fit(net(kind), data(), data()))
        found[case] = heard, time.monotonic() - begun
    after = net()
    trainer(lightning_flows.zerort_at(stage), max_epochs=1).fit(after, data())
    found["after"] = str(len(after.losses)), 0.0
    return found


def goes(stage: int) -> tuple[str, float]:
    """What the rank that waits hears, and after how many seconds; the other one's process ends."""
    lightning_flows.elastic()
    running = trainer(ZerortStrategy(stage, CUT))
    begun = time.monotonic()
    if dist.get_rank() == 1:
        running.fit(InStep(), data())
    heard = raised(lambda: running.fit(InStep(), data()))
    return heard, time.monotonic() - begun
