"""Writes that no version tells of, through `.data` or numpy, into parameters that are whole for a
call: each is found before the memory is freed, in the first pass and in those along a list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from catching import caught
from training import at_stage, keep, weights
from zerort.device.accelerator import Accelerator
from zerort.device.cpu import Cpu
from zerort.zero import GatheredParameters

LOWER = slice(31, 32)
"""Rows of which the last rank of two has the values."""


class Written(nn.Module):
    """A model in which something writes a parameter where it is used: as a constraint on weights, a
    table of moving averages or a quantiser is often written.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.second = nn.Linear(32, 32)
        self.before: Callable[[], Any] = _nothing
        self.behind: Callable[[], Any] = _nothing
        for part in (self.frozen, self.second):
            part.register_forward_pre_hook(self._write)

    def _write(self, module: nn.Module, args: Any) -> None:
        if getattr(self.before, "of", module) is module:
            self.before()

    def _in_backward(self, gradient: Tensor) -> None:
        self.behind()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.frozen(torch.tanh(self.first(x)))
        if hidden.requires_grad:
            hidden.register_hook(self._in_backward)
        return self.second(hidden).square().mean()


def _nothing() -> None:
    """Nothing is written."""


def _when(module: nn.Module, write: Callable[[Tensor], Any]) -> Callable[[], Any]:
    """Writes the module's weight, within its call."""

    def call() -> Any:
        return write(module.weight)

    call.of = module  # type: ignore[attr-defined]
    return call


def _by_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[:] = 0.5


WAYS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "everywhere": ("second", lambda weight: weight.data.clamp_(-0.01, 0.01)),
    "on one rank": ("second", lambda weight: weight.data[LOWER].clamp_(-0.01, 0.01)),
    "by numpy": ("second", _by_numpy),
    "frozen": ("frozen", lambda weight: weight.data.mul_(2)),
    "by exchange of bits": ("second", lambda weight: weight.data.view(torch.int32).bitwise_xor_(1)),
}
"""Which module's weight is written, and how."""


def _engine(model: nn.Module, room: int, **more: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        **at_stage(3, stage3_max_live_parameters=room, **more),
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    engine = zerort.initialize(model=model, optimizer=optimizer, config=config)[0]
    keep(engine)
    return engine


X = torch.ones(2, 32)


def _step(engine: Any) -> str:
    """The error of its backward, or of its step, which is void behind one that has failed."""
    error = caught(lambda: engine.backward(engine(X)))
    error = caught(engine.step) or error
    return str(error) if error else ""


def _alike(engine: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in weights(engine).items())


def writes(rank: int, world: int, room: int, waits: bool) -> dict[str, Any]:
    """What each way of writing leads to, in the first step and behind three; with `waits` as on an
    accelerator, which answers at the vote.
    """
    if waits:
        Cpu.first_difference = Accelerator(torch.device("cpu", 0)).first_difference
    found: dict[str, Any] = {}
    for name, (where, write) in WAYS.items():
        if name != "everywhere" and waits:
            continue
        model = Written()
        engine = _engine(model, room)
        for moment in ("first", "later"):
            before = weights(engine)
            model.before = _when(getattr(model, where), write)
            error = _step(engine)
            model.before = _nothing
            unmoved = _alike(engine, before)
            found[f"{name}, {moment}"] = error, unmoved, [_step(engine) for _ in range(3)]
        found["moves"] = not _alike(engine, before)
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("room", [1, 10**6], ids=["a_unit", "all"])
@pytest.mark.parametrize("waits", [False, True], ids=["at_once", "at_the_vote"])
def test_it_is_named_on_all_ranks_in_any_step_and_training_goes_on(room: int, waits: bool) -> None:
    for found in ranks.run(2, writes, room, waits):
        assert found.pop("moves")
        for case, (error, unmoved, after) in found.items():
            written = "frozen.weight" if "frozen" in case else "second.weight"
            assert f"{written} was written" in error and "GatheredParameters" in error, case
            assert unmoved and after == [""] * 3, case


def elsewhere(rank: int, world: int, waits: bool) -> list[str]:
    """Errors of a backward in which it happens, of an evaluation, of a look at values, each behind
    steps; and of the steps behind each.
    """
    if waits:
        Cpu.first_difference = Accelerator(torch.device("cpu", 0)).first_difference
    model = Written()
    engine = _engine(model, 1)
    said = [_step(engine) for _ in range(3)]
    model.behind = lambda: model.second.weight.data.mul_(2)
    said.append(_step(engine))
    model.behind = _nothing
    said.append(_step(engine))
    model.before = _when(model.second, lambda weight: weight.data.mul_(2))
    with torch.no_grad():
        said.append(str(caught(lambda: engine(X)) or ""))
    model.before = _nothing
    said.append(_step(engine))

    def look() -> None:
        with GatheredParameters([model.second.weight]):
            model.second.weight.data.mul_(2)

    said.append(str(caught(look) or ""))
    said.append(_step(engine))
    said.append(_step(engine))

    def write() -> None:
        with GatheredParameters([model.second.weight]), torch.no_grad():
            model.second.weight.mul_(2)

    said.append(str(caught(write) or ""))
    said.append(_step(engine))
    kept = []

    def write_what_is_kept() -> None:
        with GatheredParameters([model.second.weight]):
            kept.append(model.second.weight.data)
            kept[-1].mul_(2)

    said.append(str(caught(write_what_is_kept) or ""))
    said.append(_step(engine))
    said.append(_step(engine))
    return said


@pytest.mark.timeout(120)
@pytest.mark.parametrize("waits", [False, True], ids=["at_once", "at_the_vote"])
def test_so_it_is_in_a_backward_in_an_evaluation_and_where_values_are_looked_at(
    waits: bool,
) -> None:
    named, looked = "second.weight was written in a forward", "without a modifier_rank"
    for said in ranks.run(2, elsewhere, waits):
        assert said[:3] == [""] * 3
        assert named in said[3] and said[4] == ""
        evaluation, following = (said[6], said[5]) if waits else (said[5], said[6])
        assert named in evaluation and following == ""
        leaving, following = (said[8], said[7]) if waits else (said[7], said[8])
        assert (named if waits else "second.weight was written inside Gathered") in leaving
        assert waits or looked in leaving
        assert following == "" and said[9] == ""
        assert looked in said[10] and said[11] == ""  # what a version has told of is told once
        leaving, following = (said[13], said[12]) if waits else (said[12], said[13])
        assert (named if waits else "second.weight was written inside Gathered") in leaving
        assert following == said[14] == ""


def kept(rank: int, world: int, stage: int) -> Any:
    """Weights behind steps in which ones that are whole on every rank are clamped; one of them is
    in no group of the optimizer.
    """
    model = Written()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    trained = [*model.first.parameters(), model.second.weight]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    engine = zerort.initialize(model=model, optimizer=optimizer, config=config)[0]
    keep(engine)

    def clamp() -> None:
        model.second.weight.data.clamp_(-0.01, 0.01)
        model.second.bias.data.fill_(3.0)

    model.before = clamp
    said = [_step(engine) for _ in range(4)]
    return said, {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.timeout(120)
def test_what_is_whole_for_good_keeps_what_is_written_as_at_stage_2() -> None:
    threes, twos = (ranks.run(2, kept, stage) for stage in (3, 2))
    for (said, three), (_, two) in zip(threes, twos, strict=True):
        assert said == [""] * 4
        assert all(torch.equal(value, two[name]) for name, value in three.items())
        assert three["second.bias"].eq(3).all() and three["second.weight"].abs().max() < 0.2
