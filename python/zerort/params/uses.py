"""Hooks on modules: each turns the call of a module, or its backward, into a need for its units.

A module's own parameters are themselves (`sharded`) within its call alone. Before the call its
units are brought; behind it they are let go, and the node of each output gets a pre-hook, so that
they are back before the backward reads what autograd has saved of them. A pre-hook of a node is not
lost when a view of the output is changed in place, as a tensor's hook is: it stands on the base's
node.

A parameter that is used outside its module's call is a use of its own, and a call of a module while
no pass is open (`generate`, `model(x)` for an evaluation) opens one.

What this guarantees: values are whole wherever torch's functions read them in a pass. What it does
not do: it gathers nothing itself.

A leaf module (`leaves`) is called with all that is below it.

A copy of a module has its hooks, but not its parameters: they do nothing there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zerort.errors import StepError
from zerort.grads.hooks import tensors_in
from zerort.memory import FlatModel, unintercepted
from zerort.params import sharded
from zerort.params.leaves import get_z3_leaf_modules, z3_leaf_module
from zerort.params.passes import Passes
from zerort.params.pins import Pins

__all__ = ["Uses"]

_log = logging.getLogger("zerort")

_sequence_number = torch._C._autograd._get_sequence_nr


@dataclass(eq=False)
class Call:
    """A module as something that needs units while it is called."""

    name: str
    entry: int
    """Its number among the modules."""
    units: int
    """Number of the set of its units."""
    params: Sequence[nn.Parameter] = ()
    classes: Sequence[tuple[type[nn.Parameter], type[sharded.Sharded]]] = ()
    depth: int = field(default=0, init=False)
    """How many of its calls are open."""

    def expose(self) -> None:
        """Its parameters are themselves."""
        for parameter, (plain, _) in zip(self.params, self.classes, strict=True):
            parameter.__class__ = plain

    def conceal(self, pins: Pins) -> None:
        """Its parameters' values are not to be read, unless they are kept whole."""
        for parameter, (_, guarded) in zip(self.params, self.classes, strict=True):
            if not pins.exposes(parameter):
                parameter.__class__ = guarded


class Uses:
    """Of a model's sharded parameters, until `detach`. `units` maps id(parameter) to its unit."""

    def __init__(
        self,
        module: nn.Module,
        flat: FlatModel,
        passes: Passes,
        pins: Pins,
        units: Mapping[int, int],
    ) -> None:
        self.pins = pins
        self._passes = passes
        passes.settle, passes.detach = self.settle, self.detach
        self._units = units
        self._said_meta = False
        self._handles: list[Any] = []
        self._calls: list[Call] = []
        self._params = [p for bucket in flat.buckets if bucket.spec.sharded for p in bucket.params]
        names = {id(p): name for name, p in module.named_parameters()}
        self._pins: dict[int, int] = {}
        self._whole = [p for p in module.parameters() if id(p) not in units]
        for parameter in (*self._params, *self._whole):
            sharded.enter(parameter, self, names[id(parameter)])
        leaves = get_z3_leaf_modules(module)
        inside = {id(part) for leaf in leaves for part in leaf.modules() if part is not leaf}
        passes.names = [name or type(module).__name__ for name, _ in module.named_modules()]
        for entry, (name, part) in enumerate(module.named_modules()):
            if id(part) not in inside:
                self._attach(entry, name or type(module).__name__, part)
        for parameter in self._params:
            parameter.__class__ = sharded.guarded(type(parameter))

    def _attach(self, entry: int, name: str, part: nn.Module) -> None:
        own = [p for p in part.parameters(z3_leaf_module(part)) if id(p) in self._units]
        if not own:
            if any(id(p) in self._units for p in part.parameters()):
                call = Call(name, entry, -1)
                self._handles += [
                    part.register_forward_pre_hook(self._opening(id(part), call), prepend=True),
                    part.register_forward_hook(self._closing(id(part), call), always_call=True),
                ]
            return
        units = self._passes.set_of([self._units[id(p)] for p in own])
        classes = [(type(p), sharded.guarded(type(p))) for p in own]
        call = Call(name, entry, units, own, classes)
        self._calls.append(call)
        self._handles += [
            part.register_forward_pre_hook(self._before(id(part), call), prepend=True),
            part.register_forward_hook(self._after(id(part), call), always_call=True),
        ]

    def detach(self) -> None:
        """Takes the hooks off; parameters whose values are not there have none any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in (*self._params, *self._whole):
            sharded.lose(parameter)

    def settle(self) -> None:
        """Behind a pass: no call is open, however it ended."""
        for call in self._calls:
            if call.depth:
                call.depth = 0
                call.conceal(self.pins)

    # The hooks. Defaults instead of a closure's cells, as in grads.hooks.

    def _opening(self, own: int, call: Call) -> Callable[..., None]:
        passes = self._passes

        def hook(module: nn.Module, args: Any) -> None:
            if not passes.is_open and id(module) == own:
                self._open(call)

        return _eager(hook)

    def _closing(self, own: int, call: Call) -> Callable[..., None]:
        passes = self._passes

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if passes.opener is call and id(module) == own:
                passes.close(complete=out is not None)

        return _eager(hook)

    def _before(self, own: int, call: Call) -> Callable[..., None]:
        passes, units = self._passes, call.units
        acquire, graded = passes.gatherer.acquire, torch.is_grad_enabled

        def hook(module: nn.Module, args: Any) -> None:
            if id(module) != own:
                return
            if not passes.is_open and not self._open(call):
                return
            number = _sequence_number() if graded() else -1
            if not acquire(units, number):
                passes.need(units)
                acquire(units, number)
            if not call.depth:
                call.expose()
            call.depth += 1

        return _eager(hook)

    def _after(self, own: int, call: Call) -> Callable[..., None]:
        passes, units = self._passes, call.units
        release, graded = passes.gatherer.release, torch.is_grad_enabled
        behind, params = self._behind(units), call.params

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if id(module) != own or not call.depth:
                return
            call.depth -= 1
            if not call.depth:
                call.conceal(self.pins)
            if type(out) is Tensor and not (out._is_view() or torch.is_inference_mode_enabled()):
                release(units)
                node = out.grad_fn
                if node is not None:
                    node.register_prehook(behind)
                elif graded() and _any_trains(params):
                    passes.holds(units)
            elif out is not None:
                # What shares the parameters' memory may be read as long as the pass lasts: the use
                # stays open.
                if not _shares_memory(out, params):
                    release(units)
                if graded():
                    self._hook_outputs(params, units, behind, out)
            else:
                release(units)
            if passes.opener is call:
                passes.close(complete=out is not None)

        return _eager(hook)

    def _behind(self, units: int) -> Callable[[Any], None]:
        """What is called in a backward before a node of the module's output runs."""
        passes, need = self._passes, self._passes.gatherer.need
        running = torch._C._current_autograd_node

        def hook(_: Any) -> None:
            if torch.is_grad_enabled():
                raise StepError(
                    "a backward with create_graph=True at stage 3: the second backward would need "
                    "parameters that are sharded by then. Use stage 2 for it"
                )
            if not passes.is_open:
                passes.reached()
            node = running()
            answer = need(units, -1 if node is None else node._sequence_nr())
            if answer is not None:
                passes.need(units, answer)

        return hook

    def _hook_outputs(
        self,
        params: Sequence[nn.Parameter],
        units: int,
        behind: Callable[[Any], None],
        out: Any,
    ) -> None:
        found = False
        for tensor in (out,) if isinstance(out, Tensor) else _outputs(out):
            if tensor.requires_grad:
                found |= _hook_node(tensor, behind)
        if not found and _any_trains(params):
            # The backward may come by another way, of which no hook tells.
            self._passes.holds(units)

    # A pass that nobody has opened.

    def _open(self, call: Call) -> bool:
        graded = torch.is_grad_enabled()
        self._passes.open("forward" if graded else "evaluation", call, call.entry)
        return self._passes.is_open

    # Uses outside the module: `sharded.Keeper`.

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
        units = passes.set_of([self._units[id(p)] for p in params])
        number = _sequence_number() if torch.is_grad_enabled() else -1
        if not passes.gatherer.acquire(units, number):
            passes.need(units)
            passes.gatherer.acquire(units, number)
        out = call()
        if _shares_memory(out, params):
            return out  # an alias may be read as long as the pass lasts: the use stays open
        passes.gatherer.release(units)
        if torch.is_grad_enabled():
            self._hook_outputs(params, units, self._behind(units), out)
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
        """None: a copy would be nobody's."""
        return None

    def hold(
        self, params: Sequence[nn.Parameter], modifier: int | None
    ) -> AbstractContextManager[None]:
        """Between passes, or within one as a use."""
        return self.pins.hold(params, modifier, writes=False)


def _eager(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook, which breaks the graph of a compiled module: what it does is no computation."""
    wrapped: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return wrapped


def _outputs(out: Any) -> Iterator[Tensor]:
    leaves = tree_leaves(out)
    if all(isinstance(leaf, _KNOWN) for leaf in leaves):
        return (leaf for leaf in leaves if isinstance(leaf, Tensor))
    return tensors_in(out)


_KNOWN = (Tensor, str, bytes, int, float, complex, type(None))


def _hook_node(tensor: Tensor, hook: Callable[[Any], None]) -> bool:
    """A pre-hook on the node that made the tensor, or the memory that it is a view of."""
    node = tensor.grad_fn
    if tensor._is_view():
        base = tensor._base
        if base is not None and base.grad_fn is not None:
            node = base.grad_fn
    if node is None:
        return False
    node.register_prehook(hook)
    return True


@unintercepted
def _any_trains(params: Sequence[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in params)


@unintercepted
def _shares_memory(out: Any, params: Sequence[nn.Parameter]) -> bool:
    held = {p.untyped_storage()._cdata for p in params}
    return any(
        leaf.layout is torch.strided and leaf.untyped_storage()._cdata in held
        for leaf in tree_leaves(out)
        if isinstance(leaf, Tensor)
    )
