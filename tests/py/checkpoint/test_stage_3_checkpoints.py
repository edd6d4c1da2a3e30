"""Stage 3's checkpoints are stage 2's: each loads the other's, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ranks
import zerort
from saved import assert_equal, config_of, engine_of, train
from saved import weights as weights_of
from training import keep


def engine_at(stage: int, dtype: str, bucket: int = 300) -> Any:
    config = config_of(stage, dtype, bucket)
    config["zerort"] = {"reduce_at": "micro_batch", "checkpoint": {"overwrite": True}}
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 50
        config["zero_optimization"]["stage3_max_live_parameters"] = 1000
    engine = engine_of(config)
    keep(engine)
    return engine


def weights(engine: Any) -> dict[str, Tensor]:
    with zerort.zero.GatheredParameters(list(engine.module.parameters())):
        return weights_of(engine)


def there_and_back(rank: int, world: int, folder: str, dtype: str) -> dict[str, Tensor]:
    """Stage 2 to 3 and back, with a step more each time; beside it stage 2 alone."""
    alone = engine_at(2, dtype)
    train(alone, rank, world, range(2))
    alone.save_checkpoint(folder, "two")
    train(alone, rank, world, range(2, 4))

    sharded = engine_at(3, dtype, bucket=200)
    sharded.load_checkpoint(folder, "two")
    train(sharded, rank, world, range(2, 3))
    sharded.save_checkpoint(folder, "three")
    before = weights(sharded)

    back = engine_at(2, dtype, bucket=500)
    back.load_checkpoint(folder, "three")
    assert_equal(weights(back), before)
    train(back, rank, world, range(3, 4))
    train(sharded, rank, world, range(3, 4))
    assert_equal(weights(back), weights(alone))
    assert_equal(weights(sharded), weights(alone))
    return before


def elsewhere(rank: int, world: int, folder: str, dtype: str) -> dict[str, Tensor]:
    engine = engine_at(3, dtype)
    engine.load_checkpoint(folder, "three")
    return weights(engine)


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_stage_2_and_stage_3_load_each_others_checkpoints_to_the_bit(
    dtype: str, tmp_path: Path
) -> None:
    before = ranks.run(2, there_and_back, str(tmp_path), dtype)[0]
    for world in (1, 3):
        for found in ranks.run(world, elsewhere, str(tmp_path), dtype):
            assert_equal(found, before)


def evaluate_more_before_saving(rank: int, world: int, folder: str) -> int:
    """Rank 1 evaluates on while rank 0 saves already, and before the engine is given back."""
    engine = engine_at(3, "fp32")
    train(engine, rank, world, range(2))

    def evaluate(times: int) -> None:
        with torch.no_grad():
            for _ in range(times):
                engine(torch.ones(1, 10))

    evaluate(4 * rank)
    engine.save_checkpoint(folder, "here")
    evaluate(3 * rank)
    engine.load_checkpoint(folder, "here")
    train(engine, rank, world, range(2, 3))
    evaluate(3 * rank)
    engine.destroy()
    return engine.global_steps


def test_a_rank_that_evaluates_longer_is_waited_for(tmp_path: Path) -> None:
    assert ranks.run(2, evaluate_more_before_saving, str(tmp_path)) == [3, 3]
