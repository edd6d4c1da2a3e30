"""The graph behind a module's outputs: which nodes run first in a backward, and hooks before them.

A pre-hook of a node is not lost when a view of the output is changed in place, as a tensor's hook
is: it stands on the base's node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zerort.errors import StepError
from zerort.grads.compiled import plain, shield
from zerort.grads.hooks import tensors_in
from zerort.memory import unintercepted
from zerort.params.passes import Passes

__all__ = ["Nodes", "any_trains", "shares_memory"]


class Nodes:
    """Hooks before the nodes of outputs, which bring the units that `passes` need there."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._wrap = plain
        self._behind: dict[int, Tensor] = {}

    def rehook(self) -> None:
        """From now on no hook is traced by compiled autograd."""
        self._wrap = shield
        for units, hooked in self._behind.items():
            # in place, for graphs that are there already
            hooked._backward_hooks[0] = shield(self._arriving(units))  # type: ignore[index]

    def hooked(self, units: int) -> Tensor:
        """A tensor with the hook of a set of units, which a node takes over from it: what is called
        in a backward before a node of the module's output runs. A handle for each node, which
        `register_prehook` makes, would cost more than all else that is done behind a module.
        """
        hooked = self._behind.get(units)
        if hooked is None:
            hooked = self._behind[units] = _with_hook(self._wrap(self._arriving(units)))
        return hooked

    def hook(self, params: Sequence[nn.Parameter], units: int, out: Any) -> None:
        """The hook of a set of units before the nodes of what a use of `params` returns."""
        found = False
        for tensor in (out,) if isinstance(out, Tensor) else _outputs(out):
            if tensor.requires_grad:
                found |= _hook_node(tensor, self.hooked(units))
        if not found and any_trains(params):
            # The backward may come by another way, of which no hook tells.
            self._passes.needs.holds(units)

    def number(self, module: nn.Module, args: Any, out: Any) -> None:
        """Compiled autograd does not tell a hook at which node it runs: each node of an output says
        so, before what stands behind it is called.
        """
        for tensor in (out,) if isinstance(out, Tensor) else _outputs(out):
            node = _node_of(tensor)
            if node is not None:
                noting = _with_hook(shield(self._noting(node._sequence_nr())))
                node._register_hook_dict(noting)

    def _noting(self, number: int) -> Callable[[Any], None]:
        needs = self._passes.needs

        def hook(_: Any) -> None:
            needs.at = number

        return hook

    def _arriving(self, units: int) -> Callable[[Any], None]:
        passes = self._passes

        def arrive() -> None:
            if torch.is_grad_enabled():
                raise StepError(
                    "a backward with create_graph=True at stage 3: the second backward would need "
                    "parameters that are sharded by then. Use stage 2 for it"
                )
            if not passes.is_open:
                passes.owner.reached()
            passes.needs.need(units)

        def hook(
            _: Any,
            units: int = units,
            is_current: Callable[[int], bool] = passes.gatherer.is_current,
            graded: Callable[[], bool] = torch.is_grad_enabled,
            arrive: Callable[[], None] = arrive,
        ) -> None:
            if graded() or not is_current(units):
                arrive()

        return hook


def _with_hook(hook: Callable[[Any], None]) -> Tensor:
    tensor = torch.empty(0, device="cpu", requires_grad=True)
    tensor._backward_hooks = {0: hook}
    return tensor


def _outputs(out: Any) -> Iterator[Tensor]:
    leaves = tree_leaves(out)
    if all(isinstance(leaf, _KNOWN) for leaf in leaves):
        return (leaf for leaf in leaves if isinstance(leaf, Tensor))
    return tensors_in(out)


_KNOWN = (Tensor, str, bytes, int, float, complex, type(None))


def _hook_node(tensor: Tensor, hooked: Tensor) -> bool:
    """The hook of `hooked` before the node of the tensor."""
    node = _node_of(tensor)
    if node is None:
        return False
    node._register_hook_dict(hooked)
    return True


def _node_of(tensor: Tensor) -> Any:
    """What made the tensor, or the memory that it is a view of."""
    if tensor._is_view():
        base = tensor._base
        if base is not None and base.grad_fn is not None:
            return base.grad_fn
    return tensor.grad_fn


@unintercepted
def any_trains(params: Sequence[nn.Parameter]) -> bool:
    """Whether one requires grad."""
    return any(parameter.requires_grad for parameter in params)


@unintercepted
def shares_memory(out: Any, params: Sequence[nn.Parameter]) -> bool:
    """Whether a tensor among what `out` holds is a view of their memory."""
    held = {p.untyped_storage()._cdata for p in params}
    return any(
        leaf.layout is torch.strided and leaf.untyped_storage()._cdata in held
        for leaf in tree_leaves(out)
        if isinstance(leaf, Tensor)
    )
