"""A communicator says what memory reduce-scatters use: pieces may arrive apart from one another,
and several pieces of memory be used in turn. The engine sends from it and sums out of it, as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import ranks
from training import at_stage, train
from zerort.mesh import Comm, GatherMemory, Piece, Work
from zerort.mesh.gloo import GlooComm

GAP = 128


class Counting(Work):
    """Counts starts, and copies what has arrived to where it is looked for."""

    def __init__(self, work: Work, memory: InTurn, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._work, self._memory, self._copies = work, memory, copies
        self._started = False

    def start(self) -> Work:
        self._work.start()
        self._memory.started += not self._started
        self._started = True
        return self

    def is_completed(self) -> bool:
        return self._work.is_completed()

    def wait(self) -> None:
        self._work.wait()
        for to, source in self._copies:
            to.copy_(source)


@dataclass
class Apart:
    memory: InTurn
    comm: Comm
    send: Tensor
    recv: Tensor
    pieces: int
    stride: int
    length: int

    def make(self, *, lost: bool) -> Work:
        dense = torch.zeros(self.pieces * self.length, dtype=self.recv.dtype)
        copies = [
            (self.recv.narrow(0, rank * self.stride, self.length), piece)
            for rank, piece in enumerate(dense.split(self.length))
        ]
        self.memory.used.append(self.send.data_ptr())
        return Counting(self.comm.reduce_scatter(dense, self.send), self.memory, copies)


@dataclass
class InTurn:
    comm: Comm
    turns: int
    started: int = 0
    used: list[int] = field(default_factory=list)

    def scatters(self, piece: Piece) -> list[Apart]:
        world, stride = self.comm.world, piece.length + GAP
        return [
            Apart(
                self,
                self.comm,
                torch.zeros(world * piece.length, dtype=piece.dtype),
                # what lies between pieces is not a number
                torch.full(((world - 1) * stride + piece.length,), float("nan"), dtype=piece.dtype),
                world,
                stride,
                piece.length,
            )
            for _ in range(self.turns)
        ]

    def turn(self) -> int:
        return self.started % self.turns

    def gathers(self, nbytes: int) -> GatherMemory:
        return self.comm.gather_memory(nbytes)


def trained(rank: int, world: int, turns: int, changes: Any) -> tuple[Any, list[list[int]]]:
    made: list[InTurn] = []

    def memory(comm: Comm, pieces: Sequence[Piece]) -> InTurn:
        made.append(InTurn(comm, turns))
        return made[-1]

    if not turns:
        return train(rank, world, "mlp", 2, changes).weights, []
    with patch.object(GlooComm, "scatter_memory", memory):
        weights = train(rank, world, "mlp", 2, changes).weights
    return weights, [each.used for each in made]


@pytest.mark.parametrize(("stage", "wire"), [(0, "bf16"), (2, "fp32")])
def test_pieces_that_arrive_apart_in_memory_used_in_turn_are_summed_to_the_same_bits(
    stage: int, wire: str
) -> None:
    changes = {**at_stage(stage), "zerort": {"wire": wire, "transport": "gloo"}}
    plain = ranks.shared(2, trained, 0, changes)
    other = ranks.shared(2, trained, 2, changes)
    for (expected, _), (got, used) in zip(plain, other, strict=True):
        for step, same in zip(expected, got, strict=True):
            assert all(torch.equal(step[name], same[name]) for name in step)
        for addresses in filter(None, used):
            assert all(one != two for one, two in pairwise(addresses))


def test_a_window_of_one_bucket_uses_one_lane_in_turn() -> None:
    changes = {**at_stage(2), "zerort": {"window": 1, "transport": "gloo"}}
    plain = ranks.shared(2, trained, 0, changes)
    other = ranks.shared(2, trained, 3, changes)
    for (expected, _), (got, used) in zip(plain, other, strict=True):
        assert len([*filter(None, used)]) <= 2  # the order that is learnt makes a second plan
        for step, same in zip(expected, got, strict=True):
            assert all(torch.equal(step[name], same[name]) for name in step)
