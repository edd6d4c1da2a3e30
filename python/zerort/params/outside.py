"""Uses of parameters outside their module's call: who keeps them (`sharded.Keeper`).

A parameter that is read there (a tied head, an embedding's weight in a loss) is a use of its own,
in a pass. Outside a pass it is refused by name, as a write is anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from zerort.errors import StepError
from zerort.memory import unintercepted, version_of
from zerort.params import sharded
from zerort.params.nodes import Nodes, shares_memory
from zerort.params.passes import Passes
from zerort.params.pins import Pins

__all__ = ["Outside"]

_log = logging.getLogger("zerort")


class Outside:
    """Keeps a model's parameters; `units` maps id(parameter) to its unit."""

    def __init__(self, passes: Passes, nodes: Nodes, pins: Pins, units: Mapping[int, int]) -> None:
        self._passes = passes
        self._nodes = nodes
        self._pins = pins
        self._units = units
        self._said_meta = False

    @unintercepted
    def use(self, params: Sequence[nn.Parameter], call: Callable[[], Any]) -> Any:
        """A use of its own, in a pass. Raises `StepError` outside one."""
        passes = self._passes
        if not passes.is_open:
            raise StepError(
                f"parameter {sharded.name_of(params[0])} is sharded, and its values are read "
                "outside a forward: read them inside zerort.zero.GatheredParameters(parameters), "
                "which all ranks enter together"
            )
        units = passes.needs.set_of([self._units[id(p)] for p in params])
        passes.needs.acquire(units)
        before = list(map(version_of, params))
        out = call()
        for parameter, old in zip(params, before, strict=True):
            if version_of(parameter) != old:
                passes.lose(parameter)
        if shares_memory(out, params):
            return out  # an alias may be read as long as the pass lasts: the use stays open
        passes.gatherer.release(units)
        if torch.is_grad_enabled():
            self._nodes.hook(params, units, out)
        return out

    def write(self, access: sharded.Writing, call: Callable[[], Any]) -> Any:
        """Raises `StepError`: only shards are kept."""
        name = sharded.name_of(access.written[0])
        raise StepError(
            f"parameter {name} is sharded, and {access.what} would write values that are not kept: "
            "write inside zerort.zero.GatheredParameters(parameters, modifier_rank=0), which "
            "brings rank 0's values to all ranks"
        )

    def detached(self, parameter: nn.Parameter) -> Tensor | None:
        """Outside a pass a tensor without values: a state dict wants it."""
        if self._passes.is_open:
            return None
        self._say_meta()
        return sharded.meta_like(parameter)

    def _say_meta(self) -> None:
        if not self._said_meta:
            self._said_meta = True
            _log.warning(
                "the values of sharded parameters are not here: state_dict() holds tensors on the "
                "meta device in their place. engine.save_checkpoint() and "
                "engine.save_16bit_model() save them, and inside "
                "zerort.zero.GatheredParameters(parameters) they are there"
            )

    def copied(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """None: a copy would be in no bucket."""
        return None

    def hold(
        self, params: Sequence[nn.Parameter], modifier: int | None
    ) -> AbstractContextManager[None]:
        """Between passes, or within one as a use."""
        return self._pins.hold(params, modifier, writes=False)
