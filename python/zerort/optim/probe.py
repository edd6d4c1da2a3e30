"""What an optimizer can do, found out by letting a twin of it step.

The engine gives an optimizer other tensors than it was made with: flat pieces of fp32, or whole
parameters, and on each rank its part of them. Whether that is right depends on what its step does,
and neither its class nor its signature tells. So a twin steps over small tensors. It has copies of
all the optimizer's own attributes; the optimizer itself, its parameters and the random numbers of
the process stay as they were.

What this does not see: anything that shows only with the values of a real training, and what a step
does to the world outside, which the twin's step does too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerort.memory import DTYPES
from zerort.optim.chain import members_of
from zerort.optim.initial import InitialState
from zerort.optim.lion import Lion
from zerort.optim.twin import Twin

__all__ = ["Abilities", "examine", "is_known"]

_ELEMENTWISE = (
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
_OF_WHOLE = tuple(
    getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name)
)

STEPS = 3
NUMEL = 16384
"""Elements of a flat tensor of the probe: those who keep state in blocks of 8 bits leave tensors of
less than 4096 as they are.
"""
CUT = 5211
"""Where it is cut in two: no multiple of a block, for a border may lie anywhere."""
SCALES = (1e-10, 1e6)
"""Of gradients, when it is looked for what parameters have to do with each other: a limit on a norm
shows only above it, a floor only below.
"""
TOGETHER = 3
"""Tensors that step together and alone."""


@dataclass(frozen=True)
class Abilities:
    """What an optimizer can be given. A reason says why it cannot, None that it can."""

    never: str | None = None
    """Why it may run at no stage."""
    across: str | None = None
    """Why it must have all parameters on every rank."""
    whole: Mapping[int, str] = field(default_factory=dict)
    """Groups of which it must have whole parameters, and why."""
    gaps: bool = True
    """It steps where groups are empty or tensors have no gradient."""


def is_known(optimizer: Optimizer) -> bool:
    """Whether nothing has to be tried. A subclass may have changed `step`."""
    known = _ELEMENTWISE + _OF_WHOLE
    return all(type(member) in known for member in members_of(optimizer))


def examine(optimizer: Optimizer) -> Abilities:
    """Lets twins of `optimizer`, which holds the module's parameters still, step."""
    if type(optimizer) in _ELEMENTWISE:
        return Abilities()
    if type(optimizer) in _OF_WHOLE:
        return Abilities(whole=dict.fromkeys(range(len(optimizer.param_groups)), _LOOKS_AT_WHOLE))
    with _undisturbed(optimizer):
        return _Probe(optimizer).found()


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


_LOOKS_AT_WHOLE = "it looks at whole tensors"
_IDLE = f"{STEPS} steps of it move nothing, so nothing shows what it looks at"


def _failure(attempt: Callable[[], object]) -> str | None:
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


@dataclass(frozen=True)
class _Start:
    """A tensor that the twin steps over."""

    model: nn.Parameter
    """The parameter that it stands for."""
    value: Tensor
    gradients: Sequence[Tensor]
    """Of each step."""

    @classmethod
    def drawn(cls, model: nn.Parameter, shape: tuple[int, ...]) -> _Start:
        """Random numbers, wide enough for the parameter's."""
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        value, *gradients = (
            torch.randn(shape, dtype=dtype).to(model.device) for _ in range(1 + STEPS)
        )
        return cls(model, value, gradients)

    def cut(self) -> list[_Start]:
        """A flat one's, as two."""
        parts = slice(0, CUT), slice(CUT, None)
        return [
            _Start(self.model, self.value[part], [gradient[part] for gradient in self.gradients])
            for part in parts
        ]


Starts = Sequence[Sequence[_Start]]
"""For each group."""


class _Probe:
    """Tensors for each group, like what the engine would give."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: list[list[nn.Parameter]] = [
            [p for p in group["params"] if p.dtype in DTYPES and p.numel()]
            for group in optimizer.param_groups
        ]
        self._params = [parameter for group in self._groups for parameter in group]
        self._position = {id(parameter): at for at, parameter in enumerate(self._params)}
        self._initial = InitialState(optimizer, self._params)
        self._shaped = [
            [
                _Start.drawn(p, _small(p))
                for p in list({p.dim(): p for p in group}.values())[:TOGETHER]
            ]
            for group in self._groups
        ]

    def found(self) -> Abilities:
        """What the optimizer can be given."""
        whole = self._whole()
        never = _failure(self._steps_over_shapes) if whole else None
        if never is not None:
            return Abilities(_advised(never), whole=whole)
        gaps = _failure(self._nothing) is None
        across = _failure(lambda: self._apart(whole, gaps=gaps))
        return Abilities(across=across, whole=whole, gaps=gaps)

    def _whole(self) -> dict[int, str]:
        """Groups in which tensors may not be cut, and why."""
        groups = [index for index, group in enumerate(self._groups) if group]
        try:
            return self._cut(groups)
        except Exception:  # which of them it was shows one by one
            found: dict[int, str] = {}
            for index in groups:
                reason = _failure(partial(self._cut_into, found, index))
                if reason is not None:
                    found[index] = reason
            return found

    def _cut_into(self, found: dict[int, str], index: int) -> None:
        found.update(self._cut([index]))

    def _cut(self, groups: Sequence[int]) -> dict[int, str]:
        """Which of `groups` step otherwise over flat tensors cut in two than over the tensors. The
        other groups have parameters of their own shapes.
        """
        once: list[Sequence[_Start]] = list(self._shaped)
        twice: list[Sequence[_Start]] = list(self._shaped)
        for index in groups:
            model = self._groups[index][0]
            flat = _Start.drawn(model, (NUMEL,))
            once[index], twice[index] = [flat], flat.cut()
        one, two = self._run(once), self._run(twice)
        if not any(_moved(ends, starts) for ends, starts in zip(one, once, strict=True)):
            return {}
        found = {}
        for index in groups:
            left, right = torch.cat(one[index]), torch.cat(two[index])
            if not torch.allclose(left, right, rtol=1e-5, atol=1e-7, equal_nan=True):
                found[index] = (
                    f"{STEPS} steps over {NUMEL} elements differ from the same steps over the "
                    f"first {CUT} and the others apart: {_LOOKS_AT_WHOLE}"
                )
        return found

    def _steps_over_shapes(self) -> None:
        """Steps over tensors with as many dimensions as the parameters."""
        self._run(self._shaped)

    def _nothing(self) -> None:
        """Steps where a group is empty, and where no tensor has a gradient."""
        Twin(self._optimizer).step()
        twin = Twin(self._optimizer)
        for index, group in enumerate(self._groups):
            drawn = [_Start.drawn(p, (NUMEL,)) for p in group[:1]]
            twin.give(index, [nn.Parameter(start.value) for start in drawn])
        twin.step()

    def _apart(self, whole: Mapping[int, str], *, gaps: bool) -> None:
        """A few tensors must step together as each does alone, with tiny and with huge
        gradients.
        """
        starts = self._few(whole)
        pairs = zip(self._run(starts), starts, strict=True)
        if not any(_moved(ends, group) for ends, group in pairs):
            raise _Unfit(_IDLE)
        for scale in SCALES:
            together = self._run(starts, scale)
            for index, group in enumerate(starts):
                for at, start in enumerate(group):
                    alone: list[Sequence[_Start]] = [[] for _ in starts]
                    alone[index] = [start]
                    end = self._run(alone, scale, gaps=gaps)[index][0]
                    if not _alike(start.value, together[index][at], end):
                        raise _Unfit(
                            f"{STEPS} steps over several tensors together, with gradients of about "
                            f"{scale:g}, differ from the same steps over each alone: it looks "
                            "across parameters, of which a rank would have its own alone"
                        )

    def _few(self, whole: Mapping[int, str]) -> Starts:
        """A tensor of each of the first groups, and a second of the first."""
        found: list[list[_Start]] = [[] for _ in self._groups]
        occupied = [index for index, group in enumerate(self._groups) if group]
        for index in (occupied[:1] + occupied)[:TOGETHER]:
            model = self._groups[index][0]
            shape = _small(model) if index in whole else (NUMEL // 2,)
            found[index].append(_Start.drawn(model, shape))
        return found

    def _run(self, starts: Starts, scale: float = 1.0, *, gaps: bool = True) -> list[list[Tensor]]:
        """The tensors of each group after the steps, flat; each begins with the initial state of
        its model. Without `gaps` there are no groups that are empty.
        """
        twin = Twin(self._optimizer)
        self._initial.begin(twin.optimizer)
        params = [[nn.Parameter(start.value.clone()) for start in group] for group in starts]
        for index, (group, alike) in enumerate(zip(params, starts, strict=True)):
            twin.give(index, group)
            for parameter, start in zip(group, alike, strict=True):
                state = self._initial.of(self._position[id(start.model)], parameter)
                if state:
                    twin.optimizer.state[parameter] = state
        if not gaps:
            twin.drop_empty()
        torch.default_generator.manual_seed(0)
        for step in range(STEPS):
            for group, alike in zip(params, starts, strict=True):
                for parameter, start in zip(group, alike, strict=True):
                    parameter.grad = start.gradients[step] * scale
            twin.step()
        if twin.has_moved_others():
            raise _Unfit("its step() changes parameters that are not in its param_groups")
        return [[p.detach().reshape(-1) for p in group] for group in params]


def _moved(ends: Sequence[Tensor], starts: Sequence[_Start]) -> bool:
    return any(
        not torch.equal(end, start.value.reshape(-1))
        for end, start in zip(ends, starts, strict=True)
    )


def _alike(start: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether two ends are the same but for roundings: of the way gone, and of the values."""
    way = (one - start.reshape(-1)).abs().max()
    tolerance = 1e-4 * way + 4 * torch.finfo(start.dtype).eps * start.abs().max()
    same = ((one - other).abs() <= tolerance) | (one.isnan() & other.isnan()) | (one == other)
    return bool(same.all())


def _small(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(min(size, 8) for size in parameter.shape)
