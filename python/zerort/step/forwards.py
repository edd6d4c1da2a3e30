"""The transaction of an engine that only runs forward: it has no micro-batch, so nothing that
belongs to one can be done with it.

What it guarantees: forwards of ranks may differ in number, as evaluations may; what asks for
gradients says why there are none, and nothing is under way afterwards. Below stage 3 the module's
parameters are the module's own affair, and a direct `loss.backward()` is torch's. At stage 3 one
may come through the module on its way to something else, but no parameter gets a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from zerort.errors import StepError
from zerort.grads.compiled import Around
from zerort.memory import unintercepted
from zerort.step.participation import Participation
from zerort.step.transaction import Transaction

__all__ = ["ForwardOnly"]


class ForwardOnly(Transaction):
    """Refuses the calls that train, for `reason`."""

    def __init__(self, part: Participation, reason: str) -> None:
        super().__init__(part)
        self._reason = reason
        self._params = part.boundary.flat.params

    def scale(self, loss: Tensor, *, divides: bool) -> Tensor:
        """Refused."""
        self._refuse("scale()")

    def backward(self, loss: Tensor, *, divides: bool, retain_graph: bool) -> None:
        """Refused."""
        self._refuse("backward()")

    def step(self, arguments: Mapping[str, Any]) -> None:
        """Refused."""
        self._refuse("step()")

    def compile_backwards(self, around: Around) -> None:
        """Refused."""
        self._refuse("compile(compiled_autograd_enabled=True)")

    def coalesce(self) -> NoReturn:
        """Refused."""
        self._refuse("coalesce_grad_reduction()")

    def reduce(self) -> None:
        """Refused."""
        self._refuse("allreduce_gradients()")

    def set_boundary(self, is_boundary: bool) -> None:
        """Refused."""
        self._refuse("set_gradient_accumulation_boundary()")

    def join(self, *, by_initial_world: bool, throws: bool) -> NoReturn:
        """Refused."""
        self._refuse("join()")

    def check_departure(self) -> None:
        """Refused: what there is are the parameters."""
        self._refuse("offload_states()")

    def _refuse(self, call: str) -> NoReturn:
        self._demand(call)
        raise StepError(f"{call} of an engine that only runs forward: {self._reason}")

    def reached(self) -> None:
        """Raises `StepError` where the backward is to bring gradients."""
        if self._asks_for_gradients():
            raise StepError(
                "a backward has come to an engine that only runs forward, and at stage 3 its "
                "parameters keep no gradients: call it under torch.no_grad(), or detach what it "
                f"returns, or freeze it with requires_grad_(False). To train it: {self._reason}"
            )
        super().reached()

    @unintercepted
    def _asks_for_gradients(self) -> bool:
        return any(parameter.requires_grad for parameter in self._params)
