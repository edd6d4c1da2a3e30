"""What the log says: nothing is ignored in silence, and what was asked for is told, by rank 0
alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ranks
import zerort
from logged import log_lines
from models import Terms
from terms import engine_over_terms, step_with


def _lines(rank: int, world: int, changes: dict[str, Any], act: Callable[[Any], Any]) -> list[str]:
    lines = log_lines()
    act(engine_over_terms(changes))
    return lines


def _nothing(engine: Any) -> None:
    pass


def _four_steps(engine: Any) -> None:
    for _ in range(4):
        step_with(engine, 1.0, 1.0)


def test_keys_without_effect_are_listed_once_by_rank_0() -> None:
    changes = {"zero_optimization": {"overlap_comm": True, "allgather_bucket_size": 1000}}
    first, second = ranks.shared(2, _lines, changes, _nothing)
    assert second == []
    (line,) = first
    assert (
        "zero_optimization.overlap_comm" in line
        and "zero_optimization.allgather_bucket_size" in line
    )


def test_memory_that_ranks_share_is_told_of_where_there_are_several() -> None:
    changes = {"zerort": {"transport": "shared"}, **CLIPPED}
    (alone,) = ranks.shared(1, _lines, changes, _nothing)
    lines, others = ranks.shared(2, _lines, changes, _nothing)
    assert not [line for line in alone + others if "this host share" in line]
    assert len([line for line in lines if "this host share" in line]) == 1


def test_a_clipping_norm_that_nobody_gave_is_said_once() -> None:
    lines, _ = ranks.shared(2, _lines_with_default_clipping)
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
    lines, others = ranks.shared(2, _lines_with_a_layer_left_out)
    assert lines == ["not in the optimizer, so never updated: b"]
    assert others == []


WHERE = "gradients leave .grad for their bucket"
CLIPPED = {"gradient_clipping": 1000.0}
"""Without it each rank that has a log is warned of that."""


def test_steps_per_print_prints_every_so_many_steps() -> None:
    first, second = ranks.shared(2, _lines, {"steps_per_print": 2, **CLIPPED}, _four_steps)
    assert second == []
    told = [line for line in first if not line.startswith(WHERE)]
    assert [line.split(",")[0] for line in told] == ["step=2", "step=4"]
    assert "lr=[1.0]" in told[0]


def test_wall_clock_breakdown_tells_each_part_of_each_step() -> None:
    changes = {"wall_clock_breakdown": True, **CLIPPED}
    first, second = ranks.shared(2, _lines, changes, _four_steps)
    assert second == []
    told = [line for line in first if not line.startswith(WHERE)]
    assert len(told) == 4
    for part in ("forward", "backward", "optimizer", "publish"):
        assert all(f"{part}: " in line for line in told)


def test_dump_state_shows_the_configuration_with_its_defaults() -> None:
    (line,), _ = ranks.shared(2, _lines, {"dump_state": True}, _nothing)
    assert '"gradient_allreduce_op": "mean"' in line


# What is shown where nobody has configured logging, and where somebody has


def _shown(rank: int, world: int, before: str, after: str) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        exec(before)
        model = Terms()
        config = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 1}
        engine, *_ = zerort.initialize(
            model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), lr=1.0)
        )
        exec(after)
        step_with(engine, 1.0, 1.0)
        logging.getLogger("zerort").warning("a worry")
    return shown.getvalue()


def _stderr(before: str = "", after: str = "") -> str:
    (shown,) = ranks.shared(1, _shown, before, after)
    return str(shown)


def test_progress_is_shown_where_nobody_has_configured_logging() -> None:
    shown = _stderr()
    assert shown.count("gradient_clipping is not given") == 1
    assert shown.count("zerort: step=1, skipped=0") == shown.count("zerort: a worry") == 1


@pytest.mark.parametrize(
    ("configure", "progress"),
    [
        ("logging.basicConfig(format='mine %(message)s')", 0),
        ("logging.basicConfig(format='mine %(message)s', level=logging.INFO)", 1),
        ("logging.getLogger('zerort').addHandler(logging.StreamHandler())", 0),
        ("logging.getLogger('zerort').setLevel(logging.WARNING)", 0),
        ("logging.getLogger('zerort').setLevel(logging.INFO)", 1),
        ("logging.getLogger().setLevel(logging.ERROR)", 0),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_the_user_configures_wins_before_the_start_and_after(
    when: str, configure: str, progress: int
) -> None:
    shown = _stderr(**{when: configure})
    # `root.setLevel` alone, after the start, comes too late for the level that was set for it
    late = when == "after" and configure.startswith("logging.getLogger().")
    assert shown.count("step=1") == (1 if late else progress)
    assert shown.count("a worry") == (0 if "ERROR" in configure and not late else 1)


def _levels(rank: int, world: int) -> tuple[int, bool]:
    engine_over_terms()
    engine_over_terms()
    logger = logging.getLogger("zerort")
    return logger.level, len(logger.handlers) == len(logger.filters) == 1


def test_only_rank_0_shows_progress_and_a_second_engine_changes_nothing() -> None:
    assert ranks.shared(2, _levels) == [(logging.INFO, True), (logging.WARNING, True)]
