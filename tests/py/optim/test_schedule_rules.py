"""Schedules against their published rules: written once more here, without torch, in fractions
where the rule has no logarithm or cosine; and against values worked out by hand.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zerort.errors import ConfigError
from zerort.optim.cycles import LRRangeTest, OneCycle
from zerort.optim.schedules import build
from zerort.optim.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

Rates = list[float]


def adam(*lrs: Any) -> torch.optim.Adam:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def rates(optimizer: torch.optim.Optimizer) -> Rates:
    return [float(group["lr"]) for group in optimizer.param_groups]


def first_betas(optimizer: torch.optim.Optimizer) -> Rates:
    return [group["betas"][0] for group in optimizer.param_groups]


def course(schedule: Any, steps: int) -> list[Rates]:
    """What stands in the groups after construction and after each step."""
    seen = [rates(schedule.optimizer)]
    for _ in range(steps):
        schedule.step()
        seen.append(rates(schedule.optimizer))
    return seen


# One cycle: up in `first` steps, down in `second`, then divided by 1 + rate * decay intervals.


def height(done: int, first: int, second: int) -> Fraction:
    """0 at the foot of the cycle, 1 at its top; `done` steps of it are over."""
    done %= first + second
    return Fraction(done, first) if done <= first else Fraction(first + second - done, second)


def cycle_lr(i: int, low: Fraction, high: Fraction, cycle: dict[str, Any]) -> float:
    first, second = cycle["first"], cycle["second"]
    if i < first + second:
        return float(low + (high - low) * height(i + 1, first, second))
    past = Fraction(i - first - second + 1, cycle["decay"]) if cycle["decay"] else Fraction(0)
    return float(low / (1 + cycle["lr_rate"] * past))


def cycle_momentum(i: int, low: Fraction, high: Fraction, cycle: dict[str, Any]) -> float:
    first, second = cycle["first"], cycle["second"]
    if i < first + second:
        return float(high - (high - low) * height(i + 1, first, second))
    past = Fraction(i - first - second + 1, cycle["decay"]) if cycle["decay"] else Fraction(0)
    return float(high * (1 + cycle["mom_rate"] * past))


cycles = st.fixed_dictionaries(
    {
        "first": st.integers(1, 7),
        "second": st.integers(0, 7),
        "decay": st.integers(0, 5),
        "lr_rate": st.fractions(0, 2, max_denominator=8),
        "mom_rate": st.fractions(0, 1, max_denominator=8),
    }
)


@given(cycle=cycles)
@settings(deadline=None)
def test_a_cycle_has_a_rate_and_a_momentum_of_its_own_for_each_group(cycle: dict[str, Any]) -> None:
    low, high = [Fraction(1, 100), Fraction(1, 50)], [Fraction(1, 10), Fraction(1, 4)]
    least, most = [Fraction(4, 5), Fraction(3, 5)], [Fraction(9, 10), Fraction(19, 20)]
    optimizer = adam(1.0, 2.0)
    schedule = OneCycle(
        optimizer,
        [float(lr) for lr in low],
        [float(lr) for lr in high],
        decay_lr_rate=float(cycle["lr_rate"]),
        cycle_first_step_size=cycle["first"],
        cycle_second_step_size=cycle["second"],
        decay_step_size=cycle["decay"],
        cycle_min_mom=[float(beta) for beta in least],
        cycle_max_mom=[float(beta) for beta in most],
        decay_mom_rate=float(cycle["mom_rate"]),
    )
    assert first_betas(optimizer) == [0.8, 0.6]  # DeepSpeed's start; its get_mom says the other end
    assert schedule.get_mom() == [(0.9, 0.99), (0.95, 0.99)]
    for i in range(25):
        schedule.step()
        want = [cycle_lr(i, *pair, cycle) for pair in zip(low, high, strict=True)]
        assert rates(optimizer) == pytest.approx(want, rel=1e-12)
        want = [cycle_momentum(i, *pair, cycle) for pair in zip(least, most, strict=True)]
        assert first_betas(optimizer) == pytest.approx(want, rel=1e-12)
        assert [beta for beta, _ in schedule.get_mom() or ()] == first_betas(optimizer)


def test_a_cycle_without_a_second_half_falls_at_once() -> None:
    schedule = OneCycle(adam(1.0), 1.0, 5.0, cycle_first_step_size=4, cycle_second_step_size=0)
    assert course(schedule, 6) == [[1.0], [2.0], [3.0], [4.0], [1.0], [1.0], [1.0]]


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, None), (-1, None), (0, 9), (9, -1)])
def test_a_cycle_needs_a_first_half_and_no_second_of_less_than_nothing(
    first: int, second: int | None
) -> None:
    optimizer = adam(0.5)
    with pytest.raises(ConfigError, match=r"scheduler\.params\.cycle_(first|second)_step_size: "):
        OneCycle(optimizer, 0.1, 0.2, 0.0, first, second)
    assert rates(optimizer) == [0.5]


def test_a_rate_alone_is_cycled_where_momentum_is_not() -> None:
    optimizer = adam(1.0)
    schedule = OneCycle(optimizer, 0.1, 0.2, cycle_first_step_size=2, cycle_momentum=False)
    schedule.step()
    assert schedule.get_mom() is None
    assert first_betas(optimizer) == [0.9]


@pytest.mark.parametrize(
    "key", ["cycle_min_lr", "cycle_max_lr", "cycle_min_mom", "cycle_max_mom", "warmup_max_lr"]
)
def test_a_list_of_another_length_than_the_groups_is_refused(key: str) -> None:
    optimizer = adam(0.5, 0.5)
    cycle = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2} if key.startswith("cycle") else {}
    name = "OneCycle" if cycle else "WarmupLR"
    message = rf"scheduler\.params\.{key}: expected 2 values, one a parameter group, got 3"
    with pytest.raises(ConfigError, match=message):
        build(name, {**cycle, key: [0.1, 0.2, 0.3]}, optimizer)
    assert rates(optimizer) == [0.5, 0.5]


# Warm-ups


def warmth(i: int, steps: int, kind: str) -> float:
    """How much of the way to the top is done after the step of iteration `i`, during warm-up."""
    return math.log(i + 1) / math.log(steps) if kind == "log" else i / steps


@given(
    steps=st.integers(1, 12),
    kind=st.sampled_from(["log", "linear"]),
    own=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=3),
)
@settings(deadline=None)
def test_a_warmup_without_a_top_takes_every_group_to_its_own_rate(
    steps: int, kind: str, own: list[float]
) -> None:
    schedule = WarmupLR(adam(*own), 0.0, None, steps, kind)  # type: ignore[arg-type]
    assert schedule.max_lrs == own
    assert schedule.get_lr() == [0.0] * len(own)
    least = max(2, steps)
    for i, seen in enumerate(course(schedule, 16)[1:]):
        share = warmth(i, least, kind) if i < least else 1.0
        assert seen == pytest.approx([lr * share for lr in own], rel=1e-12)


def test_a_warmup_that_decays_comes_back_in_a_straight_line() -> None:
    schedule = WarmupDecayLR(adam(9.0), 8, 1.0, 5.0, 4, "linear")
    climb = [[1.0], [1.0], [2.0], [3.0], [4.0]]
    assert course(schedule, 10) == [*climb, [5.0], [4.0], [3.0], [2.0], [1.0], [1.0]]


@given(steps=st.integers(2, 9), total=st.integers(1, 20), kind=st.sampled_from(["log", "linear"]))
@settings(deadline=None)
def test_a_cosine_says_what_the_groups_own_rates_are_multiplied_by(
    steps: int, total: int, kind: Any
) -> None:
    own, floor, start = [0.5, 0.25], 0.1, 0.2
    schedule = WarmupCosineLR(adam(*own), total, start, steps, floor, kind)
    assert schedule.get_lr_ratio() == 0.0
    for i, seen in enumerate(course(schedule, 24)[1:]):
        if i < steps:
            ratio = start + (1 - start) * warmth(i, steps, kind)
        else:
            done = min(1.0, (i - steps + 1) / max(1, total - steps))
            ratio = floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
        assert seen == pytest.approx([lr * ratio for lr in own], rel=1e-12, abs=1e-15)
    assert schedule.get_lr_ratio() == pytest.approx(ratio, rel=1e-12)


# Learning rates that are tensors

EVERY = [
    (LRRangeTest, {"lr_range_test_min_lr": 0.25, "lr_range_test_step_size": 2}, 0.25, 0.5),
    (
        OneCycle,
        {"cycle_min_lr": 0.25, "cycle_max_lr": 1.25, "cycle_first_step_size": 4},
        0.25,
        0.75,
    ),
    (WarmupLR, {"warmup_num_steps": 2}, 0.0, 1.0),
    (WarmupDecayLR, {"total_num_steps": 9, "warmup_num_steps": 4}, 0.0, 0.0005),
    (WarmupCosineLR, {"total_num_steps": 9, "warmup_num_steps": 4}, 0.0, 0.5),
]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(("kind", "params", "start", "second"), EVERY)
def test_a_rate_that_is_a_tensor_is_filled_in_place(
    kind: Any, params: dict[str, Any], start: float, second: float, shape: tuple[int, ...]
) -> None:
    lr = torch.full(shape, 1.0, dtype=torch.float64)
    optimizer = adam(lr)
    schedule = kind(optimizer, **params)
    assert lr.reshape(()).item() == pytest.approx(start)
    schedule.step(1)
    assert optimizer.param_groups[0]["lr"] is lr
    assert (lr.shape, lr.dtype) == (shape, torch.float64)
    assert lr.reshape(()).item() == pytest.approx(second)
