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
    [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3],
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


@every_stage
def test_checkpoints_are_validated_tested_and_predicted_from_without_a_fit(stage: int) -> None:
    for found in result("without fitting", stage):
        fitted, *others = found["scores"]
        assert found["kept"] == ["epoch=0-step=3.ckpt", "last.ckpt"]
        assert found["best"] > fitted, "the first epoch's, because the mode is max"
        assert others == pytest.approx([found["best"]] * 4, rel=1e-6)
        assert found["epoc"][1] == found["last"][1] == 1  # of five rows each rank has three
        for name, value in found["epoc"][0].items():
            assert not torch.equal(value, found["fitted"][name])


@every_stage
def test_optimization_by_hand_accumulates_and_drops_as_under_ddp(stage: int) -> None:
    for ours, theirs in zip(result("by hand", stage), result("ddp by hand", stage), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        for name, value in ours[1].items():
            torch.testing.assert_close(value, theirs[1][name], rtol=1e-5, atol=1e-6)


@every_stage
def test_layers_that_are_made_in_configure_model_train_and_come_back(stage: int) -> None:
    ours, theirs = result("configured", stage), result("ddp configured", stage)
    for mine, other in zip(ours, theirs, strict=True):
        losses, weights, validated, bytes_within, steps = mine
        assert losses == pytest.approx(other[0], rel=1e-5)
        assert steps == other[4] == 9
        for name, value in weights.items():
            torch.testing.assert_close(value, other[1][name], rtol=1e-5, atol=1e-6)
            assert torch.equal(value, validated[name])
        assert bytes_within == ([0] if stage == 3 else other[3]), "born in shards"


@every_stage
def test_behind_a_fit_the_weights_are_there_and_can_be_saved_as_one_file(stage: int) -> None:
    for found in result("behind fit", stage):
        assert found["is file"]
        fitted, tested, plain = found["weights"]
        for name, value in fitted.items():
            assert torch.equal(value, tested[name])
            assert torch.equal(value, plain[name])
        assert "is one file, which holds no state of this strategy's optimizer" in found["refused"]
        assert found["on"] == (9, 6), "one epoch more, from the file's weights"
        assert 0 < found["moved"] < 0.2, "the same Trainer and module, once more"


@every_stage
def test_overfit_batches_gives_the_numbers_of_ddp(stage: int) -> None:
    ours, theirs = result("overfitted", stage), result("ddp overfitted", stage)
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine) == 8
        assert mine == pytest.approx(other, rel=1e-5)


@every_stage
def test_several_optimizers_as_one_give_the_numbers_of_ddp(stage: int) -> None:
    for ours, theirs in zip(result("chained", stage), result("ddp chained", stage), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        for name, value in ours[1].items():
            torch.testing.assert_close(value, theirs[1][name], rtol=1e-5, atol=1e-6)
        assert ours[2] == theirs[2] == [1e-2, 1e-1]
        assert "fabric.setup got 2 optimizers, and an engine has one optimizer, which" in ours[3]


@every_stage
def test_what_an_engine_cannot_do_is_refused_by_name(stage: int) -> None:
    for found in result("refused", stage):
        for case, words in {
            "two": "returns 2 optimizers, and an engine has one optimizer, which steps them all: "
            "give it zerort.optim.Chain(",
            "two that step": "configure_optimizers returns several optimizers: an engine has one",
            "by value": 'ConfigError: gradient_clip_algorithm="value"',
            "none": "returning None in distributed training is not supported",  # Lightning's own
            "64": "the precision plugin DoublePrecision is not supported",
            "steps": "windows are Lightning's, got 2",
            "empty": "holds no folder 'checkpoint': give the path that Lightning saved to",
            "url": "only local folders can be written and read",
        }.items():
            assert words in found[case], case


@every_stage
def test_a_training_step_that_raises_on_one_rank_ends_all_with_its_reason(stage: int) -> None:
    innocent, culprit = (found["breaks"] for found in result("refused", stage))
    assert culprit == "KeyError: 'batch 2'"
    assert "KeyError: 'batch 2'" in innocent
    assert innocent.startswith(("CommError: ", "StepError: "))
    assert [found["after"] for found in result("refused", stage)] == [12, 12], "works on"


@every_stage
def test_a_loop_of_fabrics_gives_the_numbers_of_ddp_and_goes_on_from_its_checkpoint(
    stage: int,
) -> None:
    ours, theirs = result("fabric", stage), result("ddp fabric", stage)
    for mine, other in zip(ours, theirs, strict=True):
        losses, more, steps, left, refused = mine
        assert losses == pytest.approx(other[0], rel=1e-5)
        assert more == losses[4:], "to the bit"
        assert (steps, left) == (other[2], other[3]) == (2, {})
        assert "the engine clips in its step" in refused[0]
        assert "with 2 models set up: say whose loss it is" in refused[1]


@every_stage
def test_a_model_that_fabric_sets_up_alone_is_evaluated_and_trains_with_an_optimizer(
    stage: int,
) -> None:
    ours, theirs = result("fabric alone", stage), result("ddp fabric alone", stage)
    for mine, other in zip(ours, theirs, strict=True):
        outputs, losses, sharded, at, early, twice = mine
        assert losses == pytest.approx(other[1], rel=1e-5)
        for output, expected in zip(outputs, other[0], strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(outputs[1], outputs[2]), "what was loaded"
        assert (sharded, at) == (stage == 3, 3)
        assert "engine that only runs forward" in early or stage != 3
        assert "has no optimizer yet" in twice


def _in_16_bits(rank: int, world: int, precision: str, stage: int, folder: str) -> dict[str, Any]:
    import lightning_flows

    return lightning_flows.run(lightning_flows.flows_in(precision, stage), Path(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "stage"), [("bf16-true", 1), ("bf16-true", 3), ("bf16-mixed", 2)]
)
def test_in_16_bits_the_numbers_are_near_ddps_and_a_resumed_fit_is_exact(
    precision: str, stage: int, tmp_path: Path
) -> None:
    both = ranks.run(2, _in_16_bits, precision, stage, str(tmp_path), timeout=150)
    for found in both:
        assert {name: value for name, value in found.items() if isinstance(value, str)} == {}
        # masters are fp32 here, and 16 bits under DDP's "bf16-true"
        near = 1e-5 if precision == "bf16-mixed" else 0.05
        assert found["fitted"][0] == pytest.approx(found["ddp"][0], rel=near)
        assert found["resumed"][:2] == (0.0, [])
        assert found["fabric"][0] == pytest.approx(found["ddp fabric"][0], rel=near)
        assert found["fabric"][1] == found["fabric"][0][4:]
        for name, value in found["configured"][1].items():
            assert torch.equal(value, found["configured"][2][name])


@every_stage
def test_an_object_in_a_checkpoint_is_made_only_where_it_is_trusted(stage: int) -> None:
    for saved, refused, kind, unpicklable in result("object", stage):
        assert saved == "nothing was raised"
        assert refused.startswith("CheckpointError: ") and "add_safe_globals" in refused
        assert kind == "Counts"
        assert "CheckpointError: Lightning's part of a checkpoint cannot be pickled" in unpicklable
