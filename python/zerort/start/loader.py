"""The training loader that `initialize` makes from a dataset: each rank sees its own part and knows
its place in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Dataset, DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from zerort.mesh import Comm

__all__ = ["TrainingLoader"]


class TrainingLoader:
    """Micro-batches of a dataset, one epoch per iteration.

    A map-style dataset is shuffled anew each epoch and cut among the ranks; an iterable one cuts
    itself. `state_dict` holds the epoch and the position within it, so that a restored loader goes
    on with the next batch.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        micro_batch: int,
        comm: Comm,
        *,
        drop_last: bool,
        collate_fn: Callable[[Any], Any] | None,
    ) -> None:
        self.epoch = 0
        self.sampler: DistributedSampler[Any] | None = None
        if not isinstance(dataset, IterableDataset):
            self.sampler = DistributedSampler(
                dataset, num_replicas=comm.world, rank=comm.rank, shuffle=True, drop_last=drop_last
            )
        with warnings.catch_warnings():
            # torchdata calls a function that newer versions of torch have deprecated; it has no
            # effect on us.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            self._loader: StatefulDataLoader[Any] = StatefulDataLoader(
                dataset,
                batch_size=micro_batch,
                sampler=self.sampler,
                collate_fn=collate_fn,
                drop_last=drop_last,
            )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        if self.sampler is not None:
            self.sampler.set_epoch(self.epoch)
        yield from self._loader
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the position in it."""
        return {"epoch": self.epoch, "position": self._loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on where `state` was taken."""
        self.epoch = state["epoch"]
        self._loader.load_state_dict(state["position"])
