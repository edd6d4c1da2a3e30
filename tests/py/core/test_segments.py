"""Memory that ranks of one host share: its layout, and the counters by which it is used in turn."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.utils.dlpack import from_dlpack

from zerort import _core
from zerort.errors import LayoutError, StepError

PAGE = 4096


@contextmanager
def file(length: int) -> Iterator[int]:
    descriptor = os.memfd_create("segment")
    try:
        os.ftruncate(descriptor, length)
        yield descriptor
    finally:
        os.close(descriptor)


def segments(world: int, channels: int = 1) -> list[_core.Segment]:
    """Each rank's own mapping of one file."""
    with file(_core.Segment.length(world=world, channels=channels, memory=PAGE)) as descriptor:
        return [
            _core.Segment(descriptor, rank=rank, world=world, channels=channels, memory=PAGE)
            for rank in range(world)
        ]


def test_a_rank_sees_what_a_peer_writes_and_no_memory_overlaps() -> None:
    ranks = segments(3)
    for number, one in enumerate(ranks):
        from_dlpack(one.buffer(number, 0, PAGE)).fill_(number + 1)
    for one in ranks:
        found = [from_dlpack(one.buffer(number, 0, PAGE)) for number in range(3)]
        assert [int(tensor.min()) for tensor in found] == [1, 2, 3]
        assert [int(tensor.max()) for tensor in found] == [1, 2, 3]


def test_tensors_keep_the_mapping_and_nothing_else_does() -> None:
    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum("memfd:segment" in line for line in maps)

    (one,) = segments(1)
    tensor = from_dlpack(one.buffer(0, 0, PAGE))
    tensor.fill_(7)
    del one
    assert mapped() == 1 and int(tensor.sum()) == 7 * PAGE
    del tensor
    assert mapped() == 0


def test_a_file_that_is_not_as_long_as_the_layout_is_refused() -> None:
    length = _core.Segment.length(world=2, channels=3, memory=PAGE)
    for wrong in (length - PAGE, length + 1, 0):
        with file(wrong) as descriptor, pytest.raises(LayoutError, match=f"the file has {wrong}"):
            _core.Segment(descriptor, rank=0, world=2, channels=3, memory=PAGE)
    with pytest.raises(LayoutError, match="no file has the descriptor -1"):
        _core.Segment(-1, rank=0, world=2, channels=3, memory=PAGE)


@pytest.mark.parametrize(
    "rank, world, memory", [(2, 2, PAGE), (0, 0, PAGE), (0, 1, PAGE + 1), (0, 2, 1 << 63)]
)
def test_a_layout_that_is_none_is_refused(rank: int, world: int, memory: int) -> None:
    with file(PAGE) as descriptor, pytest.raises(LayoutError, match=f"rank {rank} of {world}"):
        _core.Segment(descriptor, rank=rank, world=world, channels=0, memory=memory)


def test_pieces_outside_of_a_rank_s_memory_are_refused() -> None:
    one = segments(2)[0]
    for rank, start, length in [(0, 1, PAGE), (0, PAGE + 1, 0), (2, 0, 1)]:
        with pytest.raises(LayoutError):
            one.buffer(rank, start, length)
    with pytest.raises(LayoutError, match="channel 1 of 1"):
        one.channel(1)


def test_trn_2_a_use_that_would_be_written_over_what_a_peer_reads_is_refused() -> None:
    fast, slow = (segment.channel(0) for segment in segments(2))
    for number in (1, 2):
        fast.post(number)
        fast.finish(number)
    assert fast.next == 3
    with pytest.raises(StepError, match="use 3 is posted while rank 1 has read no further than"):
        fast.post(3)
    slow.post(1)
    slow.finish(1)
    fast.post(3)
    fast.post(3)
    assert (fast.next, fast.missing(2), slow.missing(1)) == (4, 1, None)


def test_a_use_that_is_lost_waits_for_no_peer_and_lets_none_wait() -> None:
    lost, other = (segment.channel(0) for segment in segments(2))
    for number in (1, 2, 3, 4):
        lost.post(number, lost=True)
    for number in (1, 2, 3, 4):
        other.post(number)
        assert other.missing(number) is None
        other.finish(number)


def test_a_rank_that_sleeps_is_woken_by_the_post() -> None:
    one, other = (segment.channel(0) for segment in segments(2))
    one.post(1)
    waits = threading.Thread(target=lambda: (time.sleep(0.1), other.post(1)))
    began = time.perf_counter()
    waits.start()
    assert one.wait(1, 30.0) is None  # the thread runs: the lock is not held meanwhile
    assert time.perf_counter() - began < 5.0
    waits.join()


def test_a_wait_ends_with_its_time_or_with_a_peer_that_leaves() -> None:
    here, there = segments(2)
    one = here.channel(0)
    one.post(1)
    assert one.wait(1, 0.05) == 1
    leaves = threading.Thread(target=lambda: (time.sleep(0.1), there.leave()))
    began = time.perf_counter()
    leaves.start()
    assert one.wait(1, 30.0) == 1
    assert time.perf_counter() - began < 5.0
    assert here.left(1) and not here.left(0)
    leaves.join()
