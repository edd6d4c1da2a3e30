"""The training loader that `initialize` makes from a dataset: each rank sees its own part and knows
its place in it.

An epoch of a map-style dataset is one order of all samples, drawn from the epoch's number, and
rank r of N takes every N-th of them: after k batches on every rank a beginning of the order has
been seen, whatever N is. So a place is an epoch and a number of samples over all ranks, and any
number of ranks goes on from it. As in torch's DistributedSampler the end of an epoch is filled up
with samples from its beginning, so that all ranks have as many batches; with `drop_last` it is cut.

Each `for` is an epoch. One that is left early, by `break` or by an error, is over: the next begins
the next epoch, in another order, and what was not reached is not made up for. Only the first one
after `load_state_dict` begins in the middle.

Not restored: what workers have drawn for random augmentations within an epoch, and the place within
an iterable dataset on another number of ranks.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from zerort.config import Batch, Config
from zerort.config.runtime import Loader
from zerort.errors import CheckpointError, ConfigError, StepError
from zerort.mesh import Comm

__all__ = [
    "EpochOrder",
    "LoaderState",
    "Request",
    "TrainingLoader",
    "further_loader",
    "open_loader",
]

_log = logging.getLogger("zerort")


class LoaderState(TypedDict):
    """A place in the data; the same on every rank."""

    epoch: int
    samples: int
    """Samples of the epoch given out, over all ranks."""
    length: int | None
    """Samples of the dataset; None for an iterable one."""
    world: int
    """Ranks that shared them."""


class EpochOrder(Sampler[int]):
    """One rank's samples of an epoch, from `start` samples (over all ranks) on."""

    def __init__(
        self, length: int, rank: int, world: int, *, drop_last: bool, shuffle: bool = True
    ) -> None:
        self.length, self.rank, self.world, self.drop_last = length, rank, world, drop_last
        self.shuffle = shuffle
        self.epoch = 0
        self.start = 0

    def share(self, start: int = 0) -> int:
        """Samples of each rank from `start` on."""
        left = max(self.length - start, 0)
        return left // self.world if self.drop_last else -(-left // self.world)

    def __len__(self) -> int:
        return self.share()

    def __iter__(self) -> Iterator[int]:
        share = self.share(self.start)
        if not share:
            return iter(())
        places = (self.start + self.rank + self.world * torch.arange(share)) % self.length
        if not self.shuffle:
            return iter(places.tolist())
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch))
        return iter(order[places].tolist())


class TrainingLoader:
    """Micro-batches of a dataset, one epoch per iteration, by torch's DataLoader.

    `len` is the batches of a whole epoch on each rank; it raises `TypeError` for an iterable
    dataset without a length. An iterable dataset cuts itself among ranks and workers.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        micro_batch: int,
        comm: Comm,
        settings: Loader,
        *,
        drop_last: bool = False,
        shuffle: bool = True,
        collate_fn: Callable[[Any], Any] | None = None,
    ) -> None:
        self.epoch = 0
        self.samples = 0
        self._micro, self._rank, self._world = micro_batch, comm.rank, comm.world
        self._order = _order_of(dataset, comm, drop_last=drop_last, shuffle=shuffle)
        self._running: object | None = None
        """The iteration that has given batches and has not come to its end."""
        self._seed = torch.Generator()
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=micro_batch,
            sampler=self._order,
            collate_fn=collate_fn,
            drop_last=drop_last,
            num_workers=settings.workers,
            persistent_workers=settings.persistent_workers and settings.workers > 0,
            pin_memory=settings.pin_memory and comm.device.type != "cpu",
            # one of its own: an iteration draws a seed for its workers, and drawn from torch's a
            # run that is resumed would not go on with the same random numbers
            generator=self._seed,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        if self._running is not None:  # left early
            self.epoch, self.samples = self.epoch + 1, 0
        epoch, start, this = self.epoch, self.samples, object()
        for given, batch in enumerate(self._batches(epoch, start), 1):
            self._running = this
            self.epoch, self.samples = epoch, self._after(start, given)
            yield batch
            # None where a place has been restored meanwhile: who goes on all the same is here again
            if self._running not in (this, None):
                raise StepError(
                    "an iteration over the training loader goes on after another has begun: "
                    "iterate once at a time, each is an epoch"
                )
        self._running = None
        self.epoch, self.samples = epoch + 1, 0

    def _batches(self, epoch: int, start: int) -> Iterator[Any]:
        self._seed.manual_seed((torch.initial_seed() + (epoch << 16) + self._rank) % 2**63)
        if self._order is not None:
            self._order.epoch, self._order.start = epoch, start
            return iter(self._loader)
        return itertools.islice(self._loader, start // (self._micro * self._world), None)

    def _after(self, start: int, given: int) -> int:
        """Samples over all ranks when each has `given` batches."""
        mine = given * self._micro
        if self._order is None:
            return start + mine * self._world
        return min(start + min(mine, self._order.share(start)) * self._world, self._order.length)

    def state_dict(self) -> LoaderState:
        """The place behind the latest batch."""
        length = None if self._order is None else self._order.length
        return {
            "epoch": self.epoch,
            "samples": self.samples,
            "length": length,
            "world": self._world,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on where `state` was taken, on any number of ranks.

        Raises `CheckpointError` for what `state_dict` has not made.
        """
        epoch, samples = (_whole(state, name) for name in ("epoch", "samples"))
        length, world = state.get("length"), state.get("world")
        if self._order is None and samples and world != self._world:
            samples = 0
            self._warn(
                "an iterable dataset cuts itself by the number of ranks, which was %s and is %d: "
                "its epoch begins anew, and samples come again",
                *(world, self._world),
            )
        if self._order is not None and length != self._order.length:
            self._warn(
                "training_data had %s samples and has %d, so its order is another: samples of "
                "this epoch may come again or be left out",
                *(length, self._order.length),
            )
        self.epoch, self.samples, self._running = epoch, samples, None

    def _warn(self, text: str, *args: object) -> None:
        if self._rank == 0:
            _log.warning(text, *args)


def open_loader(
    dataset: Dataset[Any] | None,
    batch: Batch,
    comm: Comm,
    settings: Config,
    collate_fn: Callable[[Any], Any] | None,
) -> TrainingLoader | None:
    """The loader over `dataset`, or None without one. Raises `ConfigError` for what is no dataset
    and for one that gives no batch.
    """
    if dataset is None:
        return None
    _refuse_other("initialize(training_data=...)", dataset)
    loader = TrainingLoader(
        dataset,
        batch.micro,
        comm,
        settings.zerort.loader,
        drop_last=settings.dataloader_drop_last,
        collate_fn=collate_fn,
    )
    if loader.state_dict()["length"] is not None and not len(loader):
        raise ConfigError(
            f"training_data has {loader.state_dict()['length']} samples, which give no batch of "
            f"{batch.micro} on each of {comm.world} ranks: give more samples or a smaller "
            "micro-batch, or leave dataloader_drop_last out"
        )
    return loader


@dataclass(frozen=True)
class Request:
    """What `Engine.deepspeed_io` was asked for, as DeepSpeed names it."""

    dataset: Any
    batch_size: int
    route: str
    pin_memory: bool
    data_sampler: Any
    collate_fn: Callable[[Any], Any] | None
    workers: int | None


ROUTES = ("train", "eval", "predict")
"""Only the first is shuffled."""


def further_loader(
    request: Request, comm: Comm, settings: Config
) -> TrainingLoader | DataLoader[Any]:
    """A loader beside the one of `initialize`. Raises `ConfigError` for what is no dataset, and for
    a route that is none.
    """
    if request.route not in ROUTES:
        raise ConfigError(
            f"deepspeed_io(route={request.route!r}): expected one of {', '.join(ROUTES)}"
        )
    _refuse_other("deepspeed_io(...)", request.dataset)
    usual = settings.zerort.loader
    wanted = Loader(
        workers=usual.workers if request.workers is None else request.workers,
        persistent_workers=usual.persistent_workers,
        pin_memory=request.pin_memory and usual.pin_memory,
    )
    if request.data_sampler is not None:
        return DataLoader(
            request.dataset,
            batch_size=request.batch_size,
            sampler=request.data_sampler,
            collate_fn=request.collate_fn,
            drop_last=settings.dataloader_drop_last,
            num_workers=wanted.workers,
            persistent_workers=wanted.persistent_workers and wanted.workers > 0,
            pin_memory=wanted.pin_memory and comm.device.type != "cpu",
        )
    return TrainingLoader(
        request.dataset,
        request.batch_size,
        comm,
        wanted,
        drop_last=settings.dataloader_drop_last,
        shuffle=request.route == "train",
        collate_fn=request.collate_fn,
    )


def _order_of(dataset: Any, comm: Comm, *, drop_last: bool, shuffle: bool) -> EpochOrder | None:
    if isinstance(dataset, IterableDataset):
        return None
    return EpochOrder(len(dataset), comm.rank, comm.world, drop_last=drop_last, shuffle=shuffle)


def _refuse_other(call: str, dataset: Any) -> None:
    """Raises `ConfigError` for what is no dataset."""
    if isinstance(dataset, IterableDataset):
        return
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"{call}: expected a dataset with __len__ and __getitem__, or an IterableDataset, got "
            f"{type(dataset).__name__}"
        )


def _whole(state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise CheckpointError(
            f"the training loader's place is damaged: expected {name} as an integer of at least "
            f"0, got {value!r:.60}"
        )
    return value
