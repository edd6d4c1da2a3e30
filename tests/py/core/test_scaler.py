"""The loss scale across the border: recordings of DeepSpeed, saving and restoring, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zerort._core import LossScale
from zerort.errors import ConfigError

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "loss_scale.json").read_text())["rows"]
DEFAULTS = {
    "initial": 65536.0,
    "window": 1000,
    "hysteresis": 2,
    "consecutive": False,
    "minimum": 1.0,
}


def scale_of(row: dict[str, Any]) -> LossScale:
    return LossScale(
        initial=row["initial_scale"],
        window=row["loss_scale_window"],
        hysteresis=row["hysteresis"],
        consecutive=row["consecutive_hysteresis"],
        minimum=row["min_loss_scale"],
    )


def test_every_recorded_sequence_is_reproduced_to_the_bit() -> None:
    assert len(RECORDED) == 72
    for row in RECORDED:
        scale = scale_of(row)
        scales = []
        for overflow in row["overflow"]:
            scale.update(bool(overflow))
            scales.append(scale.scale)
        assert scales == row["scale_after"], row["pattern"]


def test_a_saved_state_goes_on_in_another_scale_as_in_its_own() -> None:
    for row in RECORDED:
        half = len(row["overflow"]) // 2
        first, second = scale_of(row), scale_of(row)
        for overflow in row["overflow"][:half]:
            first.update(bool(overflow))
        second.restore(first.state())
        for overflow in row["overflow"][half:]:
            second.update(bool(overflow))
        assert second.scale == row["scale_after"][-1], row["pattern"]


APEX = {
    **DEFAULTS,
    "hysteresis": 1,
    "minimum": 2.0**-40,
    "forgives_at_minimum": True,
    "counts_through": True,
}


@pytest.mark.parametrize("window", [2, 3, 7])
def test_apexs_rules_without_bounds_are_those_of_torchs_grad_scaler(window: int) -> None:
    draw = torch.Generator().manual_seed(window)
    scale, growth = torch.tensor(65536.0), torch.zeros((), dtype=torch.int32)
    ours = LossScale(**{**APEX, "window": window})
    for found in (torch.rand(400, generator=draw) < 0.2).float():
        torch._amp_update_scale_(scale, growth, found, 2.0, 0.5, window)
        assert ours.update(bool(found))
        assert ours.scale == scale.item()


def test_apexs_bounds_hold_and_an_overflow_at_the_minimum_is_no_error() -> None:
    scale = LossScale(**{**APEX, "window": 1, "minimum": 32768.0, "maximum": 131072.0})
    assert [scale.update(True), scale.update(True)] == [True, True]
    assert scale.scale == 32768.0
    seen = []
    for _ in range(4):
        scale.update(False)
        seen.append(scale.scale)
    assert seen == [65536.0, 131072.0, 131072.0, 131072.0]
    assert LossScale(**{**APEX, "maximum": 1024.0}).scale == 1024.0


def test_an_overflow_at_the_minimum_is_answered_with_false() -> None:
    scale = LossScale(**{**DEFAULTS, "initial": 2.0, "hysteresis": 1})
    assert scale.update(True)
    assert scale.scale == 1.0
    assert not scale.update(True)
    assert scale.update(False)
    assert scale.state() == (1.0, 1, 3, 2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("initial", 0.0, "loss scale: scale: expected a finite number above 0, got 0"),
        ("window", 0, "loss scale: window: expected at least 1, got 0"),
        ("hysteresis", 0, "loss scale: hysteresis: expected at least 1, got 0"),
        ("minimum", float("inf"), "loss scale: minimum: expected a finite number above 0, got inf"),
        (
            "maximum",
            0.5,
            "loss scale: maximum: expected at least the minimum, 1, got 0.5",
        ),
        ("factor", 0.5, "loss scale: factor: expected a number above 1, got 0.5"),
    ],
)
def test_what_makes_no_scale_is_refused_by_name(name: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LossScale(**{**DEFAULTS, name: value})
    assert str(caught.value) == message


def test_a_state_that_cannot_have_been_saved_is_refused() -> None:
    scale = LossScale(**DEFAULTS)
    with pytest.raises(ConfigError, match="the last overflow, 5, is after the last boundary, 4"):
        scale.restore((1.0, 1, 4, 5))
    assert scale.state() == (65536.0, 2, 0, 0)
