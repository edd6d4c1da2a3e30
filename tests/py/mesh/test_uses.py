"""Collectives over shared memory, of two ranks that are one process here: what is read when, and
who waits for whom.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from zerort import _core
from zerort.errors import CommError, StepError
from zerort.mesh.comm import Piece
from zerort.mesh.segments import PAGE
from zerort.mesh.uses import Gather, Mapped, Memory, Pool, Scatters

STEP = 256
"""Bytes of a turn."""


@dataclass
class Rank:
    rank: int
    ranks: tuple[int, ...] = (0, 1)
    world: int = 2

    def patience(self) -> float:
        return 0.1

    def gone(self, rank: int) -> str | None:
        return None

    def failure(self, what: str, error: Exception) -> CommError:
        return CommError(f"rank {self.rank}: {what}: {error}")


def memories(count: int) -> list[list[Memory]]:
    """By rank, so many memories of one segment."""
    length = _core.Segment.length(world=2, channels=count, memory=PAGE)
    file = os.memfd_create("two-ranks")
    os.ftruncate(file, length)
    try:
        both = [
            Mapped(Rank(rank), _core.Segment(file, rank=rank, world=2, channels=count, memory=PAGE))
            for rank in (0, 1)
        ]
    finally:
        os.close(file)
    return [
        [Memory(mapped, number, 2 * STEP * number, STEP) for number in range(count)]
        for mapped in both
    ]


def buffer(rank: int, value: float) -> Tensor:
    """(8,), of which this rank's half is `value` and the other's is to come."""
    whole = torch.full((8,), -1.0)
    whole[4 * rank : 4 * rank + 4] = value
    return whole


def whole(first: float, second: float) -> list[float]:
    return [first] * 4 + [second] * 4


def test_gathers_in_rotation_keep_what_was_not_read() -> None:
    pools = [Pool(each) for each in memories(2)]
    ahead = [buffer(0, 1.0 + number) for number in range(9)]
    behind = [buffer(1, 10.0 + number) for number in range(9)]
    there = [pools[1].make(each, lost=False) for each in behind]
    here = [pools[0].make(each, lost=False) for each in ahead]
    for number in range(5):  # nothing is landed in between
        there[number].start()
        here[number].start()
    for work in here[2:3] + there[2:3]:  # what had made way, when its memory is another's
        work.start().wait()
        work.taken()
    for number in range(5, 9):
        there[number].start()
        here[number].start()
    # what had to make way was read before
    assert [each.tolist() for each in ahead[:3]] == [
        whole(1.0 + number, 10.0 + number) for number in range(3)
    ]
    for work in here + there:
        work.start().wait()  # whoever waits makes sure first that it has started
        work.taken()
    for number in range(9):
        expected = whole(1.0 + number, 10.0 + number)
        assert ahead[number].tolist() == behind[number].tolist() == expected
    assert pools[0].unread == pools[1].unread == [None, None]


def test_a_gather_far_ahead_of_a_peer_waits_for_it_and_names_it() -> None:
    pools = [Pool(each) for each in memories(2)]
    works = [pools[0].make(buffer(0, 1.0), lost=False) for _ in range(3)]
    works[0].start()
    works[1].start()
    with pytest.raises(CommError, match="all_gather: rank 1 has not come"):
        works[2].start()
    assert not works[2].is_completed()


def test_a_start_that_is_broken_off_goes_on_in_its_place() -> None:
    pools = [Pool(each) for each in memories(2)]
    values = buffer(0, 1.0)
    work = pools[0].make(values, lost=False)
    broken_off = patch.object(Gather, "write", side_effect=KeyboardInterrupt)
    with broken_off, pytest.raises(KeyboardInterrupt):
        work.start()
    assert pools[0].started == 0
    for _ in range(2):
        work.start()
    assert pools[0].started == 1
    pools[1].make(buffer(1, 2.0), lost=False).start()
    seen: list[bool] = []
    work.when_complete(lambda: seen.append(True))
    assert work.is_completed() and seen == [True]
    work.wait()
    assert values.tolist() == whole(1.0, 2.0)


def test_memory_that_a_peer_still_reads_is_not_written_over() -> None:
    (mine,), (others,) = memories(1)
    for _ in range(2):
        for memory in (mine, others):
            Gather(memory, buffer(memory.group.rank, 0.0), lost=False).start()
        others.channel.finish(others.channel.next - 1)
    with pytest.raises(StepError, match="rank 0 has read no further"):
        Gather(others, buffer(1, 0.0), lost=False).start()


def test_a_sum_goes_back_through_the_lane_that_it_came_by() -> None:
    (mine,), (others,) = memories(1)
    piece = Piece(4, torch.float32, adds=True)
    lanes = [Scatters(mine), Scatters(others)]
    for number in range(3):
        turns = [lane.turn() for lane in lanes]
        used = [lane.scatters(piece)[turn] for lane, turn in zip(lanes, turns, strict=True)]
        for rank, scatter in enumerate(used):
            scatter.send.copy_(torch.arange(8.0) + 10 * rank + 100 * number)
        works = [scatter.make(lost=False).start() for scatter in used]
        sums = []
        for rank, (scatter, work) in enumerate(zip(used, works, strict=True)):
            work.wait()
            first, second = scatter.recv[:4], scatter.recv[scatter.stride : scatter.stride + 4]
            sums.append(buffer(rank, 0.0))
            sums[-1][4 * rank : 4 * rank + 4] = first + second
            work.taken()
        for lane, scatter, total in zip(lanes, used, sums, strict=True):
            assert lane.scatters(piece)[lane.turn()].send.data_ptr() != scatter.send.data_ptr()
            works.append(lane.gathers(16).make(total, lost=False).start())
        for work in works[2:]:
            work.wait()
            work.taken()
        expected = (2 * torch.arange(8.0) + 10 + 200 * number).tolist()
        assert [total.tolist() for total in sums] == [expected] * 2
        # the next one begins where this one did
        assert [lane.turn() for lane in lanes] == turns
