"""Owners of whole parameters beside one process: Adafactor's weights are its weights, and Muon's
products are shared evenly among the ranks.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole import ADAFACTOR, counted, engine_of, flat, seeded, tokens, train

import ranks
import zerort
from blocks import BlockState
from reference import Moment
from zerort.optim.muon import flops

RUNS = [*product((1, 2, 3), (1, 3), ("owned",)), (1, 3, "exchanged"), (3, 1, "exchanged")]
"""Stages, micro-batches, and the way of matrices."""
FROZEN = 1
"""The step in which a layer is frozen."""


def weights_after(rank: int, world: int) -> list[Tensor]:
    found = []
    for stage, accumulation, way in RUNS:
        engine = engine_of(stage, ADAFACTOR, accumulation, way)
        for step in range(3):
            engine.module.tall.weight.requires_grad_(step != FROZEN)
            train(engine, rank, 1, step)
        found.append(flat(engine))
        engine.destroy()
    return found


def alone(world: int, accumulation: int) -> Tensor:
    """The weights of one process over all ranks' data."""
    model = seeded()
    optimizer = torch.optim.Adafactor(model.parameters(), **ADAFACTOR["params"])
    for step in range(3):
        model.tall.weight.requires_grad_(step != FROZEN)
        for rank, micro in product(range(world), range(accumulation)):
            (model(tokens(Moment(rank, step, micro))) / (world * accumulation)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def test_adafactor_ends_where_one_process_ends_but_for_the_order_of_sums() -> None:
    start = torch.cat([parameter.detach().reshape(-1) for parameter in seeded().parameters()])
    found = ranks.shared(2, weights_after)
    for at, (stage, accumulation, way) in enumerate(RUNS):
        expected = alone(2, accumulation)
        moved = (expected - start).abs().max()
        assert moved > 0.01
        for rank in found:
            # roundings of small gradients grow when they are divided by their own root mean square
            off = (rank[at] - expected).abs().max()
            assert off <= 2e-4 * moved, (stage, accumulation, way, off / moved)


class Mixed(nn.Module):
    """Matrices of as many elements each: square ones, which are dear, between thin ones."""

    SQUARE, THIN = (48, 48), (8, 288)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = [self.SQUARE, self.THIN] * 4 + [self.THIN] * 4
        self.matrices = nn.ParameterList(torch.randn(shape) / 48 for shape in shapes)

    def forward(self, scale: Tensor) -> Tensor:
        return scale * sum(matrix.square().sum() for matrix in self.matrices)


def products(rank: int, world: int, stage: int) -> tuple[list[int], int]:
    """What each orthogonalisation of this rank takes, in two boundaries, and buckets."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Muon", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6},
    }
    engine = zerort.initialize(model=Mixed(), config=config)[0]
    with counted() as seen:
        for _ in range(2):
            engine.backward(engine(torch.tensor(1.0 + rank)))
            engine.step()
    buckets = len(engine._parts.reduction.plan.buckets)
    engine.destroy()
    return [flops(shape, 5) for shape in seen], buckets


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is torch 2.9's")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_ranks_products_are_the_mean_and_at_most_a_matrix_of_each_bucket(stage: int) -> None:
    found = ranks.shared(2, products, stage)
    work = [sum(seen) for seen, _ in found]
    square, thin = flops(Mixed.SQUARE, 5), flops(Mixed.THIN, 5)
    assert sum(work) == 2 * (4 * square + 8 * thin)  # each once a boundary
    assert all(buckets == 1 for _, buckets in found)
    # every rank has as many elements: that no border cuts a matrix leaves the rest to their cost
    assert max(work) <= sum(work) / 2 + 2 * square


def with_blocks(rank: int, world: int) -> list[Tensor]:
    ends = []
    for stage, way in ((0, "owned"), (1, "owned"), (2, "exchanged"), (3, "exchanged")):
        engine = engine_of(stage, partial(BlockState, least=0), way=way)
        train(engine, rank, 3)
        ends.append(flat(engine))
        engine.destroy()
    return ends


def test_state_in_blocks_is_that_of_one_process_at_every_stage() -> None:
    """A border within a block, or a block across two parameters, would round otherwise."""
    for whole, *sharded in ranks.shared(2, with_blocks):
        assert all(torch.equal(end, whole) for end in sharded)
