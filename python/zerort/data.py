"""The training loader that `initialize` makes from a dataset: each rank sees its own part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from zerort.comm import Comm

__all__ = ["training_loader"]


def training_loader(
    dataset: Dataset[Any], micro_batch: int, comm: Comm, *, drop_last: bool, collate: Callable[[Any], Any] | None
) -> DataLoader[Any]:
    """A loader of micro-batches. Map-style datasets are shuffled and cut among ranks; iterable ones cut themselves."""
    sampler: DistributedSampler[Any] | None = None
    if not isinstance(dataset, IterableDataset):
        sampler = DistributedSampler(dataset, num_replicas=comm.world, rank=comm.rank, drop_last=drop_last)
    return DataLoader(dataset, batch_size=micro_batch, sampler=sampler, collate_fn=collate, drop_last=drop_last)
