"""What users do with Lightning, on a rank that has a process group: each flow returns what a test
compares. Imported in the ranks alone, because Lightning takes seconds to import.
"""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zerort.compat.lightning  # noqa: F401 (registers the strategies' names)
from zerort.compat.lightning import ZerortStrategy

WIDTH = 24
CUT = {
    "zero_optimization": {"reduce_bucket_size": 300, "stage3_param_persistence_threshold": 0},
}
"""Several buckets, and at stage 3 everything in shards."""

for name in ("pytorch_lightning", "lightning_fabric", "zerort"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


class Net(pl.LightningModule):
    """A regression with a schedule, a dropout and a hyper-parameter."""

    def __init__(self, rate: float = 1e-2, dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(8, WIDTH), nn.Tanh(), nn.Dropout(dropout), nn.Linear(WIDTH, 1)
        )
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return ((self.net(inputs) - targets) ** 2).mean()

    def training_step(self, batch: Any, index: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("score", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, index: int) -> None:
        self.log("tested", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.rate)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class Remembers(Callback):
    """State of a callback's own."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "odd": ({1: "one"}, {"a", "b"})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.odd = state["seen"], state["odd"]


def data(rows: int = 48) -> DataLoader[Any]:
    inputs = torch.randn(rows, 8, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)


def trainer(strategy: Any, **changes: Any) -> pl.Trainer:
    options: dict[str, Any] = {
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "logger": False,
        "enable_checkpointing": any(
            isinstance(each, ModelCheckpoint) for each in changes.get("callbacks", ())
        ),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    options.update(changes)
    return pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=dist.get_world_size(), **options
    )


def zerort_at(stage: int, **more: Any) -> ZerortStrategy:
    return ZerortStrategy(stage, CUT, **more)


def net(kind: Callable[..., Net] = Net, **options: Any) -> Net:
    torch.manual_seed(3)
    return kind(**options)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().float().clone() for name, value in module.state_dict().items()}


# The flows. Each takes the strategy to run under, and an empty folder that all ranks share.


def fitted(strategy: Any, folder: Path) -> Any:
    """Losses, weights and scores of a fit, with the sanity check before it."""
    module = net()
    running = trainer(strategy)
    running.fit(module, data(), data())
    (scores,) = running.validate(module, data(), verbose=False)
    return module.losses, weights(module), scores["score"], running.global_step


def resumed(strategy: Callable[[], Any], folder: Path) -> Any:
    """What a fit that was stopped and resumed differs from one that was not by, and what came
    back."""
    whole = net(dropout=0.3)
    saves = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    torch.manual_seed(dist.get_rank())
    trainer(strategy(), max_epochs=3, callbacks=[saves, Remembers()]).fit(whole, data())
    again, remembers = net(dropout=0.3, rate=0.5), Remembers()
    torch.manual_seed(100)
    running = trainer(strategy(), max_epochs=3, callbacks=[remembers])
    running.fit(again, data(), ckpt_path=str(folder / "epoch=0.ckpt"))
    difference = max(
        (one - other).abs().max().item()
        for one, other in zip(weights(whole).values(), weights(again).values(), strict=True)
    )
    lost = [one for one in again.losses if one not in whole.losses]
    return difference, lost, remembers.seen, remembers.odd, running.global_step


FLOWS: dict[str, Callable[[], Callable[[Path], Any]]] = {}


def flows_at(stage: int) -> Mapping[str, Callable[[Path], Any]]:
    return {
        f"ddp {stage}": lambda folder: fitted("ddp", folder),
        f"fitted {stage}": lambda folder: fitted(zerort_at(stage), folder),
        f"resumed {stage}": lambda folder: resumed(lambda: zerort_at(stage), folder),
    }


def run(flows: Mapping[str, Callable[[Path], Any]], folder: Path) -> dict[str, Any]:
    """The results by name; of a flow that raised, its traceback."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        TORCHELASTIC_RUN_ID="flows",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
    )
    results: dict[str, Any] = {}
    for name, flow in flows.items():
        place = folder / name.replace(" ", "-")
        place.mkdir(exist_ok=True)
        try:
            results[name] = flow(place)
        except BaseException:
            results[name] = Failed(traceback.format_exc())
        dist.barrier()
    return results


class Failed(str):
    """The traceback of a flow that raised."""
