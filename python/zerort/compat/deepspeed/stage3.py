"""What DeepSpeed's callers find on parameters and on the optimizer at stage 3.

A parameter answers `ds_status` and its kin by its class while it is sharded; by these attributes
when it is whole, in a forward or for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from zerort.params import sharded
from zerort.zero import GatheredParameters

__all__ = ["ParameterOffload", "mark_parameters", "unwrap_model_for_generation"]


def mark_parameters(module: nn.Module) -> None:
    """Gives each parameter what it answers when it is whole."""
    for parameter in module.parameters():
        sharded.mark(parameter, stays_whole=not isinstance(parameter, sharded.Sharded))


@contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[Any]:
    """Within, the engine's parameters are whole, so that no token gathers them; below stage 3
    nothing is done. All ranks enter and leave it together.
    """
    with GatheredParameters(model.parameters()):
        yield model


class ParameterOffload:
    """What programs take DeepSpeed's hooks off a model with before they generate, and put them back
    with: there is nothing to take off here.
    """

    def __init__(self) -> None:
        self.module = _Nothing()
        self.forward_hooks: list[Any] = []
        self.backward_hooks: list[Any] = []

    def _register_deepspeed_module(self, module: Any, count: Any = None) -> None:
        pass


class _Nothing:
    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        return iter(())

    ds_external_parameters = named_parameters
