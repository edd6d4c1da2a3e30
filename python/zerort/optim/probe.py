"""What an optimizer can do, found out by letting a twin of it step.

The engine gives an optimizer other tensors than it was made with: flat pieces of fp32, or at stage
0 whole parameters. Whether that is right depends on what its step does, and neither its class nor
its signature tells. So a twin steps over small tensors. It has copies of all the optimizer's own
attributes; the optimizer itself, its parameters and the random numbers of the process stay as they
were.

What this does not see: anything that shows only with the values of a real training, and what a step
does to the world outside, which the twin's step does too.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerort.memory import DTYPES
from zerort.optim.initial import InitialState
from zerort.optim.lion import Lion

__all__ = ["Abilities", "examine", "is_known"]

_KNOWN = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
    Lion,
)

STEPS = 3
NUMEL = 256
"""Elements of a flat tensor of the probe, and of two halves of it."""


@dataclass(frozen=True)
class Abilities:
    """What an optimizer can be given. A reason says why it cannot, None that it can."""

    never: str | None = None
    """Why it may run at no stage."""
    shards: str | None = None
    """Why it may not run on shards, only on whole parameters."""
    gaps: bool = True
    """It steps where groups are empty or tensors have no gradient."""


def is_known(optimizer: Optimizer) -> bool:
    """Whether nothing has to be tried. A subclass may have changed `step`."""
    return type(optimizer) in _KNOWN


def examine(optimizer: Optimizer) -> Abilities:
    """Lets twins of `optimizer`, which holds the module's parameters still, step."""
    if is_known(optimizer):
        return Abilities()
    with _undisturbed(optimizer):
        probe = _Probe(optimizer)
        shards = _failure(probe.flat)
        never = None if shards is None else _failure(probe.shaped)
        gaps = never is None and _failure(probe.nothing) is None
    return Abilities(None if never is None else _advised(never), shards, gaps)


@contextmanager
def _undisturbed(optimizer: Optimizer) -> Iterator[None]:
    """Random numbers drawn within are drawn again after it."""
    places = {p.device for group in optimizer.param_groups for p in group["params"]}
    devices = [place for place in places if place.type != "cpu"]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for device in devices:
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        torch.default_generator.manual_seed(0)
        yield


class _Unfit(Exception):
    """A reason in words of ours."""


def _failure(attempt: Callable[[], None]) -> str | None:
    """Why `attempt` fails; whatever an optimizer raises is an answer."""
    try:
        attempt()
    except _Unfit as reason:
        return str(reason)
    except Exception as error:
        return f"its step() raises {type(error).__name__}: {error}"
    return None


def _advised(reason: str) -> str:
    if "closure" in reason:
        return (
            f"{reason}. A closure repeats forward and backward, and engine.step() applies "
            "gradients that have been summed over ranks already; use an optimizer whose step() "
            "needs none, such as AdamW"
        )
    return (
        f"{reason}. The engine puts tensors of its own into param_groups: let step() work on "
        "self.param_groups and keep what belongs to a tensor in self.state"
    )


class _Probe:
    """Tensors for each group, like what the engine would give."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: list[list[nn.Parameter]] = [
            [p for p in group["params"] if p.dtype in DTYPES and p.numel()]
            for group in optimizer.param_groups
        ]
        self._params = [parameter for group in self._groups for parameter in group]
        self._initial = InitialState(optimizer, self._params)

    def flat(self) -> None:
        """Steps over flat tensors must equal the same steps over their halves."""
        models = [group[:1] for group in self._groups]
        whole = [[_drawn((NUMEL,), model) for model in group] for group in models]
        halves = [[half for start in group for half in start.chunk(2)] for group in whole]
        twins = [[model for model in group for _ in range(2)] for group in models]
        once, twice = self._run(models, whole), self._run(twins, halves)
        if torch.equal(once, torch.cat([start.reshape(-1) for group in whole for start in group])):
            raise _Unfit(f"{STEPS} steps of it move nothing, so nothing shows what it looks at")
        if not torch.allclose(once, twice, rtol=1e-5, atol=1e-7):
            raise _Unfit(
                f"{STEPS} steps over {NUMEL} elements differ from the same steps over two halves "
                f"of {NUMEL // 2}: it looks at whole tensors"
            )

    def shaped(self) -> None:
        """Steps over tensors with as many dimensions as the parameters."""
        models = [list({p.dim(): p for p in group}.values()) for group in self._groups]
        self._run(models, [[_drawn(_small(p), p) for p in group] for group in models])

    def nothing(self) -> None:
        """Steps where a group is empty, and where no tensor has a gradient."""
        _Twin(self._optimizer).step()
        twin = _Twin(self._optimizer)
        for index, group in enumerate(self._groups):
            twin.give(index, [nn.Parameter(_drawn((NUMEL,), p)) for p in group[:1]])
        twin.step()

    def _run(
        self, models: Sequence[Sequence[nn.Parameter]], starts: Sequence[Sequence[Tensor]]
    ) -> Tensor:
        """All elements after the steps; each start has the initial state of its model."""
        twin = _Twin(self._optimizer)
        self._initial.begin(twin.optimizer)
        params = [[nn.Parameter(start.clone()) for start in group] for group in starts]
        position = {id(parameter): index for index, parameter in enumerate(self._params)}
        for index, (group, alike) in enumerate(zip(params, models, strict=True)):
            twin.give(index, group)
            for parameter, model in zip(group, alike, strict=True):
                state = self._initial.of(position[id(model)], parameter)
                if state:
                    twin.optimizer.state[parameter] = state
        every = [parameter for group in params for parameter in group]
        torch.default_generator.manual_seed(0)
        for step in range(STEPS):
            _give_gradients(every, step)
            twin.step()
        if twin.has_moved_others():
            raise _Unfit("its step() changes parameters that are not in its param_groups")
        return torch.cat([parameter.detach().reshape(-1) for parameter in every])


def _drawn(shape: tuple[int, ...], like: nn.Parameter) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.randn(shape, dtype=dtype).to(like.device)


def _small(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(min(size, 8) for size in parameter.shape)


def _give_gradients(params: Sequence[nn.Parameter], step: int) -> None:
    """The same ones for the same elements, however they are cut."""
    generator = torch.Generator().manual_seed(step)
    numel = sum(parameter.numel() for parameter in params)
    drawn = torch.randn(numel, generator=generator, dtype=torch.float64)
    at = 0
    for parameter in params:
        piece = drawn.narrow(0, at, parameter.numel())
        parameter.grad = piece.reshape(parameter.shape).to(parameter)
        at += parameter.numel()


class _Twin:
    """A copy of an optimizer that shares no parameter, state or option with it.

    `torch.optim.Optimizer` says what of itself is copied and leaves out the attributes of
    subclasses, so its dictionary is copied here; what refuses to be copied is shared.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._memo: dict[int, Any] = {}
        self._others: list[nn.Parameter] = []
        self._memo[id(optimizer.state)] = defaultdict(dict)
        self._stand_in(p for group in optimizer.param_groups for p in group["params"])
        self.optimizer = self._copied(optimizer)
        for index, group in enumerate(self.optimizer.param_groups):
            self.give(index, [])
            _start_moving(group)

    def give(self, index: int, params: list[nn.Parameter]) -> None:
        """Puts `params` into a group, in place: the optimizer may hold the very list."""
        self.optimizer.param_groups[index]["params"][:] = params

    def step(self) -> None:
        """What the class does, without what schedulers have put before it on the instance."""
        type(self.optimizer).step(self.optimizer)

    def has_moved_others(self) -> bool:
        """Whether what stands for the module's parameters, in copies of the optimizer's own
        attributes, has changed.
        """
        return any(bool((parameter != 1).any()) for parameter in self._others)

    def _stand_in(self, params: Iterator[nn.Parameter]) -> None:
        for parameter in params:
            if id(parameter) not in self._memo:
                other = nn.Parameter(torch.ones(1, device=parameter.device))
                other.grad = torch.ones_like(other)
                self._memo[id(parameter)] = other
                self._others.append(other)

    def _copied(self, optimizer: Optimizer) -> Optimizer:
        twin: Optimizer = object.__new__(type(optimizer))
        self._memo[id(optimizer)] = twin
        for value in vars(optimizer).values():
            if isinstance(value, nn.Module):
                self._stand_in(value.parameters())
            elif isinstance(value, Optimizer) and id(value) not in self._memo:
                self._copied(value)
        twin.__dict__.update({key: self._copy(value) for key, value in vars(optimizer).items()})
        twin.__dict__.pop("step", None)
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            if hooks in twin.__dict__:
                twin.__dict__[hooks] = OrderedDict()
        return twin

    def _copy(self, value: Any) -> Any:
        try:
            return copy.deepcopy(value, self._memo)
        except Exception:
            return value


def _start_moving(group: dict[str, Any]) -> None:
    """A rate of zero, before a warm-up, would show nothing."""
    rate = group.get("lr")
    if isinstance(rate, Tensor) and not rate.any():
        group["lr"] = torch.full_like(rate, 0.01)
    elif not isinstance(rate, Tensor) and rate == 0:
        group["lr"] = 0.01
