"""A start that fails on one rank fails on all: at once, with that rank's number and reason,
whatever was raised and wherever. The rank at fault stays alive, as it does where the user catches
the error.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ranks
import zerort
from catching import assert_told, caught
from zerort.errors import CommError, ConfigError, PlanError
from zerort.start import connect

SOON = 15.0  # seconds for one start that fails; the time-out is four times as long


class Unprintable(Exception):
    """Cannot even say what is wrong."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Aborted(BaseException):
    """Neither an `Exception` nor one of Python's own."""


@dataclass
class Trap:
    """Raises at one place of the start, on rank 1 only."""

    place: str
    error: BaseException
    rank: int

    def spring(self, place: str) -> None:
        if self.place == place and self.rank == 1:
            raise self.error


class Model(nn.Linear):
    def __init__(self, trap: Trap) -> None:
        super().__init__(4, 4)
        self.trap = trap

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        self.trap.spring("model's parameters")
        return super().named_parameters(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.trap.spring("model's move")
        return super()._apply(fn, recurse)


class Data(torch.utils.data.Dataset[Any]):
    def __init__(self, trap: Trap) -> None:
        self.trap = trap

    def __len__(self) -> int:
        self.trap.spring("dataset")
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(4)


class Arguments:
    """The command line's."""

    def __init__(self, trap: Trap) -> None:
        self.trap = trap

    @property
    def deepspeed_config(self) -> None:
        self.trap.spring("arguments")


def start(trap: Trap) -> None:
    """One `initialize` that springs `trap`, and one step if it does not."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        trap.spring("optimizer")
        return torch.optim.SGD(parameters, lr=0.1)

    def scheduler(chosen: torch.optim.Optimizer) -> Any:
        trap.spring("scheduler")
        return torch.optim.lr_scheduler.ConstantLR(chosen)

    def groups(model: nn.Module) -> Any:
        trap.spring("generator of parameters")
        yield from model.parameters()

    model = Model(trap)
    engine, *_ = zerort.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=groups(model),
        lr_scheduler=scheduler,
        training_data=Data(trap),
        args=Arguments(trap),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zerort": {"timeout": 60.0},
        },
    )
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    engine.destroy()


PLACES = [
    "arguments",
    "model's parameters",
    "model's move",
    "generator of parameters",
    "optimizer",
    "scheduler",
    "dataset",
]
KINDS: dict[str, BaseException] = {
    "KeyError": KeyError("boom"),
    "AttributeError": AttributeError("boom"),
    "AssertionError": AssertionError("boom"),
    "FileNotFoundError": FileNotFoundError(2, "boom", "recipe.txt"),
    "StopIteration": StopIteration("boom"),
    "MemoryError": MemoryError("boom"),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "SystemExit": SystemExit(3),
    "Aborted": Aborted("boom"),
    "Unprintable": Unprintable(),
}
TRAPS = [(place, "KeyError") for place in PLACES] + [
    ("scheduler", kind) for kind in KINDS if kind != "KeyError"
]


@dataclass(frozen=True)
class Seen:
    """What became of a start on one rank."""

    kind: type[BaseException]
    message: str
    seconds: float
    groups: int
    files: int


def outcome(trap: Trap) -> Seen:
    started = time.monotonic()
    try:
        start(trap)
        error: BaseException = AssertionError("nothing was raised")
    except BaseException as raised:
        error = raised
    try:
        message = str(error)
    except RuntimeError:
        message = ""
    seconds = time.monotonic() - started
    files = len(os.listdir("/proc/self/fd"))
    return Seen(type(error), message, seconds, len(dist.distributed_c10d._world.pg_map), files)


def in_turn(rank: int, world: int) -> dict[tuple[str, str], Seen]:
    start(Trap("nowhere", KeyError(), rank))
    return {(place, kind): outcome(Trap(place, KINDS[kind], rank)) for place, kind in TRAPS}


@ranks.once(None)
def seen() -> list[dict[tuple[str, str], Seen]]:
    return ranks.run(2, in_turn, timeout=120)


@pytest.mark.parametrize(("place", "kind"), TRAPS)
def test_the_rank_at_fault_raises_its_own_error_and_the_others_its_reason(
    place: str, kind: str
) -> None:
    innocent, culprit = (outcomes[place, kind] for outcomes in seen())
    assert culprit.kind is type(KINDS[kind])
    assert innocent.kind is PlanError, innocent.message
    assert "rank 1" in innocent.message
    expected = "boom" if "boom" in KINDS[kind].args else ""
    assert expected in innocent.message
    assert kind in innocent.message or isinstance(KINDS[kind], OSError), innocent.message


def test_nobody_waits_for_a_rank_that_has_failed() -> None:
    late = [(*what, one.seconds) for part in seen() for what, one in part.items()]
    assert [what for what in late if what[-1] > SOON] == []


def test_a_start_that_failed_gives_groups_and_files_back() -> None:
    for part in seen():
        assert {one.groups for one in part.values()} == {1}  # the job's own
        counts = [one.files for one in part.values()]
        assert max(counts[1:]) <= counts[0]


# ---- while ranks make memory for what they send


def unlucky(*_: Any, **__: Any) -> None:
    raise ValueError("no luck")


def while_memory_is_made(rank: int, world: int, runtime: dict[str, Any]) -> list[str]:
    def start() -> Any:
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 2},
            "zerort": {"timeout": 60.0, **runtime},
        }
        optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
        # long enough for gloo's second groups, which all ranks make
        return zerort.initialize(model=nn.Linear(512, 512), optimizer=optimizer, config=config)[0]

    told = []
    for where in ("Reduction", "Boundary"):  # before there is memory, and behind it
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(sys.modules["zerort.initialize"], where, unlucky)
            begun, error = time.monotonic(), caught(start)
        assert time.monotonic() - begun < SOON
        told.append(f"{type(error).__name__}: {error}")
    engine = start()
    engine.backward(engine(torch.ones(1, 512)).sum())
    engine.step()
    assert engine.was_step_applied()
    return told


@pytest.mark.parametrize("transport", ["shared", "gloo"])
@pytest.mark.parametrize(
    "runtime", [{}, {"hierarchy": {"inner": 2}}], ids=["one group", "a group a host"]
)
def test_a_rank_that_fails_while_others_make_memory_is_heard_by_all(
    runtime: dict[str, Any], transport: str
) -> None:
    given = {**runtime, "transport": transport}
    told = ranks.run(4 if runtime else 2, while_memory_is_made, given, timeout=90)
    assert told.pop(1) == ["ValueError: no luck"] * 2
    why = "no rank starts, because one cannot: rank 1: ValueError: no luck"
    assert told == [[f"PlanError: {why}"] * 2] * len(told)


# ---- a rank that takes its time


def slow_on_rank_1(rank: int, world: int) -> tuple[bool, Exception | None]:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        time.sleep(2.0 * rank)
        return torch.optim.SGD(parameters, lr=0.1)

    engine, *_ = zerort.initialize(
        model=nn.Linear(4, 4),
        optimizer=optimizer,
        config={"train_micro_batch_size_per_gpu": 1, "zerort": {"timeout": 1.0}},
    )
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    applied = engine.was_step_applied()
    engine.backward(engine(torch.ones(1, 4)).sum())
    return applied, caught(engine.step) if rank == 0 else None  # rank 1 does not come to the vote


def test_the_time_out_of_steps_is_not_that_of_the_start() -> None:
    (waiting, error), (slow, _) = ranks.run(2, slow_on_rank_1, timeout=60)
    assert waiting
    assert slow
    assert isinstance(error, CommError)


def absent_on_rank_1(rank: int, world: int, how: str) -> Exception | None:
    def start() -> None:
        zerort.initialize(
            model=nn.Linear(4, 4),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            config={"train_micro_batch_size_per_gpu": 1},
        )

    connect._STARTING = timedelta(seconds=3)
    if how == "the second time":
        start()
    if rank == 1:
        time.sleep(6)
        return None
    return caught(start)


@pytest.mark.parametrize("how", ["the first time", "the second time"])
def test_a_rank_that_does_not_come_to_a_start_is_named(how: str) -> None:
    first, _, third = ranks.run(3, absent_on_rank_1, how, timeout=60)
    for error in (first, third):
        assert_told(error, CommError, "did not come to the start within 3 s: 1.", "initialize")


# ---- what one rank is given and its peers are not

GIVEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no_module": ({"model": "gpt2"}, ConfigError, "torch.nn.Module"),
    "an_argument_that_is_refused": ({"mpu": object()}, ConfigError, "mpu"),
    "unknown_key": ({"config": {"gradient_cliping": 1.0}}, ConfigError, "gradient_cliping"),
    "a_missing_file": ({"config": "/nowhere/config.json"}, ConfigError, "/nowhere/config.json"),
    "a_lazy_model": ({"model": nn.LazyLinear(4)}, PlanError, "no shape yet"),
}


def given_to_rank_1(rank: int, world: int) -> dict[str, tuple[str, str]]:
    found = {}
    for name, (arguments, _, _) in GIVEN.items():
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}
        usual = {
            "model": nn.Linear(4, 4),
            "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
            "config": config,
        }
        try:
            zerort.initialize(**{**usual, **(arguments if rank == 1 else {})})
            found[name] = ("nothing", "")
        except zerort.ZerortError as error:
            found[name] = (type(error).__name__, str(error))
    os.environ |= {"ZERORT_TRACE": "/proc/nowhere/trace.json"} if rank == 1 else {}
    try:
        zerort.initialize(**usual)
    except zerort.ZerortError as error:
        found["trace"] = (type(error).__name__, str(error))
    return found


def test_a_mistake_in_what_one_rank_is_given_stops_all() -> None:
    innocent, culprit = ranks.run(2, given_to_rank_1, timeout=60)
    for name, (_, kind, words) in (
        *GIVEN.items(),
        ("trace", ({}, ConfigError, "/proc/nowhere")),
    ):
        assert culprit[name][0] == kind.__name__
        assert words in culprit[name][1]
        assert innocent[name][0] == "PlanError", innocent[name]
        assert "rank 1: " in innocent[name][1]
        assert words in innocent[name][1]
