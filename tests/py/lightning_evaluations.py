"""Evaluations without a fit at stage 3, on a rank that has a process group: each flow returns what
a test compares. Imported in the ranks alone, because Lightning takes seconds to import.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchmetrics
from pytorch_lightning.callbacks import (
    BasePredictionWriter,
    Callback,
    EarlyStopping,
    ModelCheckpoint,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flows import Configured, Net, data, net, raised, trainer, weights, zerort_at
from weighing import alive, covered
from zerort.compat.lightning import ZerortStrategy
from zerort.params.sharded import keeper_of

LAYERS, SIDE = 6, 128


class Looks(Callback):
    """Whether the module is in shards while it is evaluated."""

    def __init__(self) -> None:
        self.sharded: set[bool] = set()

    def on_test_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.sharded |= {keeper_of(parameter) is not None for parameter in module.parameters()}

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end


def checkpoints(folder: Path) -> tuple[str, str, dict[str, Tensor]]:
    """A folder and a file with the same weights, and these."""
    module = net(Configured)
    saves = ModelCheckpoint(dirpath=folder, save_last=True)
    running = trainer(zerort_at(3), max_epochs=1, callbacks=[saves])
    running.fit(module, data())
    running.save_checkpoint(folder / "one.ckpt")
    return saves.last_model_path, str(folder / "one.ckpt"), weights(module)


def scores(strategy: Any, place: str | None, kind: Callable[..., Net] = Configured) -> Any:
    """Of every kind of evaluation, with predictions; how the module was, and its weights behind."""
    module, looks = net(kind), Looks()
    running = trainer(strategy, callbacks=[looks])
    (validated,) = running.validate(module, data(), ckpt_path=place, verbose=False)
    (tested,) = running.test(module, data(), ckpt_path=place, verbose=False)
    predicted = torch.cat(running.predict(module, data(), ckpt_path=place))
    return [validated["score"], tested["tested"], predicted], looks.sharded, weights(module)


def evaluated(folder: Path) -> Any:
    """Both kinds of checkpoint under this strategy and under DDP."""
    shards, one, trained = checkpoints(folder)
    lone = net(Configured)
    trainer(zerort_at(3, keep_weights=False)).test(lone, data(), ckpt_path=shards, verbose=False)
    return {
        "trained": trained,
        "ddp": scores("ddp", one),
        "folder": scores(zerort_at(3), shards),
        "file": scores(zerort_at(3), one),
        "gone": raised(lone.net[0].weight.sum),
    }


def plain(folder: Path) -> Any:
    """A module that has its layers before the Trainer sees it."""
    return {"ddp": scores("ddp", None, Net), "plain": scores(zerort_at(3), None, Net)}


def uneven_data(rows: int) -> DataLoader[Any]:
    """One batch more for each rank: the program's own part of the data."""
    return data(rows=rows + 4 * dist.get_rank())


class Writes(BasePredictionWriter):
    """Meets the other ranks through the strategy behind the last batch."""

    def __init__(self) -> None:
        super().__init__("epoch")
        self.seen: list[int] = []

    def write_on_epoch_end(self, trainer: Any, *args: Any) -> None:
        trainer.strategy.barrier()
        self.seen = trainer.strategy.all_gather(torch.tensor(dist.get_rank())).tolist()


def uneven(folder: Path) -> Any:
    """Ranks that have 3 and 4 batches, with logs and a barrier behind the last one."""
    found = []
    for strategy in ("ddp", zerort_at(3)):
        module, writes = net(Configured), Writes()
        running = trainer(strategy, callbacks=[writes], use_distributed_sampler=False)
        predicted = running.predict(module, uneven_data(12))
        (validated,) = running.validate(module, uneven_data(12), verbose=False)
        found.append((len(predicted), torch.cat(predicted), validated["score"], writes.seen))
    return found


class Measured(Configured):
    """With metrics of torchmetrics' kinds, one that adds up and one that keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.seen = torchmetrics.MeanMetric(), torchmetrics.CatMetric()
        self.found: list[Any] = []

    def validation_step(self, batch: Any, index: int) -> None:
        loss = self.loss(batch)
        self.mean.update(loss)
        self.seen.update(batch[1].flatten())
        self.log("mean", self.mean)
        self.log("score", loss, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        copied = copy.deepcopy(self.mean)  # as callbacks do that average weights
        self.found.append((self.mean.compute().item(), self.seen.compute().sort().values, copied))
        self.seen.reset()


def uneven_fit(folder: Path) -> Any:
    """Ranks that validate 3 and 4 batches within a fit, in its sanity check and twice an epoch,
    with all that Lightning reduces behind it.
    """
    found = {}
    for name, strategy in (("ddp", "ddp"), ("ours", zerort_at(3))):
        module = net(Measured)
        saves = ModelCheckpoint(dirpath=folder / name, monitor="mean", save_last=True)
        stops = EarlyStopping("score", patience=5)
        running = trainer(
            strategy,
            callbacks=[saves, stops],
            use_distributed_sampler=False,
            val_check_interval=0.5,
        )
        running.fit(module, data(), uneven_data(12))
        kept = [(mean, seen) for mean, seen, _ in module.found]
        found[name] = kept, running.callback_metrics["score"].item(), saves.best_model_score.item()
        found[f"{name} left"] = [module.mean.dist_sync_fn, module.found[0][2].dist_sync_fn]
    return found


def uneven_training(folder: Path) -> dict[int, str]:
    """What is heard where ranks have different numbers of batches to train on."""
    heard = {}
    for stage in (2, 3):
        running = trainer(zerort_at(stage), max_epochs=1, use_distributed_sampler=False)
        heard[stage] = raised(lambda running=running: running.fit(net(), uneven_data(8), data()))
    return heard


def of_one_rank(folder: Path) -> list[float]:
    """Collectives over a group that has this rank alone, which the other does not make."""
    groups = [dist.new_group([rank]) for rank in range(2)]

    class Logs(Net):
        def on_train_epoch_end(self) -> None:
            if dist.get_rank() == 0:
                found = self.trainer.strategy.reduce(torch.ones(1), groups[0], "sum")
                self.losses.append(found.item())

    module = net(Logs)
    trainer(zerort_at(3), max_epochs=1).fit(module, data())
    return module.losses[-1:]


class Large(Net):
    """Weighs this process while each of its layers computes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None
        self.most = 0.0

    def configure_model(self) -> None:
        if self.net is None:
            layers = [nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]
            for layer in layers:
                layer.register_forward_hook(self._weigh)
            self.net = nn.Sequential(*layers)

    def _weigh(self, *_: Any) -> None:
        whole = LAYERS * SIDE * SIDE * 4
        self.most = max(self.most, covered(alive()) / whole)

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self.net(torch.ones(1, SIDE))


def weighed(folder: Path) -> Any:
    """The most that this rank holds, as a part of the model, where ranks share no memory."""
    one_by_one = {
        "zerort": {"transport": "gloo"},
        "zero_optimization": {
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 1,
            "stage3_param_persistence_threshold": 0,
        },
    }
    gc.collect()
    gc.freeze()
    module = Large()
    trainer(ZerortStrategy(3, one_by_one, keep_weights=False)).predict(module, data())
    return module.most


class Breaks(Net):
    """Raises on one rank, in the second batch."""

    def predict_step(self, batch: Any, index: int) -> Tensor:
        if index == 1 and dist.get_rank() == 1:
            raise KeyError("batch 1")
        return super().predict_step(batch, index)


class BreaksBetween(Net):
    """Raises on one rank, outside the engine's calls."""

    def on_predict_batch_end(self, *args: Any) -> None:
        if dist.get_rank() == 1:
            raise KeyError("between")


def broken(folder: Path) -> Any:
    """What both ranks hear of one that fails, and that the next works."""
    return {
        "within": raised(lambda: trainer(zerort_at(3)).predict(Breaks(), data())),
        "between": raised(lambda: trainer(zerort_at(3)).predict(BreaksBetween(), data())),
        "after": len(trainer(zerort_at(3)).predict(net(), data())),
        "engine": raised(lambda: trainer(zerort_at(3)).strategy.engine),
    }


def flows(*, slow: bool) -> Mapping[str, Callable[[Path], Any]]:
    """By name."""
    if slow:
        return {"plain": plain}
    return {
        "evaluated": evaluated,
        "uneven": uneven,
        "uneven fit": uneven_fit,
        "uneven training": uneven_training,
        "of one rank": of_one_rank,
        "weighed": weighed,
        "broken": broken,
    }
