"""What DeepSpeed's callers find on parameters and on the optimizer at stage 3.

A parameter answers `ds_status` and its kin by its class while it is sharded; by these attributes
when it is whole, in a forward or for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from zerort.params.sharded import Sharded, ZeroParamStatus

__all__ = ["ParameterOffload", "mark_parameters"]


def mark_parameters(module: nn.Module) -> None:
    """Gives each parameter what it answers when it is whole."""
    for parameter in module.parameters():
        # past the class of a sharded one, which has properties of these names
        parameter.__dict__.update(
            ds_status=ZeroParamStatus.AVAILABLE,
            ds_shape=parameter.shape,
            ds_numel=parameter.numel(),
            ds_id=id(parameter),
            ds_persist=not isinstance(parameter, Sharded),
        )


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
