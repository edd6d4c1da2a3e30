"""All-reduces in which every rank also says whether it has failed.

What it guarantees: a rank that has failed goes on to take part, on zeros, and all ranks stop behind
the same all-reduce. What it does not do: it gives no reason; the vote does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zerort.features.power_iteration import finite
from zerort.mesh import Control

__all__ = ["FailStop", "Stopped"]


class Stopped(Exception):
    """Some rank has failed: raised on all behind the same all-reduce."""


class FailStop:
    """One computation of all ranks."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._error: BaseException | None = None

    def attempt(
        self, call: Callable[[], Any], explained: Callable[[BaseException], Exception]
    ) -> Any:
        """What `call` returns; None where it raised, which is this rank's failure."""
        try:
            return call()
        except Exception as error:
            self._error = explained(error)
        except BaseException as interrupt:
            self._error = interrupt
        return None

    def count(self, flags: Sequence[bool]) -> list[int]:
        """On how many ranks each of `flags` is set; the first one where a rank has failed."""
        values = torch.tensor(flags, dtype=torch.float64)
        values[0] = values[0] or self._error is not None
        self._control.all_reduce(values)
        return [int(value) for value in values.tolist()]

    def mean(self, mine: Tensor | None, numel: int) -> Tensor:
        """Over the ranks (numel,), in fp32. Raises `Stopped` on all where a rank has failed."""
        message = torch.zeros(numel + 1)
        if mine is None:
            message[-1] = 1
        else:
            message[:-1] = finite(mine) / self._control.world
        self._control.all_reduce(message)
        if message[-1]:
            raise Stopped
        return message[:-1]

    def raise_own(self) -> None:
        """Raises what this rank failed with, if it has."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback holds this frame, which would hold it in turn
