"""Learning-rate schedules: recordings of DeepSpeed, resuming, torch's by name, refusals."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zerort.errors import ConfigError
from zerort.optim.cycles import OneCycle
from zerort.optim.schedules import build
from zerort.optim.warmup import WarmupLR

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "lr_schedules.json").read_text())[
    "rows"
]
IDS = [f"{row['scheduler']}-{index}" for index, row in enumerate(RECORDED)]


def adam(*lrs: float, betas: tuple[float, float] = (0.9, 0.99)) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    return torch.optim.Adam(groups, betas=betas)


def values(optimizer: torch.optim.Optimizer) -> tuple[list[float], float]:
    return [group["lr"] for group in optimizer.param_groups], optimizer.param_groups[0]["betas"][0]


def test_all_ten_recordings_are_there() -> None:
    assert len(RECORDED) == 10
    assert {row["scheduler"] for row in RECORDED} == {
        "LRRangeTest",
        "OneCycle",
        "WarmupLR",
        "WarmupDecayLR",
        "WarmupCosineLR",
    }


@pytest.mark.parametrize("row", RECORDED, ids=IDS)
def test_every_recorded_value_is_reproduced(row: dict[str, Any]) -> None:
    optimizer = adam(*row["base_lr"], betas=tuple(row["betas"]))
    schedule = build(row["scheduler"], row["params"], optimizer)
    assert len(row["lr"]) == len(row["beta1"]) == 201
    for iteration, (lrs, beta) in enumerate(zip(row["lr"], row["beta1"], strict=True)):
        if iteration:
            optimizer.step()
            schedule.step()
        have_lrs, have_beta = values(optimizer)
        assert have_lrs == pytest.approx(lrs, rel=0, abs=1e-9), iteration
        assert have_beta == pytest.approx(beta, rel=0, abs=1e-9), iteration
        assert schedule.get_last_lr() == have_lrs


@pytest.mark.parametrize("row", RECORDED, ids=IDS)
@given(stop=st.integers(0, 200))
def test_a_resumed_schedule_has_the_values_of_the_uninterrupted_one(
    row: dict[str, Any], stop: int
) -> None:
    whole, resumed = adam(*row["base_lr"]), adam(*row["base_lr"])
    first = build(row["scheduler"], row["params"], whole)
    for _ in range(stop):
        first.step()
    second = build(row["scheduler"], row["params"], resumed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert values(resumed) == values(whole)
    first.step()
    second.step()
    assert values(resumed) == values(whole)


def test_a_rate_per_group_follows_its_own_curve() -> None:
    optimizer = adam(0.1, 0.1)
    schedule = WarmupLR(
        optimizer,
        warmup_min_lr=[0.0, 1.0],
        warmup_max_lr=[1.0, 3.0],
        warmup_num_steps=4,
        warmup_type="linear",
    )
    schedule.step(2)
    assert schedule.get_last_lr() == [0.5, 2.0]


def test_warmup_without_a_top_ends_at_each_groups_own_rate() -> None:
    optimizer = adam(0.25, 0.75)
    schedule = WarmupLR(optimizer, warmup_num_steps=2)
    schedule.step(2)
    assert schedule.get_last_lr() == [0.25, 0.75]


def test_a_warmup_of_no_step_is_the_shortest_that_there_is() -> None:
    rates: list[list[list[float]]] = []
    for steps in (0, 1, 2):
        schedule = WarmupLR(adam(0.5), warmup_max_lr=0.5, warmup_num_steps=steps)
        rates.append([])
        for _ in range(3):
            schedule.step()
            rates[-1].append(schedule.get_last_lr())
    assert rates[0] == rates[1] == rates[2]
    assert rates[0][-1] == [0.5]


def test_a_cycle_over_an_optimizer_without_betas_says_so_and_cycles_the_rate(
    caplog: pytest.LogCaptureFixture,
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    with caplog.at_level(logging.WARNING, logger="zerort"):
        schedule = OneCycle(optimizer, 0.1, 0.5, cycle_first_step_size=2)
    assert "SGD has no betas" in caplog.text
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert "betas" not in optimizer.param_groups[0]


def test_a_schedule_of_torch_is_built_by_its_name() -> None:
    optimizer = adam(1.0)
    schedule = build("StepLR", {"step_size": 1, "gamma": 0.5}, optimizer)
    assert isinstance(schedule, torch.optim.lr_scheduler.StepLR)
    optimizer.step()
    schedule.step()
    assert values(optimizer)[0] == [0.5]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("warmuplr", {}, 'scheduler.type: unknown schedule "warmuplr"; did you mean "WarmupLR"?'),
        (
            "WarmupCosinLR",
            {},
            'scheduler.type: unknown schedule "WarmupCosinLR"; did you mean "WarmupCosineLR"?',
        ),
        ("xyzzy", {}, 'scheduler.type: unknown schedule "xyzzy"'),
        ("Optimizer", {}, 'scheduler.type: unknown schedule "Optimizer"'),
        (
            "WarmupLR",
            {"warmup_num_step": 10},
            "scheduler.params.warmup_num_step: no parameter of WarmupLR; did you mean "
            '"warmup_num_steps"?',
        ),
        (
            "WarmupLR",
            {"warmup_type": "square"},
            'scheduler.params.warmup_type: expected "log" or "linear", got \'square\'',
        ),
        (
            "WarmupLR",
            {"warmup_num_steps": -1},
            "scheduler.params.warmup_num_steps: expected an integer of at least 0, got -1",
        ),
        (
            "WarmupLR",
            {"warmup_min_lr": [0.0, 0.0]},
            "scheduler.params.warmup_min_lr: expected 1 values, one a parameter group, got 2",
        ),
    ],
)
def test_what_makes_no_schedule_is_refused_by_name(
    name: str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(name, params, adam(0.1))
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["OneCycle", "WarmupDecayLR", "WarmupCosineLR", "StepLR"])
def test_a_required_parameter_left_out_is_named(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"scheduler.params: {name} does not take them: .*missing .*required"
    ):
        build(name, {}, adam(0.1))
