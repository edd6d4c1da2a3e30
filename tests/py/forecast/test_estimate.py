"""`zerort estimate` is what the formulas say, and what `zerort config` says of the same model."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from zerort.cli import main

P, N, LAYERS = 2**26, 8, 16
WITHIN = 0.01
"""Buckets are padded."""
STATES = ("parameters", "masters", "sums", "state")


def estimated(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["estimate", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def states(found: dict[str, Any], place: str = "device_bytes") -> list[float]:
    """Bytes a parameter, by stage."""
    return [sum(one[place][kind] for kind in STATES) / P for one in found["forecasts"]]


@pytest.mark.parametrize(
    ("flags", "by_stage"),
    [
        # with local sums of micro-batches, which stage 2 reduces at once
        (
            ["--dtype=bf16", "--micro-batches=2"],
            [18, 6 + 12 / N, 2 + 16 / N, 18 / N],
        ),
        (["--dtype=fp16"], [18, 2 + 16 / N, 2 + 16 / N, 18 / N]),
        (["--dtype=fp32"], [16, 4 + 12 / N, 4 + 12 / N, 16 / N]),
        (["--optimizer=SGD"], [10, 2 + 8 / N, 2 + 8 / N, 10 / N]),
    ],
)
def test_states_are_what_the_formulas_say(
    flags: list[str], by_stage: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    found = estimated(capsys, f"--params={P}", f"--layers={LAYERS}", f"--ranks={N}", *flags)
    assert [one["stage"] for one in found["forecasts"]] == [0, 1, 2, 3]
    assert (found["parameters"], found["ranks"], found["stage"]) == (P, N, None)
    assert states(found) == pytest.approx(by_stage, rel=WITHIN)


def test_the_largest_unit_and_the_window_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    found = estimated(capsys, "--params=8e9", "--layers=16", "--ranks=2", "--stage=3")
    last = found["forecasts"][3]
    assert found["stage"] == 3 and last["units"] == 16
    assert last["largest_unit_elements"] == pytest.approx(8e9 / 16, rel=WITHIN)
    assert last["device_bytes"]["on_their_way"] > 0 and last["buckets_in_flight"] == 4
    kinds = [nbytes for kind, nbytes in last["device_bytes"].items() if kind != "together"]
    assert last["device_bytes"]["together"] == sum(kinds)
    gathered = [
        estimated(capsys, "--params=8e9", f"--layers={layers}", "--ranks=2")["forecasts"][3]
        for layers in (4, 8)
    ]
    assert [one["device_bytes"]["gathered"] for one in gathered] == [
        pytest.approx(2 * 3 * 8e9 / layers, rel=WITHIN) for layers in (4, 8)
    ]


@pytest.mark.timeout(60)
def test_ranks_that_hold_the_same_are_counted_once(capsys: pytest.CaptureFixture[str]) -> None:
    """One number for each rank and bucket would be a gigabyte here."""
    tracemalloc.start()
    try:
        found = estimated(capsys, "--params=4e9", "--layers=4", "--ranks=262144")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found["forecasts"][3]["buckets"] > 250 and peak < 200e6


def test_a_model_is_estimated_as_its_configuration_is(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    offload = {"offload_optimizer": {"device": "cpu"}}
    given = {"optimizer": {"type": "Lion"}, "zero_optimization": {"stage": 2, **offload}}
    path.write_text(json.dumps({"bf16": {"enabled": True}, "train_batch_size": 4, **given}))
    model = ["--model", "forecasted:make"]
    assert main(["config", str(path), *model, "--world=4", "--json"]) == 0
    want = json.loads(capsys.readouterr().out)
    flags = ["--ranks=4", "--optimizer=Lion", "--offload=optimizer", "--stage=2"]
    found = estimated(capsys, *model, *flags)
    assert found["forecasts"] == want["forecasts"]
    assert found["refused_stages"] == want["refused_stages"] and "0" in want["refused_stages"]


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["--params", "7B", "--model", "a:b"],
        ["--params", "-1"],
        ["--params", "7B", "--ranks", "0"],
        ["--params", "7B", "--layers", "0"],
        ["--params", "7B", "--stage", "4"],
        ["--params", "7B", "--dtype", "int3"],
    ],
)
def test_a_line_with_a_mistake_is_status_2(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", *line])
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            ["--model", "forecasted:make", "--layers", "2"],
            "--layers and --largest are for --params",
        ),
        (["--model", "nowhere:make"], "cannot be imported"),
        (["--params", "7B", "--optimizer", "Adamm"], "Adamm"),
        (["--params", "7B", "--layers", "99999999"], "99,999,999 layers are more than 200,000"),
        (["--params", "9e15"], "more than 200,000 pieces to plan: give fewer layers, or larger"),
    ],
)
def test_what_cannot_be_estimated_is_one_line_and_status_2(
    line: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", *line]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
