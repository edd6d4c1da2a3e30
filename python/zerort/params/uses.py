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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zerort.errors import StepError
from zerort.grads.compiled import plain, shield
from zerort.grads.hooks import tensors_in
from zerort.memory import FlatModel, unintercepted, version_of
from zerort.params import sharded
from zerort.params.leaves import get_z3_leaf_modules, z3_leaf_module
from zerort.params.passes import Passes
from zerort.params.pins import Pins

__all__ = ["Uses"]

_log = logging.getLogger("zerort")

_sequence_number = torch._C._autograd._get_sequence_nr

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Call:
    """A module as something that needs units while it is called."""

    name: str
    entry: int
    """Its number among the modules."""
    units: int
    """Number of the set of its units."""
    params: Sequence[nn.Parameter] = ()
    depth: int = field(default=0, init=False)
    """How many of its calls are open."""
    versions: Sequence[int] = field(default=(), init=False)
    """Of its parameters, since the first of them began."""
    version: Callable[[Tensor], int] = field(init=False)
    """Reads a parameter's."""
    kinds: Sequence[tuple[type, type, Sequence[nn.Parameter]]] = field(init=False)
    """Its parameters by their class while they are themselves, with the class that guards them."""

    def __post_init__(self) -> None:
        kinds = list(dict.fromkeys(map(type, self.params)))
        plain = kinds in ([], [nn.Parameter])
        self.version = version_of if plain else _eager(unintercepted(version_of))
        self.kinds = [
            (kind, sharded.guarded(kind), [p for p in self.params if type(p) is kind])
            for kind in kinds
        ]

    def conceal(self, passes: Passes, pins: Pins) -> None:
        """The last of its calls is over: its parameters' values are not to be read, unless they are
        kept whole.
        """
        now = list(map(self.version, self.params))
        before = self.versions or now  # an interrupt may come before they are read
        for parameter, old, new in zip(self.params, before, now, strict=True):
            if id(parameter) not in pins.exposed:
                if new != old:
                    passes.lose(parameter)
                sharded.conceal(parameter)
        self.versions = ()


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
        passes.rehook = self.rehook
        self._users: list[nn.Module] = []
        """Modules that use units of their own."""
        self._wrap = plain
        self._units = units
        self._said_meta = False
        self._handles: list[Any] = []
        self._calls: list[Call] = []
        self._behind: dict[int, Tensor] = {}
        self._params = [p for bucket in flat.buckets if bucket.spec.sharded for p in bucket.params]
        names = {id(p): name for name, p in module.named_parameters()}
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
        if own:
            units = self._passes.set_of([self._units[id(p)] for p in own])
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
        self._wrap = shield
        for units, hooked in self._behind.items():
            # in place, for graphs that are there already
            hooked._backward_hooks[0] = shield(self._arriving(units))  # type: ignore[index]
        self._handles += [
            part.register_forward_hook(self._numbering(), prepend=True) for part in self._users
        ]
        # What it traces of `__torch_function__` is a table by function, which does not change.
        warnings.filterwarnings("ignore", r"Dynamo detected a call to [^']*'sharded\.py")

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
                call.conceal(self._passes, self.pins)
                call.depth = 0

    # The hooks. What they need nearly always lies in their defaults, as in grads.hooks, and calls
    # nothing of Python's.

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
        begin = _eager(self._begin)

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

        return _unseen(hook)

    def _begin(self, call: Call) -> bool:
        """A use that is not just one more of what is here; False where there is no pass."""
        if not self._passes.is_open and not self._open(call):
            return False
        self._acquire(call.units)
        return True

    def _acquire(self, units: int) -> None:
        """Brings units; a use of them begins."""
        acquire = self._passes.gatherer.acquire
        number = _sequence_number() if torch.is_grad_enabled() else -1
        if not acquire(units, number):
            self._passes.need(units)
            acquire(units, number)

    def _after(self, own: int, call: Call) -> Callable[..., None]:
        passes, pins, behind = self._passes, self.pins, self._hooked(call.units)
        conceal, end, close = _eager(call.conceal), _eager(self._end), _eager(passes.close)

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

        return _unseen(hook)

    def _end(self, call: Call, out: Any) -> None:
        """A use ends that has brought anything but a new tensor with a node."""
        graded, release = torch.is_grad_enabled(), self._passes.gatherer.release
        if type(out) is Tensor and not (out._is_view() or torch.is_inference_mode_enabled()):
            release(call.units)
            if graded and _any_trains(call.params):
                self._passes.holds(call.units)
            return
        # What shares the parameters' memory may be read as long as the pass lasts: the use stays
        # open.
        if not _shares_memory(out, call.params):
            release(call.units)
        if graded:
            self._hook_outputs(call.params, call.units, out)

    def _hooked(self, units: int) -> Tensor:
        """A tensor with the hook of a set of units, which a node takes over from it: what is called
        in a backward before a node of the module's output runs. A handle for each node, which
        `register_prehook` makes, would cost more than all else that is done behind a module.
        """
        hooked = self._behind.get(units)
        if hooked is None:
            hooked = torch.empty(0, device="cpu", requires_grad=True)
            hooked._backward_hooks = {0: self._wrap(self._arriving(units))}
            self._behind[units] = hooked
        return hooked

    def _arriving(self, units: int) -> Callable[[Any], None]:
        passes = self._passes

        def arrive() -> None:
            if torch.is_grad_enabled():
                raise StepError(
                    "a backward with create_graph=True at stage 3: the second backward would need "
                    "parameters that are sharded by then. Use stage 2 for it"
                )
            if not passes.is_open:
                passes.reached()
            passes.need(units)

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

    def _numbering(self) -> Callable[..., None]:
        """Compiled autograd does not tell a hook at which node it runs: each node of an output says
        so, before what stands behind it is called.
        """
        passes = self._passes

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            for tensor in (out,) if isinstance(out, Tensor) else _outputs(out):
                node = _node_of(tensor)
                if node is not None:
                    noting = torch.empty(0, device="cpu", requires_grad=True)
                    noting._backward_hooks = {0: shield(_noting(passes, node._sequence_nr()))}
                    node._register_hook_dict(noting)

        return _eager(hook)

    def _hook_outputs(self, params: Sequence[nn.Parameter], units: int, out: Any) -> None:
        found = False
        for tensor in (out,) if isinstance(out, Tensor) else _outputs(out):
            if tensor.requires_grad:
                found |= _hook_node(tensor, self._hooked(units))
        if not found and _any_trains(params):
            # The backward may come by another way, of which no hook tells.
            self._passes.holds(units)

    # A pass that the engine has not opened.

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
        self._acquire(units)
        before = list(map(version_of, params))
        out = call()
        for parameter, old in zip(params, before, strict=True):
            if version_of(parameter) != old:
                passes.lose(parameter)
        if _shares_memory(out, params):
            return out  # an alias may be read as long as the pass lasts: the use stays open
        passes.gatherer.release(units)
        if torch.is_grad_enabled():
            self._hook_outputs(params, units, out)
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
        return self.pins.hold(params, modifier, writes=False)


def _eager(call: Callable[..., T]) -> Callable[..., T]:
    """`call`, within which nothing is compiled."""
    wrapped: Callable[..., T] = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
    return wrapped


def _unseen(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook itself, which breaks the graph of a compiled module: what it does is no computation.
    A wrapper would cost as much as the hook; what it calls of Python's has one.
    """
    unseen: Callable[..., None] = torch._dynamo.decorators.skip(hook)
    return unseen


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


def _noting(passes: Passes, number: int) -> Callable[[Any], None]:
    def hook(_: Any) -> None:
        passes.at = number

    return hook


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
