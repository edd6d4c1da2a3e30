"""A load that fails, wherever and in whosever object, leaves the engine as it was, on all ranks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import ranks
import zerort
from catching import caught
from saved import config_of
from zerort.checkpoint.state import scheduler_name
from zerort.errors import CheckpointError, StepError


class Own:
    """A scheduler of the user's own."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.count = optimizer, 0

    def step(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def sequence(*kinds: Any) -> Callable[[Any], Any]:
    return lambda o: lr_scheduler.SequentialLR(o, [kind(o) for kind in kinds], [3])


NAMED = {
    "WarmupLR": {"warmup_num_steps": 5},
    "WarmupCosineLR": {"total_num_steps": 20, "warmup_num_steps": 5},
    "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 5},
}
SCHEDULERS: dict[str, Any] = {
    "none": None,
    **{name: {"type": name, "params": params} for name, params in NAMED.items()},
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 50),
    "a sequence": sequence(lr_scheduler.ConstantLR, lr_scheduler.ConstantLR),
    "another": sequence(lr_scheduler.ConstantLR, lr_scheduler.LinearLR),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda _: 1.0),
    "own": Own,
}


class Net(nn.Module):
    """(batch, 4) -> (batch, 4), with a buffer, and a state that may be refused."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(3))
        self.extra: dict[str, Any] = {"n": [0]}
        self.refuses = False

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.extra["n"][0] += 1
        return self.inner(x)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        refuses, self.refuses = self.refuses, False
        self.extra = {"n": [-1]} if refuses else state
        if refuses:
            random.random()
            raise KeyError("no such state")


def engine_of(seed: int, scheduler: Any = None, *, data: int = 0, steps: int = 3) -> Any:
    torch.manual_seed(seed)
    config = config_of(1, optimizer={"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}})
    by_name = isinstance(scheduler, dict)
    engine, *_ = zerort.initialize(
        model=Net(),
        lr_scheduler=None if by_name else scheduler,
        config=config | ({"scheduler": scheduler} if by_name else {}),
        training_data=[torch.ones(4) * i for i in range(data)] or None,
    )
    train(engine, steps)
    return engine


def train(engine: Any, steps: int) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(2, 4)).square().mean())
        engine.step()


def everything(engine: Any) -> dict[str, Any]:
    """All that a load could change, by value."""
    optimizer = engine.optimizer
    loader = engine._parts.loader
    return copy.deepcopy(
        {
            "weights": dict(engine.module.state_dict()),
            "masters": [bucket.master for bucket in engine._checkpoints.state.flat.buckets],
            "state": [dict(held) for held in optimizer.state.values()],
            "options": [
                {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
            ],
            "scheduler": engine.lr_scheduler and engine.lr_scheduler.state_dict(),
            "counts": vars(engine.counters),
            "scale": engine.loss_scale,
            "loader": loader and loader.state_dict(),
            "random": (random.getstate(), torch.get_rng_state()),
        }
    )


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def refuses(engine: Any, folder: Path, *words: str, **options: Any) -> str:
    """Asserts that a load raises `CheckpointError` with all words and has changed nothing."""
    before = everything(engine)
    with pytest.raises(CheckpointError) as raised:
        engine.load_checkpoint(folder, **options)
    after = everything(engine)
    assert [key for key in before if not same(before[key], after[key])] == []
    for word in words:
        assert word in str(raised.value)
    return str(raised.value)


@pytest.fixture(scope="module")
def schedules(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("schedules")
    for number, scheduler in enumerate(SCHEDULERS.values()):
        engine = engine_of(0, scheduler)
        engine.save_checkpoint(folder, f"s{number}", save_latest=False)
        engine.destroy()
    return folder


@pytest.mark.parametrize("have", SCHEDULERS)
def test_another_scheduler_is_refused_before_anything_changes_or_training_goes_on(
    have: str, schedules: Path, caplog: Any
) -> None:
    for number, saved in enumerate(SCHEDULERS):
        engine = engine_of(1, SCHEDULERS[have])
        if have == saved or "none" in (have, saved):
            caplog.clear()
            engine.load_checkpoint(schedules, f"s{number}")
            reasons = engine.last_load.not_restored
            assert len(reasons) == (have != saved) and all("schedule" in text for text in reasons)
            assert all(text in caplog.text for text in reasons)
        else:
            refuses(engine, schedules, "load_lr_scheduler_states=False", tag=f"s{number}")
            engine.load_checkpoint(schedules, f"s{number}", load_lr_scheduler_states=False)
        train(engine, 2)
        engine.destroy()


# Objects that raise.


class Halfway(Own):
    """Raises when it has changed itself and the optimizer."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["count"] == 3 and self.count == 4:
            self.count, self.surprise = -1, 1
            self.optimizer.param_groups[0]["lr"] = 77.0
            raise AttributeError("halfway")
        super().load_state_dict(state)


def half_loaded(src: dict[str, Tensor], dst: nn.Module) -> None:
    with torch.no_grad():
        for value in (dst.inner.weight, dst.seen):
            value.fill_(9.0)
    raise RuntimeError("midway")


def by_state_dict(src: dict[str, Tensor], dst: nn.Module) -> None:
    dst.load_state_dict({**src, "_extra_state": {"n": [7]}})


def raising(*args: Any) -> None:
    raise LookupError("a hook of the user's")


def with_hook(engine: Any) -> None:
    engine.module.inner.register_load_state_dict_pre_hook(raising)


def refuse_extra(engine: Any) -> None:
    engine.module.refuses = True


def no_extra(engine: Any) -> None:
    engine.module.get_extra_state = raising


def break_loader(engine: Any) -> None:
    loader, calls = engine._parts.loader, []
    right = loader.load_state_dict

    def load(state: dict[str, Any]) -> None:
        calls.append(state)
        if len(calls) == 1:
            loader.epoch = 5
            raise ValueError("another dataset")
        right(state)

    loader.load_state_dict = load


FAULTS: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "a scheduler, halfway": (lambda engine: None, {}, "scheduler Halfway raised AttributeError"),
    "set_extra_state": (refuse_extra, {}, "extra state of the module raised KeyError"),
    "get_extra_state": (no_extra, {}, "extra state of the module raised LookupError"),
    "custom_load_fn": (
        lambda engine: None,
        {"custom_load_fn": half_loaded},
        "RuntimeError: midway",
    ),
    "a pre-hook": (with_hook, {"custom_load_fn": by_state_dict}, "a hook of the user's"),
    "the loader": (break_loader, {}, "the training loader raised ValueError: another dataset"),
}


def load_with_faults(rank: int, world: int, folder: str) -> dict[str, tuple[str, list[str]]]:
    """For each fault, on rank 0 alone: the error, and what has changed."""
    engine_of(0, Halfway, data=8).save_checkpoint(folder)
    found = {}
    for name, (prepare, options, _) in FAULTS.items():
        engine = engine_of(1, Halfway, data=8, steps=4 if "halfway" in name else 2)
        if rank == 0:
            prepare(engine)
        else:
            engine.lr_scheduler.count = 2  # so that it does not raise here
            options = dict.fromkeys(options, by_state_dict)  # noqa: PLW2901
        readable = name != "get_extra_state"
        before = everything(engine) if readable else {}
        error = caught(lambda e=engine, o=options: e.load_checkpoint(folder, **o))
        after = everything(engine) if readable else {}
        found[name] = repr(error), [k for k in before if not same(before[k], after[k])]
        if readable:
            engine.load_checkpoint(folder, load_lr_scheduler_states=False)
            train(engine, 1)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_an_object_that_raises_on_one_rank_leaves_the_engine_as_it_was_on_all(
    world: int, tmp_path: Path
) -> None:
    found = ranks.run(world, load_with_faults, str(tmp_path))
    assert all(one == found[0] for one in found)
    for name, (error, changed) in found[0].items():
        assert "CheckpointError" in error and FAULTS[name][2] in error, name
        assert changed == [], name


class Stubborn(Own):
    """Cannot be put back."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise RuntimeError(f"not {state['count']}")


def test_what_cannot_be_put_back_is_said_and_no_step_is_applied_before_another_load(
    tmp_path: Path,
) -> None:
    engine = engine_of(0, Stubborn)
    engine.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"not 3.*could not be put back.*load a checkpoint"):
        engine.load_checkpoint(tmp_path)
    with pytest.raises(StepError, match="load a checkpoint before going on"):
        train(engine, 1)
    engine.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    train(engine, 1)


def test_a_load_that_breaks_off_in_the_engines_memory_says_so_and_poisons_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(0)
    engine.save_checkpoint(tmp_path)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._parts.reduction, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.load_checkpoint(tmp_path)
    with pytest.raises(StepError, match=r"broke off halfway \(KeyboardInterrupt"):
        train(engine, 1)
    engine.load_checkpoint(tmp_path)
    train(engine, 1)


def test_a_scheduler_for_other_groups_is_refused(tmp_path: Path) -> None:
    def made(count: int) -> Any:
        model = nn.Linear(4, 4)
        params = list(model.parameters())
        groups = [{"params": params}] if count == 1 else [{"params": [p]} for p in params]
        engine, *_ = zerort.initialize(
            model=model,
            model_parameters=groups,
            lr_scheduler=lambda o: lr_scheduler.StepLR(o, 2),
            config=config_of(1, optimizer={"type": "SGD", "params": {"lr": 0.1}}),
        )
        return engine

    made(2).save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="for 2 parameter groups, and the optimizer has 1"):
        made(1).load_checkpoint(tmp_path)


def test_all_classes_of_schedulers_differ() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
    built = [make(optimizer) for make in SCHEDULERS.values() if callable(make)]
    names = [scheduler_name(one) for one in built]
    assert len(set(names)) == len(names) and "SequentialLR(ConstantLR, LinearLR)" in names
