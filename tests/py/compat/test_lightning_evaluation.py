"""Evaluations of Lightning's without a fit at stage 3: in shards, whatever is loaded into them."""

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


def _flows(rank: int, world: int, slow: bool, folder: str) -> dict[str, Any]:
    import lightning_evaluations
    import lightning_flows

    return lightning_flows.run(lightning_evaluations.flows(slow=slow), Path(folder))


@ranks.once(None)
def _results(slow: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return ranks.run(2, _flows, slow, folder, timeout=150)


def result(name: str, *, slow: bool = False) -> list[Any]:
    """Of each rank."""
    found = [of_rank[name] for of_rank in _results(slow)]
    for rank, value in enumerate(found):
        if isinstance(value, str):
            pytest.fail(f"rank {rank}: {value}")
    return found


@pytest.mark.parametrize(
    ("ours", "flow"),
    [
        ("folder", "evaluated"),
        ("file", "evaluated"),
        pytest.param("plain", "plain", marks=pytest.mark.slow),
    ],
)
def test_shards_give_the_scores_of_ddp_and_whole_weights_behind(ours: str, flow: str) -> None:
    for found in result(flow, slow=flow == "plain"):
        scores, sharded, behind = found[ours]
        expected, _, whole = found["ddp"]
        assert sharded == {True}
        assert scores[:2] == pytest.approx(expected[:2], rel=1e-6)
        torch.testing.assert_close(scores[2], expected[2])
        assert behind.keys() == whole.keys()
        for name, value in behind.items():
            assert torch.equal(value, whole[name])


def test_without_keep_weights_they_stay_in_shards() -> None:
    for found in result("evaluated"):
        assert "is sharded and in no engine" in found["gone"]


def test_ranks_predict_and_validate_different_numbers_of_batches() -> None:
    for rank, (theirs, ours) in enumerate(result("uneven")):
        assert ours[0] == theirs[0] == 3 + rank
        torch.testing.assert_close(ours[1], theirs[1])
        assert ours[2] == pytest.approx(theirs[2], rel=1e-6)
        assert ours[3] == [0, 1]


def test_within_a_fit_ranks_validate_different_numbers_of_batches() -> None:
    for found in result("uneven fit"):
        ours, theirs = found["ours"], found["ddp"]
        assert len(ours[0]) == len(theirs[0]) == 5, "once before the fit"
        for (mean, seen), (expected, all_seen) in zip(ours[0], theirs[0], strict=True):
            assert mean == pytest.approx(expected, rel=1e-5)
            torch.testing.assert_close(seen, all_seen)
        assert seen.numel() == 28, "of both ranks"
        assert ours[1:] == pytest.approx(theirs[1:], rel=1e-5)
        assert found["ours left"] == [None, None], "nothing is left on a metric"


def test_ranks_that_train_on_different_numbers_of_batches_are_told_at_once() -> None:
    for heard in result("uneven training"):
        for told in heard.values():
            assert told.startswith("CommError: ")
            assert "rank 0 comes to reduce of Lightning's; rank 1 comes to the next batch" in told


def test_a_collective_of_some_ranks_waits_for_no_other() -> None:
    assert result("of one rank")[0] == [1.0]


def test_a_rank_holds_its_part_and_one_layer() -> None:
    for most in result("weighed"):
        assert 1 / 2 < most < 1 / 2 + 1 / 6 + 0.05


def test_a_rank_that_fails_ends_all_with_its_reason() -> None:
    innocent, culprit = result("broken")
    for case, words in (("within", "KeyError: 'batch 1'"), ("between", "KeyError: 'between'")):
        assert culprit[case] == words
        assert words in innocent[case]
    for found in (innocent, culprit):
        assert found["after"] == 6
        assert "there is an engine only within fit, and at stage 3 within" in found["engine"]
