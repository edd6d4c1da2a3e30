"""Ranks that differ at random: in the order of their modules, in how many of them they call and how
often, in how much they evaluate, and in what raises. Nobody hangs, and what is trained is what a
plain module trains.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_stage_3_failures import Bomb, at_block, explode
from torch import Tensor

import ranks
import routes
from catching import assert_told, caught
from routes import Net, engine_over, loss_of
from training import keep
from zerort.errors import StepError

BLOCKS = 3
WORLD = 2


@dataclass(frozen=True)
class Step:
    """One step of all ranks; lists are by rank."""

    orders: tuple[tuple[int, ...], ...]
    """Which blocks are called."""
    evaluations: tuple[int, ...]
    raises: tuple[int, str] | None
    """Rank and place."""


orders = st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=BLOCKS + 1).map(tuple)
same = st.just(tuple(range(BLOCKS)))
by_rank = st.tuples(*[st.one_of(same, same, orders)] * WORLD)
steps = st.builds(
    Step,
    by_rank,
    st.tuples(*[st.integers(0, 2)] * WORLD),
    st.one_of(
        st.none(),
        st.none(),
        st.tuples(st.integers(0, WORLD - 1), st.sampled_from(["forward", "backward"])),
    ),
)
programs = st.lists(st.lists(steps, min_size=3, max_size=5), min_size=4, max_size=4)


def run_all(rank: int, world: int, drawn: list[list[Step]]) -> None:
    for number, program in enumerate(drawn):
        run(rank, program, partly=number % 2 > 0)


def run(rank: int, program: list[Step], *, partly: bool) -> None:
    """With `partly` much of the model is frozen, a layer altogether, and no optimizer has that."""
    torch.manual_seed(0)
    model = Net(BLOCKS)
    for part in (model.inp, *(block.up for block in model.blocks)) if partly else ():  # type: ignore[union-attr]
        part.requires_grad_(False)  # type: ignore[union-attr, operator]
    twin = copy.deepcopy(model)
    engine = engine_over(model, params=[p for p in model.parameters() if p.requires_grad])
    for number, step in enumerate(program):
        model.order = twin.order = lambda _, __, order=step.orders[rank]: list(order)  # type: ignore[assignment]
        with torch.no_grad():
            for _ in range(step.evaluations[rank]):
                engine(routes.data(90 + number, rank))
        x = routes.data(number, rank)
        if step.raises is None:
            engine.backward(loss_of(engine(x)))
            engine.step()
            routes.twin_step(twin, x, lambda loss: loss.backward())  # type: ignore[no-untyped-call]
        else:
            fail(engine, x, rank, *step.raises, block=step.orders[rank][0])
    worst = routes.compare(engine, twin)
    assert worst < 1e-5, worst
    keep(engine)


def fail(engine: Any, x: Tensor, rank: int, culprit: int, where: str, block: int) -> None:
    """One rank raises; the others hear of it at the end of their step."""

    def step() -> None:
        engine.backward(loss_of(engine(x)))
        engine.step()

    if rank != culprit:
        assert_told(caught(step), StepError, f"rank {culprit}", "a bomb in the", where)
        return
    handle = at_block(engine, block, explode if where == "forward" else Bomb.apply)
    error = caught(step)
    handle.remove()
    assert_told(error, ValueError, "a bomb in the", where)
    if where == "backward":
        engine.step()  # void


@settings(max_examples=3, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs)
@pytest.mark.timeout(300)
def test_ranks_that_differ_at_random_train_rightly_and_nobody_hangs(
    drawn: list[list[Step]],
) -> None:
    ranks.run(WORLD, run_all, drawn, timeout=60)
