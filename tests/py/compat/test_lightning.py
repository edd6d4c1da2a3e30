"""Lightning's Trainer on the engine: the same numbers as under its own DDP, and exact resume."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks

pytestmark = [
    pytest.mark.timeout(170),
    pytest.mark.skipif(
        find_spec("pytorch_lightning") is None, reason="pytorch-lightning is not installed"
    ),
]
every_stage = pytest.mark.parametrize(
    "stage",
    [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2, 3],
)


def _flows(rank: int, world: int, stage: int, folder: str) -> dict[str, Any]:
    import lightning_flows

    return lightning_flows.run(lightning_flows.flows_at(stage), Path(folder))


@ranks.once(None)
def _results(stage: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return ranks.run(2, _flows, stage, folder, timeout=150)


def result(name: str, stage: int) -> list[Any]:
    """Of each rank."""
    found = [of_rank[f"{name} {stage}"] for of_rank in _results(stage)]
    for rank, value in enumerate(found):
        if isinstance(value, str):
            pytest.fail(f"rank {rank}: {value}")
    return found


@every_stage
def test_a_fit_gives_the_numbers_of_ddp(stage: int) -> None:
    for ours, theirs in zip(result("fitted", stage), result("ddp", stage), strict=True):
        losses, weights, score, steps = ours
        assert steps == theirs[3] == 6
        assert len(losses) == 12
        assert losses == pytest.approx(theirs[0], rel=1e-5)
        assert score == pytest.approx(theirs[2], rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, theirs[1][name], rtol=1e-5, atol=1e-6)


@every_stage
def test_a_resumed_fit_is_the_uninterrupted_one_to_the_bit(stage: int) -> None:
    for difference, lost, seen, odd, steps in result("resumed", stage):
        assert difference == 0.0
        assert lost == []
        assert (seen, steps) == (18, 9)
        assert odd == ({1: "one"}, {"a", "b"})
