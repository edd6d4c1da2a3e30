"""A checkpoint holds what int8 has rounded off where it is asked to, and how far random rounding
has come: then a run that resumes is the run that went on, to the bit.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ranks
from hills import Variant, take_step, weights_of
from training import keep
from zerort.errors import CheckpointError

WORLD, BEFORE, BEHIND = 2, 3, 3
EXACT = {
    "stage 0": Variant(0, 1, "checkpoint"),
    "stage 1, gas 2": Variant(1, 2, "checkpoint"),
    "stage 2, gas 2": Variant(2, 2, "checkpoint"),
    "at random": Variant(2, 1, False),
    "at random, stage 0": Variant(0, 1, False),
}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2}}
EXACT["a loss scale that moves"] = Variant(1, 1, "checkpoint", more=FP16)
ANEW = {"auto": Variant(1, 1, "auto")}


def resumed(
    rank: int, world: int, folder: Path, cases: dict[str, Variant]
) -> dict[str, list[list[Tensor]]]:
    """Weights of a run that goes on, and of one that resumes."""
    found = {}
    for name, variant in cases.items():
        place = folder / name
        engine = variant.engine(rank)
        for step in range(BEFORE):
            take_step(engine, step, variant.gas)
        engine.save_checkpoint(place)
        other = variant.engine(rank)
        take_step(other, 77, variant.gas)  # which leaves something behind
        other.load_checkpoint(place)
        runs = []
        for run in (engine, other):
            for step in range(BEFORE, BEFORE + BEHIND):
                take_step(run, step, variant.gas)
            runs.append(weights_of(run))
            keep(run)
        found[name] = runs
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int8")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, list[list[Tensor]]]]:
    return ranks.shared(WORLD, resumed, folder, {**EXACT, **ANEW})


@pytest.mark.parametrize("name", EXACT)
def test_a_run_that_resumes_is_the_one_that_went_on(
    name: str, found: list[dict[str, list[list[Tensor]]]]
) -> None:
    for of_rank in found:
        on, again = of_rank[name]
        assert all(map(torch.equal, on, again))


def test_by_default_error_feedback_is_not_saved_and_begins_anew(
    folder: Path, found: list[dict[str, list[list[Tensor]]]]
) -> None:
    on, again = found[0]["auto"]
    assert not all(map(torch.equal, on, again))
    assert "wire" not in ranks_of(folder / "auto")[0]
    assert "wire" in ranks_of(folder / "stage 0")[0]


def ranks_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / f"global_step{BEFORE}" / "manifest.json").read_text()
    return json.loads(text)["manifest"]["ranks"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "error feedback begins anew: each rank has its own, 2 saved, 1 load"),
        ({"feedback": False}, "error feedback is not taken: it is off"),
    ],
)
def test_residuals_that_do_not_fit_begin_anew_and_that_is_said_once(
    change: dict[str, Any],
    sentence: str,
    folder: Path,
    found: list[dict[str, list[list[Tensor]]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Variant(**{"stage": 0, "gas": 1, "feedback": True, **change}).engine(0)
    with caplog.at_level(logging.WARNING, logger="zerort"):
        engine.load_checkpoint(folder / "stage 0")
    assert sum(sentence in message for message in caplog.messages) == 1
    assert any(sentence in reason for reason in engine.last_load.not_restored)
    take_step(engine, 0)
    engine.destroy()


def test_other_buckets_and_a_checkpoint_without_residuals_are_said_too(tmp_path: Path) -> None:
    def loaded(saved: Variant, other: Variant) -> str:
        engine = saved.engine(0)
        take_step(engine, 0)
        engine.save_checkpoint(tmp_path, overwrite=True)
        engine.destroy()
        engine = other.engine(0)
        engine.load_checkpoint(tmp_path)
        reasons = engine.last_load.not_restored
        engine.destroy()
        return " ".join(reasons)

    kept, plain = Variant(1, 1, "checkpoint"), Variant(1, 1)
    wide = Variant(1, 1, True, zero={"reduce_bucket_size": 5000})
    assert "in other buckets when this was saved" in loaded(kept, wide)
    assert "error feedback begins anew: the checkpoint has none" in loaded(plain, kept)
    assert "feedback" not in loaded(plain, Variant(1, 1))


def test_residuals_of_another_length_are_refused_before_anything_changes(tmp_path: Path) -> None:
    engine = Variant(1, 1, "checkpoint").engine(0)
    take_step(engine, 0)
    local = engine._parts.reduction.local
    state = local.wire_state()
    short = type(state)(state.layout, 0, {name: t[4:] for name, t in state.residuals.items()})
    local.wire_state, whole = lambda: short, local.wire_state
    engine.save_checkpoint(tmp_path)
    local.wire_state = whole
    before = weights_of(engine)
    with pytest.raises(CheckpointError, match="is not one of these buckets"):
        engine.load_checkpoint(tmp_path)
    assert all(map(torch.equal, before, weights_of(engine)))
    engine.destroy()
