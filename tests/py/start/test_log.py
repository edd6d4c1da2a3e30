"""What the log says: nothing is ignored in silence, and what was asked for is told, by rank 0
alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

import ranks
import zerort
from models import Terms
from terms import engine_over_terms, step_with


def _lines(rank: int, world: int, changes: dict[str, Any], act: Callable[[Any], Any]) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zerort").addHandler(handler)
    act(engine_over_terms(changes))
    return lines


def _nothing(engine: Any) -> None:
    pass


def _four_steps(engine: Any) -> None:
    for _ in range(4):
        step_with(engine, 1.0, 1.0)


def test_keys_without_effect_are_listed_once_by_rank_0() -> None:
    changes = {"zero_optimization": {"overlap_comm": True, "allgather_bucket_size": 1000}}
    first, second = ranks.run(2, _lines, changes, _nothing)
    assert second == []
    (line,) = first
    assert (
        "zero_optimization.overlap_comm" in line
        and "zero_optimization.allgather_bucket_size" in line
    )


def test_a_clipping_norm_that_nobody_gave_is_said_once() -> None:
    lines, _ = ranks.run(2, _lines_with_default_clipping)
    assert [line for line in lines if "gradient_clipping" in line] == [
        "gradient_clipping is not given: gradients are clipped to norm 1"
    ]


def _lines_with_default_clipping(rank: int, world: int) -> list[str]:
    def act(_: Any) -> None:
        model = Terms()
        config = {"train_micro_batch_size_per_gpu": 1}
        zerort.initialize(
            model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), lr=1.0)
        )

    return _lines(rank, world, {}, act)


def _lines_with_a_layer_left_out(rank: int, world: int) -> list[str]:
    model = Terms()
    optimizer = torch.optim.SGD([model.a], lr=1.0)
    return _lines(rank, world, {}, lambda _: engine_over_terms(model=model, optimizer=optimizer))


def test_parameters_that_no_optimizer_updates_are_named_once() -> None:
    lines, others = ranks.run(2, _lines_with_a_layer_left_out)
    assert lines == ["not in the optimizer, so never updated: b"]
    assert others == []


def test_steps_per_print_prints_every_so_many_steps() -> None:
    first, second = ranks.run(2, _lines, {"steps_per_print": 2}, _four_steps)
    assert second == []
    assert [line.split(",")[0] for line in first] == ["step=2", "step=4"]
    assert "lr=[1.0]" in first[0]


def test_wall_clock_breakdown_tells_each_part_of_each_step() -> None:
    first, second = ranks.run(2, _lines, {"wall_clock_breakdown": True}, _four_steps)
    assert second == []
    assert len(first) == 4
    for part in ("forward", "backward", "optimizer", "publish"):
        assert all(f"{part}: " in line for line in first)


def test_dump_state_shows_the_configuration_with_its_defaults() -> None:
    (line,), _ = ranks.run(2, _lines, {"dump_state": True}, _nothing)
    assert '"gradient_allreduce_op": "mean"' in line
