"""What optimizers change outside of their step: those that train at other weights than they are
evaluated at change between the two by calls of their own, `train()` and `eval()`.

What it guarantees: after such a call every rank has the new weights. What it does not do: it knows
no other calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from zerort.errors import StepError
from zerort.memory import FlatModel
from zerort.mesh import Consensus
from zerort.optim import Update, members_of
from zerort.params.roll import UTILITY
from zerort.step.readings import Components
from zerort.step.transaction import Transaction

__all__ = ["Outside"]

_CALLS = ("train", "eval")


class Outside:
    """Stands before these calls on the optimizers of one engine, until `close`."""

    def __init__(self, transaction: Transaction, parts: Components) -> None:
        self._transaction, self._reduction = transaction, parts.reduction
        self._exchange = parts.boundary.exchange
        self._flat: FlatModel = parts.boundary.flat
        self._consensus = Consensus(parts.mesh.control, StepError)
        update: Update = parts.boundary.optimizer
        every = () if update.optimizer is None else members_of(update.optimizer)
        self._watched = [
            (member, name)
            for member in every
            for name in _CALLS
            if callable(getattr(type(member), name, None))
        ]
        for member, name in self._watched:
            vars(member)[name] = partial(self._call, f"optimizer.{name}()", getattr(member, name))

    def close(self) -> None:
        """The calls are the optimizers' own again."""
        for member, name in self._watched:
            vars(member).pop(name, None)
        self._watched.clear()

    def _call(self, what: str, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """All ranks make the call together, between two steps."""
        self._transaction.refuse_away(what)
        self._transaction.pause(UTILITY)
        self._meet(what)
        with torch.no_grad():
            self._flat.take_writes()
            self._exchange.take_writes()
            for bucket in self._flat.stepped:
                bucket.ready()
            try:
                return self._consensus.agree(f"{what} failed", lambda: inner(*args, **kwargs))
            finally:
                for bucket in self._flat.stepped:
                    bucket.write_back()
                self._exchange.values()
                self._reduction.publish()

    def _meet(self, what: str) -> None:
        calls = self._consensus.gather(f"{what} failed", lambda: what)
        if len(set(calls)) > 1:
            listed = "; ".join(f"rank {rank} calls {call}" for rank, call in enumerate(calls))
            raise StepError(f"all ranks change the optimizer's weights together: {listed}")
