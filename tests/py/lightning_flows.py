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
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zerort.compat.lightning  # noqa: F401 (registers the strategies' names)
from zerort.compat.lightning import ZerortFabricStrategy, ZerortStrategy
from zerort.compat.lightning.modules import is_sharded
from zerort.optim import Chain

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


def fitted(strategy: Any, folder: Path, **changes: Any) -> Any:
    """Losses, weights and scores of a fit, with the sanity check before it."""
    module = net()
    running = trainer(strategy, **changes)
    running.fit(module, data(), data())
    (scores,) = running.validate(module, data(), verbose=False)
    return module.losses, weights(module), scores["score"], running.global_step


def resumed(strategy: Callable[[], Any], folder: Path, **changes: Any) -> Any:
    """What a fit that was stopped and resumed differs from one that was not by, and what came
    back."""
    whole = net(dropout=0.3)
    saves = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    torch.manual_seed(dist.get_rank())
    first = trainer(strategy(), max_epochs=3, callbacks=[saves, Remembers()], **changes)
    first.fit(whole, data())
    again, remembers = net(dropout=0.3, rate=0.5), Remembers()
    torch.manual_seed(100)
    running = trainer(strategy(), max_epochs=3, callbacks=[remembers], **changes)
    running.fit(again, data(), ckpt_path=str(folder / "epoch=0.ckpt"))
    difference = max(
        (one - other).abs().max().item()
        for one, other in zip(weights(whole).values(), weights(again).values(), strict=True)
    )
    lost = [one for one in again.losses if one not in whole.losses]
    return difference, lost, remembers.seen, remembers.odd, running.global_step


def without_fitting(strategy: Callable[[], Any], folder: Path) -> Any:
    """What the best and the last checkpoint give to a Trainer that has not fitted."""
    module = net()
    saves = ModelCheckpoint(
        dirpath=folder, monitor="score", mode="max", save_last=True, save_top_k=1
    )
    running = trainer(strategy(), callbacks=[saves])
    running.fit(module, data(), data())
    kept = sorted(path.name for path in folder.iterdir())
    scores = [running.validate(module, data(), verbose=False)[0]["score"]]
    found = {"kept": kept, "best": saves.best_model_score.item(), "fitted": weights(module)}
    for place in (saves.last_model_path, saves.best_model_path):
        other = net(rate=0.3)
        alone = trainer(strategy())
        (validated,) = alone.validate(other, data(), ckpt_path=place, verbose=False)
        (tested,) = alone.test(other, data(), ckpt_path=place, verbose=False)
        predicted = alone.predict(other, data(rows=5), ckpt_path=place)
        scores += [validated["score"], tested["tested"]]
        found[place.rpartition("/")[2][:4]] = weights(other), len(predicted)
    return found | {"scores": scores}


class ByHand(Net):
    """Manual optimization: accumulates two batches, and drops every third window."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        loss = self.loss(batch)
        self.losses.append(loss.item())
        if index % 2 == 0:
            optimizer.zero_grad()
        if index % 2:
            self.manual_backward(loss)
            if index % 6 == 5:
                optimizer.zero_grad()
                return
            optimizer.step()
            optimizer.zero_grad()
        else:
            with self.trainer.strategy.block_backward_sync():
                self.manual_backward(loss)

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()


def by_hand(strategy: Any, folder: Path) -> Any:
    module = net(ByHand)
    trainer(strategy, accumulate_grad_batches=1, gradient_clip_val=None).fit(module, data())
    return module.losses, weights(module)


class Configured(Net):
    """Makes its layers in `configure_model`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = None
        self.numel: list[int] = []

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(11)
            self.net = nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
            first = self.net[0].weight
            self.numel.append(first.untyped_storage().nbytes())


def configured(strategy: Callable[[], Any], folder: Path, **changes: Any) -> Any:
    module = net(Configured)
    saves = ModelCheckpoint(dirpath=folder, save_last=True)
    running = trainer(strategy(), callbacks=[saves], **changes)
    running.fit(module, data(), data())
    other = net(Configured)
    alone = trainer(strategy(), **changes)
    alone.validate(other, data(), ckpt_path=saves.last_model_path, verbose=False)
    third = net(Configured)
    again = trainer(strategy(), max_epochs=3, **changes)
    again.fit(third, data(), ckpt_path=saves.last_model_path)
    return module.losses, weights(module), weights(other), module.numel, again.global_step


def behind_fit(strategy: Callable[..., Any], folder: Path) -> Any:
    """A file that is saved behind a fit, and who can read it; a second fit of the same objects."""
    module = net()
    running = trainer(strategy())
    running.fit(module, data())
    place = folder / "behind.ckpt"
    running.save_checkpoint(place)
    other = net()
    trainer(strategy()).test(other, data(), ckpt_path=place, verbose=False)
    plain = Net.load_from_checkpoint(place, weights_only=False)
    refused = raised(lambda: trainer(strategy(), max_epochs=3).fit(net(), data(), ckpt_path=place))
    on = net(rate=0.0)
    more = trainer(strategy(load_full_weights=True), max_epochs=3)
    more.fit(on, data(), ckpt_path=place)
    running.fit_loop.max_epochs = 3
    before = weights(module)
    running.fit(module, data())
    moved = max((before[n] - v).abs().max().item() for n, v in weights(module).items())
    return {
        "is file": place.is_file(),
        "weights": [before, weights(other), weights(plain)],
        "refused": refused,
        "on": (more.global_step, len(on.losses)),
        "moved": moved,
    }


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[3])]


class TwoThatLightningSteps(TwoOptimizers):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True


class TwoAsOne(Net):
    """Each layer has an optimizer of its own, with another rate, under one scheduler."""

    def configure_optimizers(self) -> Any:
        chain = Chain(
            [
                torch.optim.AdamW(self.net[0].parameters(), lr=1e-2),
                torch.optim.SGD(self.net[3].parameters(), lr=1e-1, momentum=0.9),
            ]
        )
        return [chain], [torch.optim.lr_scheduler.StepLR(chain, 1, gamma=0.7)]


class NoLoss(Net):
    def training_step(self, batch: Any, index: int) -> Any:
        return None


class ClipsByHand(Net):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=9.0, gradient_clip_algorithm="norm")


class Breaks(Net):
    """Raises on one rank, in the third batch."""

    def training_step(self, batch: Any, index: int) -> Any:
        if index == 2 and dist.get_rank() == 1:
            raise KeyError("batch 2")
        return self.loss(batch)  # without a collective of Lightning's, which nobody would answer


class Keeps(Net):
    """Puts an object of its own into the checkpoint."""

    kept: Any = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = self.kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.kept = checkpoint["mine"]


def with_object(strategy: Callable[..., Any], folder: Path) -> Any:
    """What becomes of an object in a checkpoint: by default, where it is trusted, where it cannot
    be pickled."""

    def save(kept: Any, name: str) -> str:
        module = net(Keeps)
        module.kept = kept
        saves = ModelCheckpoint(dirpath=folder, filename=name)
        running = trainer(strategy(), max_epochs=1, callbacks=[saves])
        return raised(lambda: running.fit(module, data()))

    saved = save(Counts(), "object")
    place = str(folder / "object.ckpt")
    refused = raised(lambda: trainer(strategy()).test(net(Keeps), data(), ckpt_path=place))
    module = net(Keeps)
    trusting = trainer(strategy(weights_only=False))
    trusting.test(module, data(), ckpt_path=place, verbose=False)
    return saved, refused, type(module.kept).__name__, save(lambda: None, "lambda")


def refused(strategy: Callable[..., Any], folder: Path) -> Any:
    """What is raised; every case on all ranks alike but the last."""

    def fit(module: Net, **changes: Any) -> str:
        running = trainer(strategy(), **changes)
        return raised(lambda: running.fit(module, data()))

    manual = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    (folder / "empty").mkdir(exist_ok=True)
    return {
        "two": fit(TwoOptimizers(), **manual),
        "two that step": fit(TwoThatLightningSteps()),
        "by value": fit(Net(), gradient_clip_algorithm="value"),
        "none": fit(NoLoss(), accumulate_grad_batches=1),
        "another norm": fit(ClipsByHand(), accumulate_grad_batches=1),
        "64": raised(lambda: trainer(strategy(), precision="64-true")),
        "steps": raised(lambda: ZerortStrategy(config={"gradient_accumulation_steps": 2})),
        "empty": raised(
            lambda: trainer(strategy()).test(net(), data(), ckpt_path=folder / "empty")
        ),
        "url": raised(lambda: trainer(strategy()).test(net(), data(), ckpt_path="s3://a/b")),
        "breaks": fit(Breaks(), accumulate_grad_batches=1),
        "after": len(fitted(strategy(), folder)[0]),
    }


def overfitted(strategy: Any, folder: Path) -> Any:
    module = net()
    trainer(strategy, overfit_batches=2, max_epochs=4, accumulate_grad_batches=1).fit(
        module, data(), data()
    )
    return module.losses


class Counts:
    """An object of the user's with state."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def fabric_loop(strategy: Any, folder: Path, precision: str = "32-true") -> Any:
    """Fabric's loop: windows of two, one dropped; a checkpoint in the middle, and a second fabric
    that goes on from it.
    """
    fabric = Fabric(
        strategy=strategy() if callable(strategy) else strategy,
        accelerator="cpu",
        devices=dist.get_world_size(),
        precision=precision,
    )
    fabric.launch()

    def made() -> Any:
        torch.manual_seed(7)
        with fabric.init_module():
            model = nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)
        return (*fabric.setup(model, optimizer), schedule, Counts())

    def train(model: Any, optimizer: Any, schedule: Any, counts: Counts, first: int) -> list[float]:
        losses = []
        loader = fabric.setup_dataloaders(data())
        for index, (inputs, targets) in enumerate(loader):
            if index < first:
                continue
            with fabric.no_backward_sync(model, enabled=index % 2 == 0):
                loss = ((model(inputs) - targets) ** 2).mean()
                losses.append(loss.item())
                fabric.backward(loss / 2, model=model)
            if index == 1:
                optimizer.zero_grad()
            elif index % 2:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                counts.steps += 1
            if index == 3:
                state = {"model": model, "optimizer": optimizer, "schedule": schedule}
                fabric.save(folder / "middle.ckpt", {**state, "counts": counts, "at": index})
        return losses

    whole = made()
    losses = train(*whole, first=0)
    again = made()
    names = ("model", "optimizer", "schedule", "counts")
    state = {**dict(zip(names, again, strict=True)), "at": 0}
    left = fabric.load(folder / "middle.ckpt", state)
    more = train(*again, first=state["at"] + 1)
    refused = [
        raised(lambda: fabric.clip_gradients(again[0], again[1], max_norm=1.0)),
        raised(lambda: fabric.backward(again[0](torch.ones(1, 8)).sum())),
    ]
    return losses, more, again[3].steps, left, refused


def fabric_alone(strategy: Any, folder: Path) -> Any:
    """A model that is set up alone: what it gives, born in shards where there are some, before and
    behind a load; then its optimizer, and what it learns. Ranks evaluate other numbers of batches.
    """
    fabric = Fabric(strategy=strategy, accelerator="cpu", devices=dist.get_world_size())
    fabric.launch()
    inputs = torch.ones(2, 8)

    def made() -> Any:
        torch.manual_seed(7)
        with fabric.init_module():
            return nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

    model = fabric.setup_module(made())
    with torch.no_grad():
        for _ in range(1 + fabric.global_rank):
            outputs = [model(inputs)]
    sharded = is_sharded(model)
    early = raised(lambda: fabric.backward(model(inputs).sum(), model=model))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
    twice = raised(lambda: fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1)))
    losses = []
    for each, targets in fabric.setup_dataloaders(data()):
        optimizer.zero_grad()
        with fabric.no_backward_sync(model, enabled=False):
            loss = ((model(each) - targets) ** 2).mean()
            fabric.backward(loss, model=model)
        optimizer.step()
        losses.append(loss.item())
    fabric.save(folder / "alone.ckpt", {"model": model, "optimizer": optimizer, "at": 3})
    again = fabric.setup_module(made())
    state = {"model": again, "at": 0}
    fabric.load(folder / "alone.ckpt", state)
    with torch.no_grad():
        outputs += [model(inputs), again(inputs)]
    return outputs, losses, sharded, state["at"], early, twice


def chained(strategy: Any, fabrics: Any, folder: Path) -> Any:
    """A fit with several optimizers as one, and the same in a loop of Fabric's."""
    torch.manual_seed(7)
    module = TwoAsOne()
    trainer(strategy).fit(module, data())
    fabric = Fabric(strategy=fabrics, accelerator="cpu", devices=dist.get_world_size())
    fabric.launch()
    torch.manual_seed(7)
    model = TwoAsOne().net
    [chain], _ = TwoAsOne.configure_optimizers(SimpleNamespace(net=model))  # type: ignore[arg-type]
    apart = raised(lambda: fabric.setup(model, *chain.members))
    model, optimizer = fabric.setup(model, chain)
    for inputs, targets in fabric.setup_dataloaders(data()):
        optimizer.zero_grad()
        fabric.backward(((model(inputs) - targets) ** 2).mean())
        optimizer.step()
        module.losses.append(model(inputs).sum().item())
    rates = [group["lr"] for group in optimizer.param_groups]
    return module.losses, weights(module), rates, apart


def flows_at(stage: int) -> Mapping[str, Callable[[Path], Any]]:
    def ours(**more: Any) -> ZerortStrategy:
        return zerort_at(stage, **more)

    return {
        f"ddp {stage}": lambda folder: fitted("ddp", folder),
        f"fitted {stage}": lambda folder: fitted(ours(), folder),
        f"resumed {stage}": lambda folder: resumed(ours, folder),
        f"without fitting {stage}": lambda folder: without_fitting(ours, folder),
        f"ddp by hand {stage}": lambda folder: by_hand("ddp", folder),
        f"by hand {stage}": lambda folder: by_hand(ours(), folder),
        f"ddp configured {stage}": lambda folder: configured(lambda: "ddp", folder),
        f"configured {stage}": lambda folder: configured(ours, folder),
        f"behind fit {stage}": lambda folder: behind_fit(ours, folder),
        f"ddp overfitted {stage}": lambda folder: overfitted("ddp", folder),
        f"overfitted {stage}": lambda folder: overfitted(ours(), folder),
        f"ddp fabric {stage}": lambda folder: fabric_loop("ddp", folder),
        f"fabric {stage}": lambda folder: fabric_loop(
            lambda: ZerortFabricStrategy(stage, CUT), folder
        ),
        f"ddp fabric alone {stage}": lambda folder: fabric_alone("ddp", folder),
        f"fabric alone {stage}": lambda folder: fabric_alone(
            ZerortFabricStrategy(stage, CUT), folder
        ),
        f"ddp chained {stage}": lambda folder: chained("ddp", "ddp", folder),
        f"chained {stage}": lambda folder: chained(
            ours(), ZerortFabricStrategy(stage, CUT), folder
        ),
        f"object {stage}": lambda folder: with_object(ours, folder),
        f"refused {stage}": lambda folder: refused(ours, folder),
    }


def flows_in(precision: str, stage: int) -> Mapping[str, Callable[[Path], Any]]:
    """The same in 16 bits."""

    def ours() -> ZerortStrategy:
        return zerort_at(stage)

    def fabric(strategy: Any) -> Callable[[Path], Any]:
        return lambda folder: fabric_loop(strategy, folder, precision)

    return {
        "ddp": lambda folder: fitted("ddp", folder, precision=precision),
        "fitted": lambda folder: fitted(ours(), folder, precision=precision),
        "resumed": lambda folder: resumed(ours, folder, precision=precision),
        "configured": lambda folder: configured(ours, folder, precision=precision),
        "ddp fabric": fabric("ddp"),
        "fabric": fabric(lambda: ZerortFabricStrategy(stage, CUT)),
    }


def elastic() -> None:
    """Lets Lightning find the process group that is there."""
    os.environ.update(
        RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        LOCAL_RANK=str(dist.get_rank()),
        TORCHELASTIC_RUN_ID="flows",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
    )


def run(flows: Mapping[str, Callable[[Path], Any]], folder: Path) -> dict[str, Any]:
    """The results by name; of a flow that raised, its traceback."""
    elastic()
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
