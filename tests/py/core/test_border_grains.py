"""Grains and exchanges through the border: Python gets what the core says, an all-to-all along it
brings whole matrices to their owners, and a layout of whole matrices can be restored.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zerort import _core
from zerort.errors import PlanError

# Nine matrices do not divide by two ranks: 10 % more is too little, 12 % is enough.
MATRICES = [(1024, "f32", 0, 0)] * 9
MODEL = [*MATRICES, (700, "f32", 1, 0), (512, "bf16", 0, 0), (100, "bf16", 0, 0)]
GRAINS = [*["whole"] * 9, 128, "whole", "element"]


def plan(**changes: Any) -> _core.Plan:
    options: dict[str, Any] = {
        "params": MODEL,
        "world": 2,
        "stage": 2,
        "cap_bytes": 1 << 20,
        "grains": GRAINS,
    } | changes
    return _core.Plan(options.pop("params"), **options)


def ways(made: _core.Plan) -> list[tuple[int | str, str | None, list[int]]]:
    return [(bucket.grain, bucket.way, sorted(bucket.params)) for bucket in made.buckets]


def filled(made: _core.Plan, rank: int) -> dict[int, Tensor]:
    """A rank's shards; each element says which of which parameter it is."""
    shards = {bucket.id: torch.zeros(bucket.shard_numel) for bucket in made.buckets}
    for bucket in made.buckets:
        for one in made.fragments(bucket.id, rank):
            into = shards[bucket.id].narrow(0, one.shard_start, one.length)
            into.copy_(element(one.param, one.param_start, one.length))
    return shards


def element(param: int, start: int, length: int) -> Tensor:
    return torch.arange(start, start + length) + 10_000.0 * (1 + param)


def test_a_bucket_says_its_grain_and_the_way_of_its_gradients() -> None:
    matrices = list(range(9))
    rest = [("element", None, [11]), ("whole", "exchanged", [10]), (128, None, [9])]
    assert ways(plan()) == [*rest, ("whole", "exchanged", matrices)]
    assert ways(plan(whole_padding=0.12))[-1] == ("whole", "owned", matrices)
    assert ways(plan(whole_padding=float("inf")))[1] == ("whole", "owned", [10])
    assert {way for _, way, _ in ways(plan(stage=0))} == {None}
    assert {way for _, way, _ in ways(plan(grains=None))} == {None}


def test_owners_and_what_they_cost() -> None:
    made = plan()
    owners = [made.owner(param) for param in range(12)]
    assert (owners[9], owners[11]) == (None, None)
    assert sorted(made.costs) == [4608, 5120], "by default a matrix costs its length"
    costs = [0, 0]
    for numel, owner in zip([n for n, *_ in MODEL], owners, strict=True):
        costs[owner or 0] += numel if owner is not None else 0
    assert costs == made.costs
    dear = plan(costs=[2**62] * 12)
    assert sum(dear.costs) == 10 * 2**62, "more than 64 bits hold"
    with pytest.raises(PlanError, match="unknown parameter 12"):
        made.owner(12)
    with pytest.raises(PlanError, match="unknown parameter -1"):
        made.owner(-1)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_rows_bring_matrices_to_their_owners_and_back(world: int) -> None:
    made = plan(world=world, whole_padding=0.0)
    ranks = range(world)
    shards = [filled(made, rank) for rank in ranks]
    exchanges = [made.exchanges(rank) for rank in ranks]
    assert len({tuple(e.dtype for e in found) for found in exchanges}) == 1
    for at in range(len(exchanges[0])):
        own = [found[at] for found in exchanges]
        sent = [
            torch.cat([shards[r][b].narrow(0, s, n) for b, _, s, _, n in own[r].send] or [empty()])
            for r in ranks
        ]
        assert [part.numel() for part in sent] == [sum(one.send_splits) for one in own]
        parts = [part.split(one.send_splits) for part, one in zip(sent, own, strict=True)]
        for rank, one in enumerate(own):
            room = torch.zeros(one.room)
            for bucket, _, shard_start, room_start, length in one.kept:
                kept = shards[rank][bucket].narrow(0, shard_start, length)
                room.narrow(0, room_start, length).copy_(kept)
            arrived = [parts[peer][rank] for peer in ranks]
            assert [part.numel() for part in arrived] == one.recv_splits
            rows = torch.cat(arrived).split([length for *_, length in one.recv])
            for (_, _, _, room_start, length), row in zip(one.recv, rows, strict=True):
                room.narrow(0, room_start, length).copy_(row)
            for param, start in one.places:
                numel = MODEL[param][0]
                assert made.owner(param) == rank
                assert torch.equal(room.narrow(0, start, numel), element(param, 0, numel))
    exchanged = [b for b in made.buckets if b.way == "exchanged"]
    placed = [param for found in exchanges for one in found for param, _ in one.places]
    assert sorted(placed) == sorted(param for bucket in exchanged for param in bucket.params)


def empty() -> Tensor:
    return torch.zeros(0)


def test_exchanges_of_a_rank_that_is_not_there() -> None:
    for rank in (2, -1):
        with pytest.raises(PlanError, match=f"unknown rank {rank}"):
            plan().exchanges(rank)


@pytest.mark.parametrize("padding", [0.0, 10.0])
@pytest.mark.parametrize("world", [1, 3, 4])
def test_a_layout_of_whole_matrices_is_restored_and_resharded(world: int, padding: float) -> None:
    source = plan(whole_padding=padding)
    layouts = [(bucket.params, bucket.offsets, bucket.numel) for bucket in source.buckets]
    written = _core.Plan.restore(MODEL, layouts, world=2, stage=2)
    target = plan(world=world, whole_padding=padding)
    before = [filled(source, rank) for rank in range(2)]
    there = carried(written, target, before)
    expected = [filled(target, rank) for rank in range(world)]
    assert all(same(one, other) for one, other in zip(there, expected, strict=True))
    back = carried(target, written, there)
    assert all(same(one, other) for one, other in zip(back, before, strict=True))


def carried(
    source: _core.Plan, target: _core.Plan, shards: list[dict[int, Tensor]]
) -> list[dict[int, Tensor]]:
    moved = []
    for rank in range(target.world):
        moved.append({b.id: torch.zeros(b.shard_numel) for b in target.buckets})
        for b in target.buckets:
            rows = _core.reshard(source, target, bucket=b.id, rank=rank, came_from=b.params)
            for start, source_rank, source_bucket, source_start, length in rows:
                piece = shards[source_rank][source_bucket].narrow(0, source_start, length)
                moved[-1][b.id].narrow(0, start, length).copy_(piece)
    return moved


def same(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_rank_that_owns_nothing_has_a_shard_of_padding() -> None:
    made = plan(params=[(300, "f32", 0, 0)], grains=["whole"], world=3, whole_padding=9.0)
    (bucket,) = made.buckets
    assert (bucket.way, bucket.shard_numel, made.owner(0)) == ("owned", 384, 0)
    assert [len(made.fragments(0, rank)) for rank in range(3)] == [1, 0, 0]
    assert made.costs == [300, 0, 0]


def test_plans_without_grains_have_the_digest_they_had() -> None:
    plain = plan(grains=None).digest
    assert plan(grains=["element"] * 12).digest == plain
    assert plan(grains=None, costs=[7] * 12, whole_padding=0.5).digest == plain
    assert plan().digest != plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grains": ["row"] * 12}, 'a grain can not be "row"'),
        ({"grains": [0] * 12}, "a grain can not be 0"),
        ({"grains": [-5] * 12}, "a grain can not be -5"),
        ({"grains": ["whole"]}, "one entry for each of 12 parameters, got 1"),
        ({"costs": [1] * 13}, "one entry for each of 12 parameters, got 13"),
        ({"whole_padding": -0.1}, "whole_padding can not be -0.1"),
        ({"whole_padding": float("nan")}, "whole_padding can not be NaN"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(**changes)
