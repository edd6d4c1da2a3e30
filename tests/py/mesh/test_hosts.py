"""Which ranks sit together, and how copies of a model state are laid over them."""

from __future__ import annotations

import re

import pytest

from zerort.errors import ConfigError
from zerort.mesh.hosts import Arrangement, Hierarchy, Seat, arrange, this_seat

AUTO = Hierarchy()


def seats(hosts: str, local: int = 0, agents: str = "") -> list[Seat]:
    """A rank for each letter."""
    return [
        Seat("node", f"boot {host}", agents[rank : rank + 1], local)
        for rank, host in enumerate(hosts)
    ]


@pytest.mark.parametrize(
    ("sitting", "copies"),
    [
        (seats("a"), (((0,),),)),
        (seats("aaaa"), (((0, 1, 2, 3),),)),
        (seats("abcd"), (((0, 1, 2, 3),),)),  # one rank a host: nothing to add up inside
        (seats("aabb"), (((0, 1), (2, 3)),)),
        (seats("abab"), (((0, 2), (1, 3)),)),  # ranks are dealt out to hosts in turn
        (seats("aaabbb"), (((0, 1, 2), (3, 4, 5)),)),
        (seats("aaaa", local=2), (((0, 1), (2, 3)),)),  # torchrun twice on one machine
        (seats("aaaa", local=3), (((0, 1, 2, 3),),)),
        (seats("aaaa", agents="0011"), (((0, 1), (2, 3)),)),
    ],
    ids=str,
)
def test_ranks_that_can_share_memory_are_one_host(
    sitting: list[Seat], copies: tuple[tuple[tuple[int, ...], ...], ...]
) -> None:
    assert arrange(sitting, AUTO) == Arrangement(copies)


@pytest.mark.parametrize(
    ("hosts", "why"), [("aaab", "different numbers of ranks (3 and 1)"), ("abba", "ranks 3 and 2")]
)
def test_hosts_in_no_even_shape_count_for_nothing_and_that_is_said(hosts: str, why: str) -> None:
    found = arrange(seats(hosts), AUTO)
    assert found.copies == (((0, 1, 2, 3),),)
    assert found.remark is not None and why in found.remark


@pytest.mark.parametrize(
    ("wanted", "copies"),
    [
        (Hierarchy("flat"), (((0, 1, 2, 3),),)),
        (Hierarchy(sums_alike=True), (((0, 1, 2, 3),),)),
        (Hierarchy(2, sums_alike=True), (((0, 1), (2, 3)),)),
        (Hierarchy(1), (((0, 1, 2, 3),),)),
        (Hierarchy(4), (((0, 1, 2, 3),),)),
        (Hierarchy(shard_size=2), (((0, 1),), ((2, 3),))),
        (Hierarchy(shard_size=1), (((0,),), ((1,),), ((2,),), ((3,),))),
        (Hierarchy(shard_size=4), (((0, 1), (2, 3)),)),
    ],
    ids=str,
)
def test_the_configuration_wins_over_where_ranks_sit(
    wanted: Hierarchy, copies: tuple[tuple[tuple[int, ...], ...], ...]
) -> None:
    assert arrange(seats("aabb"), wanted) == Arrangement(copies)


def test_copies_over_several_hosts_have_both() -> None:
    found = arrange(seats("aabbccdd"), Hierarchy(shard_size=4))
    assert found.copies == (((0, 1), (2, 3)), ((4, 5), (6, 7)))
    assert found.by_shard(5) == (4, 6, 5, 7)  # by place, then by host
    assert found.groups() == {
        "shard": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "replica": [[0, 4], [2, 6], [1, 5], [3, 7]],
        "inner": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "outer": [[0, 2], [1, 3], [4, 6], [5, 7]],
    }


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Hierarchy(3), "zerort.hierarchy.inner is 3, which does not divide the 4 ranks that hold"),
        (Hierarchy(8), "give one of 1, 2, 4, or leave it out"),
        (Hierarchy(shard_size=3), "zero_optimization.mics_shard_size is 3, which does not divide"),
        (Hierarchy(4, shard_size=2), "zerort.hierarchy.inner is 4, which does not divide the 2"),
    ],
    ids=str,
)
def test_a_number_that_does_not_fit_is_named(wanted: Hierarchy, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        arrange(seats("aaaa"), wanted)


def test_a_process_says_where_it_sits() -> None:
    seat = this_seat({"LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"})
    assert seat.host and (seat.local, seat.agent) == (4, "1")
    assert this_seat({"LOCAL_WORLD_SIZE": "many"}).local == 0
    assert this_seat({}) == this_seat({})


KEPT_OF_EIGHT = (((0, 1, 2, 3), (4, 5, 6, 7)),)


@pytest.mark.parametrize(
    ("wanted", "copies"),
    [
        (Hierarchy(kept_size=4), KEPT_OF_EIGHT),
        (Hierarchy(4, kept_size=4), KEPT_OF_EIGHT),
        (Hierarchy(sums_alike=True, kept_size=4), KEPT_OF_EIGHT),
        (Hierarchy(kept_size=8), (((0, 1), (2, 3), (4, 5), (6, 7)),)),
        (Hierarchy("flat", kept_size=8), ((tuple(range(8)),),)),
        (Hierarchy(shard_size=4, kept_size=2), (((0, 1), (2, 3)), ((4, 5), (6, 7)))),
        (Hierarchy("flat", shard_size=4, kept_size=4), (((0, 1, 2, 3),), ((4, 5, 6, 7),))),
    ],
    ids=str,
)
def test_ranks_that_keep_parameters_together_are_as_one_host(
    wanted: Hierarchy, copies: tuple[tuple[tuple[int, ...], ...], ...]
) -> None:
    assert arrange(seats("aabbccdd"), wanted) == Arrangement(copies)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Hierarchy(kept_size=3), "zero_hpz_partition_size is 3, which does not divide the 8 ranks"),
        (Hierarchy(shard_size=4, kept_size=8), "size is 8, which does not divide the 4 ranks"),
        (Hierarchy("flat", kept_size=4), 'size is 4, and zerort.hierarchy is "flat": ranks keep'),
        (Hierarchy(2, kept_size=4), 'hierarchy is {"inner": 2}: ranks keep what a gather between'),
        (Hierarchy(2, kept_size=8), "Leave zerort.hierarchy out"),
        (Hierarchy(8, kept_size=4), 'which is {"inner": 4} then, or zero_hpz_partition_size'),
    ],
    ids=str,
)
def test_another_hierarchy_than_what_is_kept_by_is_named(wanted: Hierarchy, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        arrange(seats("aabbccdd"), wanted)
