"""The table of cases on GPUs, two ranks over NCCL: near the twin at every stage, and every stage
gives the same bits, also where streams are late. Skipped without a GPU. Two ranks on one GPU take
turns, so that a case takes ten seconds there.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from cases import CASES, DRAWN
from gpus import late, nccl
from table import LATE, REFUSED, Batches, at_stage_3
from training import Config, History, assert_same, digest, run, twin_of

NEAR = 1e-4
"""Norm-relative: a GPU's kernels are not the twin's."""

TURNS = {"rprop", "lion", "lion_decayed"}
"""Their steps turn on the sign of a gradient, which a last bit can change."""

ROUNDED = {"mixed_dtypes"}
"""Stage 0 sends means once more, and so rounds them once more, in the dtype of parameters."""

NAMES = [name for name in (*CASES, *DRAWN) if name not in TURNS | ROUNDED]


ACCUMULATED = ["gpt_clipped", "tied", "unused_on_one_rank", "two_backwards", "held_in_no_sync"]
JOBS = [*((name, 1) for name in NAMES), *((name, 3) for name in ACCUMULATED)]


def _at(stage: int, reduce_at: str) -> Config:
    return {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 150},
        "zerort": {"reduce_at": reduce_at},
    }


AT_BOUNDARY = {f"stage_{stage}": _at(stage, "boundary") for stage in (0, 1, 2)}
AT_MICRO_BATCH = {
    "stage_2_each": _at(2, "micro_batch"),
    "one_unit": at_stage_3(1, bucket=1),
    "some_units": at_stage_3(1500),
}
STAGE_3 = {"one_unit", "some_units"}


def _ways(name: str) -> dict[str, Config]:
    ways = AT_BOUNDARY | AT_MICRO_BATCH
    return {
        way: config for way, config in ways.items() if name not in REFUSED or way not in STAGE_3
    }


def _on_time_and_late(
    rank: int, world: int, name: str, gas: int, variants: list[Config]
) -> list[History]:
    histories = []
    for when in (nullcontext(), late(rank)):
        with when:
            for variant in variants:
                history, engine = run(rank, name, gas, variant)
                engine.destroy()
                histories.append(history)
    return histories


_table = Batches(
    2,
    {(name, gas): (name, gas, [*_ways(name).values()]) for name, gas in JOBS},
    1,
    _on_time_and_late,
)


def _found(name: str, gas: int) -> dict[tuple[str, str], list[History]]:
    keys = [(way, when) for when in ("on time", "late") for way in _ways(name)]
    return dict(zip(keys, _table[name, gas], strict=True))


@nccl
@pytest.mark.parametrize(("name", "gas"), JOBS)
def test_two_gpu_ranks_train_like_the_twin(name: str, gas: int) -> None:
    expected = twin_of(name, 2, gas)
    for histories in _found(name, gas).values():
        assert_same(histories, expected, NEAR)


@nccl
@pytest.mark.parametrize("together", [AT_BOUNDARY, AT_MICRO_BATCH], ids=["boundary", "each"])
@pytest.mark.parametrize(("name", "gas"), JOBS)
def test_neither_stage_nor_lateness_changes_a_bit(
    name: str, gas: int, together: dict[str, Config]
) -> None:
    found = {
        key: {digest(history) for history in histories}
        for key, histories in _found(name, gas).items()
        if key[0] in together and not (name in LATE | set(DRAWN) and key[0] in STAGE_3)
    }
    assert len(set().union(*found.values())) == 1, found
