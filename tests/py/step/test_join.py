"""Ranks that run out of data at different micro-batches: nobody hangs, and a step's gradient is the
mean over what was given.

The weights are minus the sum of the steps' gradients (see `Terms`). Every rank gives the same
coefficients in a micro-batch, its number, so the mean over those that were given is that number
whoever gave it.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import ranks
from catching import assert_told, caught
from models import Terms
from terms import engine_over_terms, step_with, weights
from training import at_stage, keep
from zerort.errors import CommError, StepError
from zerort.step.accumulation import Accumulation, Counters, Window
from zerort.step.join import Next, Row, read

pytestmark = pytest.mark.timeout(120)

LIMIT = 40.0
WAYS = [*product([0, 1, 2, 3], [1, 3], ["fp32", "fp16", "direct"]), (2, 3, "boundary")]
"""Stage, accumulation steps, and how a micro-batch goes back; "boundary" reduces once a window."""


def _engine(stage: int, gas: int, way: str, timeout: float = 20, **more: Any) -> Any:
    changes: dict[str, Any] = {**at_stage(stage), "zerort": {"timeout": timeout}}
    if way == "fp16":
        changes["fp16"] = {"enabled": True, "loss_scale": 4.0}
    if way == "boundary":
        changes["zerort"]["reduce_at"] = "boundary"
    return engine_over_terms(changes, gas, **more)


def _give(engine: Any, way: str, value: float) -> None:
    loss = engine(value, 2 * value)
    loss.backward() if way == "direct" else engine.backward(loss)
    engine.step()


def _uneven(rank: int, world: int, counts: list[int], by_initial: bool) -> list[tuple[Any, ...]]:
    found = []
    for stage, gas, way in WAYS:
        model = Terms()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        engine = _engine(stage, gas, way, model=model, optimizer=optimizer, lr_scheduler=schedule)
        with engine.join(divide_by_initial_world_size=by_initial):
            for micro in range(counts[rank]):
                _give(engine, way, float(micro + 1))
        counts_after = (engine.global_steps, engine.micro_steps, schedule.last_epoch)
        samples = engine.global_samples
        joined = weights(engine)
        for _ in range(gas):  # the next epoch begins on all ranks with a window of its own
            _give(engine, way, 1.0)
        after = weights(engine)
        found.append(
            (
                joined,
                counts_after,
                samples,
                tuple(b - a for a, b in zip(joined, after, strict=True)),
            )
        )
        keep(engine)
    return found


def _expected(counts: list[int], gas: int, by_initial: bool) -> tuple[float, int, int]:
    """(sum of the steps' gradients of `a`, steps, samples)."""
    total, steps, samples = 0.0, 0, 0
    for start in range(0, max(counts), gas):
        given = [m + 1 for count in counts for m in range(start, min(start + gas, count))]
        total += sum(given) / (len(counts) * gas if by_initial else len(given))
        steps += 1
        samples += len(given)
    return total, steps, samples


@pytest.mark.parametrize("by_initial", [False, True])
@pytest.mark.parametrize(
    "counts",
    [
        [2, 5],
        [4, 1],
        [0, 2],
        *(pytest.param(more, marks=pytest.mark.slow) for more in ([3, 3], [2, 5, 4])),
    ],
    ids=str,
)
def test_a_rank_out_of_data_completes_the_steps_of_the_others(
    counts: list[int], by_initial: bool
) -> None:
    results = ranks.shared(len(counts), _uneven, counts, by_initial, timeout=90)
    for (stage, gas, way), of_ranks in zip(WAYS, zip(*results, strict=True), strict=True):
        total, steps, samples = _expected(counts, gas, by_initial)
        longest = -(-max(counts) // gas) * gas if max(counts) % gas == 0 else None
        for (a, b), (global_steps, micro_steps, epoch), seen, step in of_ranks:
            where = f"stage {stage}, {gas} steps, {way}"
            near = 4e-3 if way == "fp16" else 1e-6
            assert (a, b) == pytest.approx((-total, -2 * total), rel=near), where
            assert (global_steps, epoch, seen) == (steps, steps, samples), where
            assert longest is None or micro_steps == longest, where
            assert step == pytest.approx((-1.0, -2.0), rel=10 * near), where
        assert len({(found[0], found[1]) for found in of_ranks}) == 1, "ranks ended apart"


def _two_backwards(rank: int, world: int, stage: int) -> tuple[Any, int]:
    """Two passes a micro-batch, which a finished rank cannot know beforehand."""
    engine = _engine(stage, 1, "fp32")
    with engine.join():
        for _ in range(1 + 2 * rank):
            engine.backward(engine(1.0, 2.0))
            engine.backward(engine(2.0, 3.0))
            engine.step()
    return weights(engine), engine.global_steps


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_finished_rank_follows_any_number_of_backwards(stage: int) -> None:
    assert ranks.shared(2, _two_backwards, stage, timeout=LIMIT) == [((-9.0, -15.0), 3)] * 2


def _late_and_overflowing(rank: int, world: int) -> list[Any]:
    """A gradient that comes late makes all ranks run the list once more; an overflow is skipped."""
    found = []
    for value in (float("inf"), 1.0):
        engine = _engine(2, 1, "fp32")
        with engine.join():
            for step in range(1 + 2 * rank):
                engine.backward(engine(1.0, 1.0 if step else value))
                if rank == 1 and step == 2:
                    engine.module.b.grad = torch.ones(4)
                engine.step()
        found.append((weights(engine), engine.global_steps, engine.skipped_steps))
    return found


def test_a_finished_rank_takes_part_in_further_passes_and_in_skipped_steps() -> None:
    late = -3.0 - 1.0  # what was written is added to the only rank's gradient
    assert (
        ranks.shared(2, _late_and_overflowing, timeout=LIMIT)
        == [[((-2.0, -3.0), 3, 1), ((-3.0, late), 3, 0)]] * 2
    )


def _throwing(rank: int, world: int, counts: list[int]) -> tuple[Any, ...]:
    engine = _engine(1, 1, "fp32")

    def train() -> None:
        with engine.join(throw_on_early_termination=True):
            for _ in range(counts[rank]):
                _give(engine, "fp32", 1.0)

    return caught(train), weights(engine), step_with(engine, 1.0, 1.0)


def test_early_termination_can_be_an_error_on_all_ranks() -> None:
    for error, before, after in ranks.shared(2, _throwing, [1, 3], timeout=LIMIT):
        assert_told(error, StepError, "rank 0 is out of data before the others")
        assert (before, after) == ((-1.0, -2.0), (-2.0, -3.0))
    assert [each[0] for each in ranks.shared(2, _throwing, [2, 2], timeout=LIMIT)] == [None, None]


class _Breaking(Terms):
    def forward(self, a: float, b: float, breaks: bool = False) -> Tensor:  # type: ignore[override]
        loss = super().forward(a, b)
        if breaks:
            loss.register_hook(_break)
        return loss


def _break(_: Tensor) -> None:
    raise ArithmeticError("the user's own backward")


def _raise_in(rank: int, world: int, where: str, stage: int, gas: int) -> tuple[Any, ...]:
    engine = _engine(stage, gas, "fp32", model=_Breaking())

    def train() -> None:
        with engine.join():
            for micro in range(1 + 4 * rank):
                bad = rank == 1 and micro == 1
                engine.backward(engine(1.0, 2.0, breaks=bad and where == "backward"))
                if bad and where == "user code":
                    raise LookupError("the user's own code")
                if bad and where == "saving":
                    engine.save_checkpoint("never")
                engine.step()

    error = caught(train)
    before = weights(engine)
    for _ in range(gas):
        step_with(engine, 1.0, 2.0)
    return error, tuple(b - a for a, b in zip(before, weights(engine), strict=True))


@pytest.mark.parametrize(
    ("stage", "gas"),
    [
        (2, 1),
        (1, 2),
        (3, 1),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in ((1, 1), (2, 2), (3, 2))),
    ],
)
@pytest.mark.parametrize("where", ["backward", "user code", "saving"])
def test_an_exception_that_leaves_the_context_is_raised_on_all(
    where: str, stage: int, gas: int
) -> None:
    kind, words = {
        "backward": (ArithmeticError, "the user's own backward"),
        "user code": (LookupError, "the user's own code"),
        "saving": (StepError, "inside join()"),
    }[where]
    finished, culprit = ranks.shared(2, _raise_in, where, stage, gas, timeout=LIMIT)
    assert_told(finished[0], StepError, "rank 1", words)
    assert_told(culprit[0], kind, words)
    assert finished[1] == culprit[1] == (-1.0, -2.0)


def _go_on_after(rank: int, world: int) -> tuple[Any, ...]:
    """Rank 1 catches what its backward raised within the context, and goes on."""
    engine = _engine(2, 1, "fp32", model=_Breaking())
    errors = []
    with engine.join():
        for micro in range(1 + 3 * rank):
            errors.append(
                caught(lambda m=micro: engine.backward(engine(1.0, 2.0, breaks=rank == m == 1)))
            )
            if errors[-1] is None:
                engine.step()
    return weights(engine), engine.micro_steps, [type(error).__name__ for error in errors]


def test_a_failure_that_is_caught_within_the_context_ends_no_one() -> None:
    finished, other = ranks.shared(2, _go_on_after, timeout=LIMIT)
    assert finished[:2] == other[:2] == ((-3.0, -6.0), 4)
    assert other[2] == ["NoneType", "ArithmeticError", "NoneType", "NoneType"]


def _part_ways(rank: int, world: int) -> Any:
    engine = _engine(2, 1, "fp32")

    def train() -> None:
        with engine.join():
            engine.backward(engine(1.0, 1.0))
            if rank == 0:
                engine.backward(engine(1.0, 1.0))
            engine.step()

    return caught(train), step_with(engine, 1.0, 2.0)


def test_ranks_with_different_numbers_of_backwards_are_told_so() -> None:
    for error, after in ranks.shared(2, _part_ways, timeout=LIMIT):
        assert_told(error, StepError, "rank 0 begins a backward and rank 1 is at its step")
        assert after == (-1.0, -2.0)


def _nest(rank: int, world: int) -> Any:
    engine = _engine(1, 1, "fp32")
    with engine.join():
        return caught(lambda: engine.join().__enter__())


def test_one_context_is_enough() -> None:
    assert_told(ranks.shared(1, _nest)[0], StepError, "join() inside join()")


def _die(rank: int, world: int) -> Any:
    engine = _engine(2, 1, "fp32", timeout=3)
    if rank == 1:
        step_with(engine, 1.0, 1.0)
        raise SystemExit(3)

    def train() -> None:
        with engine.join():
            _give(engine, "fp32", 1.0)
            _give(engine, "fp32", 1.0)

    return caught(train)


def test_a_rank_that_dies_is_no_rank_out_of_data() -> None:
    survivor, _ = ranks.attempt(2, _die, timeout=LIMIT)
    assert isinstance(survivor, ranks.Returned), survivor
    assert_told(survivor.value, CommError, "rank 1")


ROLLS: dict[str, tuple[list[Next], bool, str | None]] = {
    "together": ([Next.PASS, Next.PASS], False, None),
    "a pass to serve": ([Next.PASS, Next.DONE], False, None),
    "a vote to serve": ([Next.DONE, Next.VOTE], False, None),
    "all out of data": ([Next.DONE, Next.DONE], True, None),
    "one out of data": ([Next.VOTE, Next.DONE], True, "rank 1 is out of data"),
    "apart": ([Next.VOTE, Next.DONE, Next.PASS], False, "rank 2 begins a backward and rank 0"),
}


@pytest.mark.parametrize("name", ROLLS)
def test_a_roll_is_read_alike_by_all(name: str) -> None:
    coming, throws, expected = ROLLS[name]
    told = read([Row(each, 0, 0, 0.0) for each in coming], throws=throws)
    assert (told is None) if expected is None else expected in (told or "")


def test_a_window_ends_where_the_longest_one_does() -> None:

    place = Accumulation(4, True, Counters(micro_steps=6), Window(taken=2))
    place.end_window(4)
    assert (place.counters.micro_steps, place.origin, place.window) == (8, 8, Window())
