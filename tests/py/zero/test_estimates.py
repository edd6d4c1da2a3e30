"""What memory will be needed is said before it is."""

from __future__ import annotations

import pytest
from torch import nn

from zerort import zero
from zerort.zero.estimates import rank_bytes


@pytest.mark.parametrize(
    ("stage", "dtype", "want"),
    [(2, "bf16", 2 + 16 / 4), (2, "fp32", 4 + 12 / 4), (3, "bf16", 18 / 4), (3, "fp32", 16 / 4)],
)
def test_states_take_what_the_formula_says(stage: int, dtype: str, want: float) -> None:
    room = {2: 0, 3: 6e7}[stage] * (2 if dtype == "bf16" else 4)
    assert rank_bytes(stage, dtype, 10**9, 2 * 10**7, 4) == want * 10**9 + room


@pytest.mark.parametrize(
    ("stage", "dtype", "want"),
    [(2, "bf16", 2 + 8 / 4), (2, "fp32", 4 + 6 / 4), (3, "bf16", 10 / 4), (3, "fp32", 10 / 4)],
)
def test_frozen_parameters_cost_their_values_alone(stage: int, dtype: str, want: float) -> None:
    room = {2: 0, 3: 6e7}[stage] * (2 if dtype == "bf16" else 4)
    assert rank_bytes(stage, dtype, 10**9, 2 * 10**7, 4, 5 * 10**8) == want * 10**9 + room


def test_a_model_s_frozen_parameters_are_counted_as_such(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = nn.Sequential(nn.Linear(9000, 9000).requires_grad_(False), nn.Linear(9000, 1000))
    zero.estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=2)
    frozen = capsys.readouterr().out
    assert "90M parameters, 81M frozen, outside the optimizer, 81M in its largest layer." in frozen
    zero.estimate_zero3_model_states_mem_needs_all_live(model.requires_grad_(True), 2)
    assert frozen != capsys.readouterr().out


def test_tables_name_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10))
    zero.estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=2)
    live = capsys.readouterr().out
    total = sum(p.numel() for p in model.parameters())
    zero.estimate_zero3_model_states_mem_needs_all_cold(total, 1000 * 1001, num_gpus_per_node=2)
    assert capsys.readouterr().out == live
    assert "1 node of 2 ranks" in live and "1M in its largest layer" in live
    assert [line.split("| ")[-1] for line in live.splitlines()[3:]] == [
        "bf16, zero_init=1",
        "bf16, zero_init=0",
        "fp32, zero_init=1",
        "fp32, zero_init=0",
    ]
    zero.estimate_zero2_model_states_mem_needs_all_live(model)
    other = capsys.readouterr().out
    zero.estimate_zero2_model_states_mem_needs_all_cold(total)
    assert capsys.readouterr().out == other
