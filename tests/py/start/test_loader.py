"""`initialize(training_data=...)`: every sample once an epoch over the ranks, and a position that
can be restored.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ranks
import zerort

SAMPLES = 22


def _initialize(**more: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    data = TensorDataset(torch.arange(SAMPLES, dtype=torch.float32).reshape(-1, 1))
    return zerort.initialize(
        model=nn.Linear(1, 1), training_data=data, **{"config": config, **more}
    )


def _values(batch: list[Tensor]) -> list[int]:
    return [int(value) for value in batch[0].flatten()]


def _two_epochs(rank: int, world: int) -> list[list[list[int]]]:
    _, _, loader, _ = _initialize()
    return [[_values(batch) for batch in loader] for _ in range(2)]


def test_ranks_share_every_epoch_and_each_epoch_is_shuffled_anew() -> None:
    per_rank = ranks.run(2, _two_epochs)
    for epoch in range(2):
        seen = [value for rank in per_rank for batch in rank[epoch] for value in batch]
        assert sorted(seen) == list(range(SAMPLES))
        assert max(len(batch) for rank in per_rank for batch in rank[epoch]) == 3
    assert per_rank[0][0] != per_rank[0][1]


def _interrupted(rank: int, world: int) -> tuple[list[list[int]], list[list[int]]]:
    _, _, first, _ = _initialize()
    for _ in first:
        pass
    going_on = iter(first)
    next(going_on)
    state = json.loads(json.dumps(first.state_dict()))
    _, _, second, _ = _initialize()
    second.load_state_dict(state)
    return [_values(batch) for batch in going_on], [_values(batch) for batch in second]


def test_a_restored_loader_goes_on_in_the_middle_of_the_second_epoch() -> None:
    for rest, restored in ranks.run(2, _interrupted):
        assert len(rest) == 3
        assert rest == restored


def _collated(rank: int, world: int) -> Any:
    _, _, loader, _ = _initialize(collate_fn=len)
    return list(loader)


def test_the_users_collate_function_makes_the_batches() -> None:
    assert ranks.run(1, _collated) == [[3] * 7 + [1]]


def test_the_configuration_may_come_from_the_command_line(tmp_path: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}})
    )
    parser = zerort.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    engine, *_ = zerort.initialize(args=args, model=nn.Linear(2, 1))
    assert engine.train_batch_size() == 2
    assert engine.get_lr() == [0.5]
    with pytest.raises(zerort.ConfigError, match="both given"):
        zerort.initialize(args=args, model=nn.Linear(2, 1), config={"train_batch_size": 2})
