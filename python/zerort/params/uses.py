"""Hooks on modules: each turns the call of a module, or its backward, into a need for its units.

A module's own parameters are themselves (`sharded`) within its call alone. Before the call its
units are brought; behind it they are let go, and the node of each output gets a pre-hook, so that
they are back before the backward reads what autograd has saved of them (`nodes`). A module that is
called while no pass is open (`generate`, `model(x)` for an evaluation) opens one; a use of a
parameter outside its module's call is one of its own (`outside`).

What this guarantees: values are whole wherever torch's functions read them in a pass. What it does
not do: it gathers nothing itself.

A leaf module (`leaves`) is called with all that is below it.

A copy of a module has its hooks, but not its parameters: they do nothing there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zerort.memory import FlatModel
from zerort.params import sharded
from zerort.params.calls import Call, eager, unseen
from zerort.params.contract import Heir
from zerort.params.leaves import get_z3_leaf_modules, z3_leaf_module
from zerort.params.nodes import Nodes, any_trains, shares_memory
from zerort.params.outside import Outside
from zerort.params.passes import Passes
from zerort.params.pins import Pins

__all__ = ["Uses"]


class Uses:
    """Of a model's sharded parameters, until `detach`. `units` maps id(parameter) to its unit;
    behind it they are the `heir`'s.
    """

    def __init__(
        self,
        module: nn.Module,
        flat: FlatModel,
        passes: Passes,
        pins: Pins,
        units: Mapping[int, int],
        heir: Heir,
    ) -> None:
        self.pins = pins
        self._heir = heir
        self._passes = passes
        passes.hooks = self
        self._nodes = Nodes(passes)
        self._users: list[nn.Module] = []
        """Modules that use units of their own."""
        self._units = units
        self._handles: list[Any] = []
        self._calls: list[Call] = []
        self._sharded = [bucket for bucket in flat.buckets if bucket.spec.sharded]
        self._params = [parameter for bucket in self._sharded for parameter in bucket.params]
        names = {id(p): name for name, p in module.named_parameters()}
        self._whole = [p for p in module.parameters() if id(p) not in units]
        keeper = Outside(passes, self._nodes, pins, units)
        for parameter in (*self._params, *self._whole):
            sharded.enter(parameter, keeper, names[id(parameter)])
        leaves = get_z3_leaf_modules(module)
        inside = {id(part) for leaf in leaves for part in leaf.modules() if part is not leaf}
        passes.strays.names = [name or type(module).__name__ for name, _ in module.named_modules()]
        for entry, (name, part) in enumerate(module.named_modules()):
            if id(part) not in inside:
                self._attach(entry, name or type(module).__name__, part)
        for parameter in self._params:
            parameter.__class__ = sharded.guarded(type(parameter))

    def _attach(self, entry: int, name: str, part: nn.Module) -> None:
        own = [p for p in part.parameters(z3_leaf_module(part)) if id(p) in self._units]
        if own:
            units = self._passes.needs.set_of([self._units[id(p)] for p in own])
            call = Call(name, entry, units, own)
            self._calls.append(call)
            self._users.append(part)
            before, after = self._before(id(part), call), self._after(id(part), call)
        elif any(id(p) in self._units for p in part.parameters()):
            call = Call(name, entry, -1)
            before, after = self._opening(id(part), call), self._closing(id(part), call)
        else:
            return
        self._handles += [
            part.register_forward_pre_hook(before, prepend=True),
            part.register_forward_hook(after, always_call=True),
        ]

    def rehook(self) -> None:
        """From now on no hook is traced by compiled autograd."""
        self._nodes.rehook()
        self._handles += [
            part.register_forward_hook(eager(self._nodes.number), prepend=True)
            for part in self._users
        ]
        # What it traces of `__torch_function__` is a table by function, which does not change.
        warnings.filterwarnings("ignore", r"Dynamo detected a call to [^']*'sharded\.py")

    def detach(self, *, whole: bool = True) -> None:
        """Takes the hooks off; values that are not here are the heir's, or nobody's where they are
        not the `whole` of one state. A second call does nothing.
        """
        for handle in self._handles:
            handle.remove()
        self.pins.end()
        left = [bucket for bucket in self._sharded if not self.pins.keep(bucket)]
        lost = [] if whole else [parameter for bucket in left for parameter in bucket.params]
        for parameter in lost:
            sharded.lose(parameter)
        for parameter in (*self._params, *self._whole):
            sharded.leave(parameter)
        self._handles, self._sharded, self._params, self._whole = [], [], [], []
        if whole:
            self._heir(left)

    def settle(self) -> None:
        """Behind a pass: no call is open, however it ended."""
        for call in self._calls:
            if call.depth:
                call.conceal(self._passes, self.pins)
                call.depth = 0

    # The hooks. What they need nearly always lies in their defaults, as in grads.hooks, and calls
    # nothing of Python's.

    def _opening(self, own: int, call: Call) -> Callable[..., None]:
        passes = self._passes

        def hook(module: nn.Module, args: Any) -> None:
            if not passes.is_open and id(module) == own:
                self._open(call)

        return eager(hook)

    def _closing(self, own: int, call: Call) -> Callable[..., None]:
        passes = self._passes

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if passes.opener is call and id(module) == own:
                passes.close(complete=out is not None)

        return eager(hook)

    def _before(self, own: int, call: Call) -> Callable[..., None]:
        begin = eager(self._begin)

        def hook(
            module: nn.Module,
            args: Any,
            own: int = own,
            call: Call = call,
            units: int = call.units,
            reuse: Callable[[int], bool] = self._passes.gatherer.reuse,
        ) -> None:
            if id(module) != own or not (reuse(units) or begin(call)):
                return
            call.depth += 1
            if call.depth == 1:
                for plain, _, params in call.kinds:
                    for parameter in params:
                        parameter.__class__ = plain
                call.versions = list(map(call.version, call.params))

        return unseen(hook)

    def _begin(self, call: Call) -> bool:
        """A use that is not just one more of what is here; False where there is no pass."""
        if not self._passes.is_open and not self._open(call):
            return False
        self._passes.needs.acquire(call.units)
        return True

    def _after(self, own: int, call: Call) -> Callable[..., None]:
        passes, pins, behind = self._passes, self.pins, self._nodes.hooked(call.units)
        conceal, end, close = eager(call.conceal), eager(self._end), eager(passes.close)

        def hook(
            module: nn.Module,
            args: Any,
            out: Any,
            own: int = own,
            call: Call = call,
            units: int = call.units,
            release: Callable[[int], None] = passes.gatherer.release,
            behind: Tensor = behind,
        ) -> None:
            if id(module) != own or not call.depth:
                return
            if call.depth == 1:
                if pins.exposed or list(map(call.version, call.params)) != call.versions:
                    conceal(passes, pins)
                else:
                    for _, guarded, params in call.kinds:
                        for parameter in params:
                            parameter.__class__ = guarded
                    call.versions = ()
            call.depth -= 1
            if type(out) is Tensor and (node := out.grad_fn) is not None and not out._is_view():
                release(units)
                node._register_hook_dict(behind)
            elif out is None:
                release(units)
            else:
                end(call, out)
            if passes.opener is call:
                close(complete=out is not None)

        return unseen(hook)

    def _end(self, call: Call, out: Any) -> None:
        """A use ends that has brought anything but a new tensor with a node."""
        graded, release = torch.is_grad_enabled(), self._passes.gatherer.release
        if type(out) is Tensor and not (out._is_view() or torch.is_inference_mode_enabled()):
            release(call.units)
            if graded and any_trains(call.params):
                self._passes.needs.holds(call.units)
            return
        # What shares the parameters' memory may be read as long as the pass lasts: the use stays
        # open.
        if not shares_memory(out, call.params):
            release(call.units)
        if graded:
            self._nodes.hook(call.params, call.units, out)

    # A pass that the engine has not opened.

    def _open(self, call: Call) -> bool:
        graded = torch.is_grad_enabled()
        self._passes.open("forward" if graded else "evaluation", call, call.entry)
        return self._passes.is_open
