"""A sharded module's weights, brought to rank 0's host a unit at a time.

What it guarantees: no rank has more than one unit whole at once, and rank 0 alone has all, on its
host. A failure on one rank is all ranks'. What it does not do: it writes no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from zerort.checkpoint.state import EngineState
from zerort.errors import CheckpointError
from zerort.memory import FlatModel
from zerort.mesh import Consensus
from zerort.zero import GatheredParameters

__all__ = ["consolidated", "weights_of"]


def weights_of(module: nn.Module, *, exclude_frozen: bool) -> dict[str, Tensor]:
    """A module's state dict, tensors alone, with what is sharded as it is."""
    frozen = {
        name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    return {
        name: value
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not (exclude_frozen and name in frozen)
    }


def consolidated(state: EngineState, *, exclude_frozen: bool) -> dict[str, Tensor]:
    """Copies of all weights, in the dtypes that the module computes with, on rank 0's host; none on
    the others. All ranks call it. Tied weights are one tensor.

    Raises `CheckpointError` on all ranks where one cannot.
    """
    agreement = Consensus(state.comm.control, CheckpointError, alike=True)
    failed = "the weights were not brought to rank 0"
    module = state.module
    wanted = agreement.agree(failed, lambda: weights_of(module, exclude_frozen=exclude_frozen))
    if state.comm.rank > 0:
        wanted = {}
    copies = Copies({id(tensor) for tensor in wanted.values()})
    for params in _units(state.flat):
        with GatheredParameters(params):
            copies.take(params)

    def found() -> dict[str, Tensor]:
        copies.take(list(wanted.values()))
        if copies.failure is not None:
            raise copies.failure
        return {name: copies.made[id(tensor)] for name, tensor in wanted.items()}

    return agreement.agree(failed, found)


class Copies:
    """Copies on the host of the tensors whose ids are `wanted`, each made once."""

    def __init__(self, wanted: set[int]) -> None:
        self.made: dict[int, Tensor] = {}
        self.failure: Exception | None = None
        """What has kept a copy from being made. The peers still go through all units, so it
        waits.
        """
        self._wanted = wanted

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Copies those that are wanted and not there yet, unless one has failed."""
        for tensor in tensors if self.failure is None else ():
            if id(tensor) in self._wanted and id(tensor) not in self.made:
                try:
                    copied = tensor.detach().to("cpu", copy=True)
                except (RuntimeError, MemoryError) as error:
                    self.failure = error
                    return
                self.made[id(tensor)] = copied.as_subclass(torch.Tensor)


def _units(flat: FlatModel) -> Iterator[list[nn.Parameter]]:
    """The parameters of each unit."""
    units: dict[int, list[nn.Parameter]] = {}
    for bucket in flat.buckets:
        if bucket.spec.unit is not None:
            units.setdefault(bucket.spec.unit, []).extend(bucket.params)
    yield from units.values()
