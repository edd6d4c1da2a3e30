"""What `zerort config` prints of optimizers that look at whole parameters, and what engines hold.

Each rank's bytes are counted, for ranks differ: an owner alone keeps the state of what it owns.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import forecasted
import ranks
from forecasted import Counts
from zerort.cli import main
from zerort.config import load_part
from zerort.forecast import Forecast, Job, forecast, made_by
from zerort.forecast.commands import SECTIONS
from zerort.forecast.owners import Exchanged, unevenness
from zerort.step.precision import Precision
from zerort.zero.estimates import whole_state_bytes

pytestmark = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is torch 2.9's"
)
WORLD, WITHIN, SMALL = 2, 0.02, 12_000
MUON = {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 1e-3}}
ADAFACTOR = {"type": "Adafactor", "params": {"lr": 0.01}}


def config(
    stage: int, optimizer: Any, gas: int = 1, padding: float = 0.1, **zero: Any
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": gas,
        "optimizer": optimizer,
        "bf16": {"enabled": stage != 1},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 40 * forecasted.WIDTH**2,
            "stage3_param_persistence_threshold": forecasted.WIDTH,
            **zero,
        },
        "zerort": {"whole_padding": padding, "transport": "gloo"},
    }


IN_ONES = {"reduce_bucket_size": forecasted.WIDTH**2}
"""Buckets of about a matrix, which two shards cut."""
EXCHANGED = {
    f"{optimizer['type']}, {model}, stage {stage}, exchanged": (
        model,
        config(stage, optimizer, gas, **IN_ONES),
    )
    for optimizer, model, stage, gas in (
        (MUON, "make", 1, 3),
        (MUON, "of_shapes", 2, 1),
        (ADAFACTOR, "make", 2, 3),
        (MUON, "of_shapes", 3, 1),
    )
}
CASES = {
    f"{optimizer['type']}, {model}, stage {stage}": (model, config(stage, optimizer, gas=gas))
    for optimizer, model, stage, gas in (
        (MUON, "make", 1, 1),
        (MUON, "of_shapes", 2, 3),
        (MUON, "make", 3, 1),
        (ADAFACTOR, "of_shapes", 0, 1),
        (ADAFACTOR, "make", 1, 3),
        (ADAFACTOR, "of_shapes", 3, 1),
    )
} | EXCHANGED


DAILY = {
    "Muon, of_shapes, stage 2",
    "Muon, make, stage 3",
    "Adafactor, make, stage 1",
    "Muon, of_shapes, stage 3, exchanged",
    "Adafactor, make, stage 2, exchanged",
}


def count_all(rank: int, world: int, daily: bool) -> dict[str, Counts]:
    return {
        name: forecasted.count(rank, getattr(forecasted, model), settings, None)
        for name, (model, settings) in CASES.items()
        if (name in DAILY) == daily
    }


counted = ranks.once(None)(lambda daily: ranks.run(WORLD, count_all, daily, timeout=200))
each = pytest.mark.parametrize(
    "name",
    [name if name in DAILY else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)


def said(name: str) -> Forecast:
    model, settings = CASES[name]
    own = load_part(settings, SECTIONS)
    gas = settings["gradient_accumulation_steps"]
    return forecast(own, made_by(f"forecasted:{model}"), Job(WORLD, on_accelerator=False), gas)


@each
def test_each_rank_holds_what_is_said_and_none_much_more_than_the_others(name: str) -> None:
    found, expected = [rank[name] for rank in counted(name in DAILY)], said(name)
    ways = {bucket.way for bucket in expected.plan.buckets}
    assert ("exchanged" in ways) == (name in EXCHANGED)
    for rank, counts in enumerate(found):
        most = expected.by_rank[rank]
        assert abs(counts.device - most) <= WITHIN * most + SMALL, (rank, counts.device, most)
    differ, meant = found[0].device - found[1].device, expected.by_rank[0] - expected.by_rank[1]
    assert abs(differ - meant) <= SMALL
    assert unevenness(counts.device for counts in found) <= 1.25
    exchange = Exchanged.of(expected.plan, Precision.of(expected.settings))
    fullest = expected.by_rank.index(max(expected.by_rank))
    there, back = "gradients_to_owners", "parameters_from_owners"
    assert expected.sent[there] == exchange.there[fullest]
    assert expected.sent[back] == exchange.back[fullest]
    alike = sum(nbytes for kind, nbytes in expected.sent.items() if kind not in (there, back))
    for rank, counts in enumerate(found):
        sent = alike + exchange.there[rank] + exchange.back[rank]
        assert abs(counts.sent - sent) <= WITHIN * sent


@pytest.mark.parametrize("name", CASES)
def test_what_is_printed_is_of_the_rank_that_has_most(name: str) -> None:
    expected = said(name)
    at_rest = sum(p.nbytes for p in expected.pieces if p.kind.value != "gathered, at most")
    assert at_rest == max(expected.by_rank)


def test_owners_are_printed_beside_the_stages(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config(2, MUON)))
    line = ["config", str(path), "--model", "forecasted:make", "--world", "2"]
    assert main(line) == 0
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    rows = {name: cells for name, *cells in lines}
    assert rows["buckets of whole shards"] == ["1", "1", "1"]  # every rank has all at stage 0
    assert rows["ranks that own some"] == ["2 of 2"] * 3
    assert rows["elements, most over mean"] == ["1.09"] * 3  # six of eleven
    assert rows["work, most over mean"] == ["1.09"] * 3
    assert rows["padding"] == ["9.1%"] * 3  # twelve places for eleven
    assert main([*line, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["forecasts"]
    whole = [one["whole_parameters"] for one in stages]
    assert whole[0] is None and whole[2]["owned_buckets"] == whole[2]["exchanged_buckets"] + 1 == 1
    assert 1 < stages[2]["fullest_rank_over_mean"] < 1.25
    path.write_text(json.dumps(config(2, {"type": "AdamW"})))
    assert main(line) == 0
    assert "ranks that own" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("optimizer", "lacks"), [(MUON, True), (ADAFACTOR, True), ({"type": "AdamW"}, False)]
)
def test_a_size_alone_says_that_it_has_no_matrices(
    optimizer: Any, lacks: bool, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config(2, optimizer, padding=20)))
    assert main(["config", str(path), "--numel", "1e6", "--world", "2"]) == 0
    assert ("Without matrices" in capsys.readouterr().out) == lacks


def layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(24, 24 + index % 3, bias=False) for index in range(3000)))


@pytest.mark.parametrize(("optimizer", "padding"), [(MUON, 1), (ADAFACTOR, 0)])
def test_a_thousand_ranks_are_answered_in_seconds(optimizer: Any, padding: float) -> None:
    own = load_part(config(2, optimizer, padding=padding), SECTIONS)
    began = time.process_time()
    found = forecast(own, made_by("test_owners:layers"), Job(1024), 1)
    assert time.process_time() - began < 5
    assert found.owners is not None and len(found.owners.elements) == len(found.by_rank) == 1024


@pytest.mark.parametrize(
    ("optimizer", "shape", "nbytes"),
    [
        (ADAFACTOR, (40, 70), 4 * (40 + 70)),
        (ADAFACTOR, (6, 40, 70), 4 * 6 * (40 + 70)),
        (ADAFACTOR, (70,), 4 * 70),
        (ADAFACTOR, (0, 5), 4 * 5),
        (MUON, (40, 70), 4 * 40 * 70),
        ({"type": "AdamW"}, (40, 70), 8 * 40 * 70),
        ({"type": "SGD", "params": {"lr": 1}}, (40, 70), 0),
    ],
)
def test_state_of_a_whole_parameter_has_its_own_shapes(
    optimizer: Any, shape: tuple[int, ...], nbytes: int
) -> None:
    own = load_part(config(2, optimizer), SECTIONS)
    assert whole_state_bytes(own, torch.float32, shape) == nbytes
