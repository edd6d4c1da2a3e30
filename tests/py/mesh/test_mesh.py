"""Named communicators over explicit ranks, on real gloo ranks."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import ranks
from catching import assert_told, caught
from zerort.errors import CommError, ConfigError
from zerort.mesh import Comm, Mesh, Piece, connect, meet

CPU = torch.device("cpu")
MINUTE = timedelta(seconds=60)
PIECE = 1 << 17  # elements, for each rank: large enough for a direction of its own
LARGE = Piece(PIECE, torch.int64, adds=False)
GRID = {"shard": [[0, 1], [2, 3]], "replica": [[0, 2], [1, 3]]}


def move(mesh: Mesh, name: str) -> dict[str, Any]:
    """Every collective of one group, on values that tell who sent them."""
    comm = mesh[name]
    send = torch.arange(2.0 * comm.world) + 100 * mesh.rank
    recv = torch.zeros(2 * comm.pieces(adds=True))
    if comm.world == 1:
        recv = send
    comm.reduce_scatter(recv, send).start().wait()
    whole = torch.zeros(comm.world)
    whole[comm.rank] = mesh.rank
    comm.all_gather(whole).start().wait()
    comm.scatter_memory([LARGE])
    large = torch.arange(comm.world).repeat_interleave(PIECE) + 100 * mesh.rank
    pieces = torch.zeros(comm.pieces(adds=False) * PIECE, dtype=large.dtype)
    comm.reduce_scatter(pieces if comm.world > 1 else large, large).start().wait()
    told = torch.tensor([float(mesh.rank)])
    comm.broadcast(told, comm.world - 1)
    votes = torch.tensor([1.0 + mesh.rank])
    comm.control.all_reduce(votes)
    fact = torch.tensor([float(mesh.rank)])
    comm.control.broadcast(fact, comm.world - 1)
    return {
        "ranks": comm.ranks,
        "rank": comm.rank,
        "pieces": recv.view(-1, 2).tolist(),
        "large": (pieces if comm.world > 1 else large).view(-1, PIECE).unique(dim=1).tolist(),
        "uneven": uneven(comm),
        "whole": whole.tolist(),
        "told": (told.item(), fact.item()),
        "votes": votes.item(),
        "objects": comm.control.gather_objects(mesh.rank),
    }


def uneven(comm: Comm) -> list[int]:
    """What comes where rank a has (a + 2 b) % 3 numbers for rank b, nothing for some."""
    ranks = range(comm.world)
    leaving = [(comm.rank + 2 * b) % 3 for b in ranks]
    arriving = [(a + 2 * comm.rank) % 3 for a in ranks]
    send = torch.tensor([10 * comm.rank + b for b in ranks for _ in range(leaving[b])])
    recv = torch.zeros(sum(arriving), dtype=torch.int64)
    comm.all_to_all(recv, send.long(), arriving, leaving).start().wait()
    found: list[int] = recv.tolist()
    return found


def in_a_grid(rank: int, world: int) -> dict[str, Any]:
    mesh = connect(MINUTE, CPU, GRID)
    found = {name: move(mesh, name) for name in ("shard", "replica", "job", "own")}
    counts = mesh.counts(), mesh.counts("shard")
    mesh.close()
    return {**found, "counts": counts}


@ranks.once(None)
def grid() -> list[dict[str, Any]]:
    return ranks.run(4, in_a_grid)


@pytest.mark.parametrize("name", ["shard", "replica", "job", "own"])
def test_each_group_moves_buffers_and_facts_among_its_own_ranks(name: str) -> None:
    for rank, found in enumerate(grid()):
        part = {
            "job": [0, 1, 2, 3],
            "own": [rank],
            **{key: next(p for p in parts if rank in p) for key, parts in GRID.items()},
        }[name]
        place = part.index(rank)
        assert found[name] == {
            "ranks": tuple(part),
            "rank": place,
            "pieces": [[100.0 * r + 2 * place, 100.0 * r + 2 * place + 1] for r in part],
            "large": [[100 * r + place] for r in part],
            "uneven": [
                10 * a + place for a in range(len(part)) for _ in range((a + 2 * place) % 3)
            ],
            "whole": [float(r) for r in part],
            "told": (float(part[-1]), float(part[-1])),
            "votes": float(sum(1 + r for r in part)),
            "objects": part,
        }


def test_a_sum_over_the_job_counts_each_copy_once() -> None:
    assert [found["counts"][0] for found in grid()] == [True, True, False, False]
    assert [found["counts"][1] for found in grid()] == [True, False, False, False]


def ways(rank: int, world: int) -> list[tuple[str, bool, bool]]:
    """Of each call of a large reduce-scatter and gather: its group, and whether this rank sends to
    its peer there, and hears from it.
    """
    mesh, found = connect(MINUTE, CPU), []
    all_to_all, broadcast = dist.all_to_all_single, dist.broadcast

    def exchanging(recv: Any, send: Any, **options: Any) -> Any:
        leaving, arriving = (options[f"{way}put_split_sizes"][1 - rank] for way in ("in", "out"))
        found.append((options["group"].group_name, leaving > 0, arriving > 0))
        return all_to_all(recv, send, **options)

    def telling(buffer: Any, source: int, **options: Any) -> Any:
        found.append((options["group"].group_name, source == rank, source != rank))
        return broadcast(buffer, source, **options)

    send = torch.zeros(2 * PIECE)
    mesh.shard.scatter_memory([LARGE])
    mesh.shard.gather_memory(send.nbytes // 2)
    with (
        mock.patch.object(dist, "all_to_all_single", exchanging),
        mock.patch.object(dist, "broadcast", telling),
    ):
        mesh.shard.reduce_scatter(torch.zeros(2 * PIECE), send).start().wait()
        mesh.shard.all_gather(send).start().wait()
    mesh.close()
    return found


def test_between_two_ranks_a_group_carries_large_messages_in_one_direction() -> None:
    one, other = ranks.run(2, ways)
    for calls in (one, other):
        assert len({group for group, _, _ in calls}) == len(calls) == 4
        assert all(sends != hears for _, sends, hears in calls)
    assert [sends for _, sends, _ in one] == [hears for _, _, hears in other]


def by_default(rank: int, world: int) -> tuple[bool, tuple[int, ...]]:
    mesh = connect(MINUTE, CPU)
    same = mesh.shard is mesh.job and mesh.replica is mesh["own"]
    mesh.close()
    mesh.close()
    return same, mesh.replica.ranks


def test_without_groups_all_ranks_share_one_model_state_and_one_communicator() -> None:
    assert ranks.run(2, by_default) == [(True, (0,)), (True, (1,))]


def groups_made(rank: int, world: int) -> list[int]:
    """Process groups of this process, at the start and behind each memory."""
    mesh = connect(MINUTE, CPU)
    made = [_process_groups()]
    small = Piece(8, torch.float32, adds=True)
    for pieces, nbytes in (([small], 8), ([small, LARGE], 8), ([LARGE], 1 << 17), ([LARGE], 8)):
        mesh.shard.scatter_memory(pieces)
        mesh.shard.gather_memory(nbytes)
        made.append(_process_groups())
    mesh.close()
    return [*made, _process_groups()]


def _process_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def test_second_groups_are_made_once_and_only_for_large_messages() -> None:
    # the job's own, and ours for control, gradients and parameters
    assert ranks.run(2, groups_made) == [[4, 4, 5, 6, 6, 1]] * 2


def alone_beside_two(rank: int, world: int) -> list[int]:
    """The same calls on a group of which one part is a single rank."""
    mesh = connect(MINUTE, CPU, {"tensor": [[0], [1, 2]]})
    comm = mesh["tensor"]
    comm.scatter_memory([LARGE])
    comm.gather_memory(1 << 17)
    mesh.shard.gather_memory(1 << 17)
    recv, send = torch.zeros(comm.world * PIECE), torch.full((comm.world * PIECE,), float(rank))
    comm.reduce_scatter(recv if comm.world > 1 else send, send).start().wait()
    mesh.close()
    return (recv if comm.world > 1 else send).view(-1, PIECE)[:, 0].int().tolist()


def test_a_rank_that_is_alone_in_its_part_holds_nobody_up() -> None:
    assert ranks.run(3, alone_beside_two) == [[0], [1, 2], [1, 2]]


def left_alone_with_memory(rank: int, world: int) -> Any:
    mesh = connect(timedelta(seconds=2), CPU)
    if rank == 1:
        os._exit(3)
    return caught(lambda: mesh.shard.scatter_memory([LARGE]))


def test_a_peer_that_is_lost_while_a_second_group_is_made_is_named() -> None:
    told, _ = ranks.attempt(2, left_alone_with_memory, timeout=30)
    assert isinstance(told, ranks.Returned), told
    assert_told(told.value, CommError, "rank 0: ", "failed: rank 1", "has exited")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a_rank_left_out": ({"shard": [[0]]}, "'shard'.*once"),
    "a_rank_twice": ({"tensor": [[0, 1], [1]]}, "'tensor'.*once"),
    "a_rank_too_many": ({"shard": [[0, 1, 2]]}, "'shard'.*once"),
    "descending": ({"shard": [[1, 0]]}, "ascending"),
    "reserved": ({"inner": [[0, 1]]}, "'inner'.*reserved"),
    "both_alike": ({"shard": [[0, 1]], "replica": [[0, 1]]}, "ranks 0 and 1"),
}


def with_wrong_groups(rank: int, world: int) -> dict[str, Any]:
    found = {
        name: caught(partial(connect, MINUTE, CPU, groups)) for name, (groups, _) in WRONG.items()
    }
    mesh = connect(MINUTE, CPU)
    found["no_such_name"] = caught(lambda: mesh["tier"])
    mesh.close()
    return {**found, "groups": len(dist.distributed_c10d._world.pg_map)}


def test_groups_that_do_not_fit_the_job_are_refused_by_name() -> None:
    for found in ranks.run(2, with_wrong_groups):
        for name, (_, words) in WRONG.items():
            with pytest.raises(ConfigError, match=words):
                raise found[name]
        assert_told(found["no_such_name"], ConfigError, "'tier'", "shard")
        assert found["groups"] == 1


# ---- when a rank does not come


def one_leaves(rank: int, world: int) -> tuple[str, float, list[int]]:
    mesh = connect(timedelta(seconds=20), CPU, GRID)
    if rank == 3:
        os._exit(9)
    start = time.monotonic()
    error = caught(lambda: mesh.shard.control.gather_objects(0)) if rank == 2 else None
    objects = mesh.shard.control.gather_objects(rank) if rank < 2 else []
    return str(error), time.monotonic() - start, objects


def test_a_group_that_loses_a_rank_names_it_as_the_job_does_and_other_groups_go_on() -> None:
    first, second, third, lost = ranks.attempt(4, one_leaves, timeout=40)
    assert isinstance(lost, ranks.Died)
    assert first.value[2] == second.value[2] == [0, 1]  # type: ignore[union-attr]
    message, seconds, _ = third.value  # type: ignore[union-attr]
    assert "rank 2: " in message
    assert "rank 3 (process" in message
    assert "has exited" in message
    assert seconds < 10


def one_is_late(rank: int, world: int) -> tuple[Exception | None, float]:
    mesh = connect(MINUTE, CPU)
    mesh.control.set_timeout(timedelta(seconds=2))
    start = time.monotonic()
    if rank == 1:
        return None, 0.0  # and its process lives on until rank 0 is done
    error = caught(lambda: mesh.job.control.all_reduce(torch.ones(1)))
    return error, time.monotonic() - start


def test_the_control_group_waits_as_long_as_it_is_told_and_names_who_is_missing() -> None:
    (error, seconds), _ = ranks.run(2, one_is_late)
    assert_told(error, CommError, "rank 0: all_reduce failed", "rank 1", "did not come")
    assert seconds < 10


def dies_while_meeting(rank: int, world: int) -> Exception | None:
    if rank == 1:
        dist.new_group(backend="gloo")
        os._exit(9)
    return caught(lambda: meet(MINUTE))


def test_a_rank_that_dies_before_the_ranks_have_met_is_an_error_of_communication() -> None:
    survivor, _ = ranks.attempt(2, dies_while_meeting, timeout=30)
    assert_told(survivor.value, CommError, "rank 0", "before the ranks had met")  # type: ignore[union-attr]


def without_an_interface(rank: int, world: int) -> tuple[Exception | None, int]:
    os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
    error = caught(lambda: meet(MINUTE))
    return error, len(dist.distributed_c10d._world.pg_map)


def test_without_a_network_interface_the_error_names_the_variable_that_chooses_one() -> None:
    for error, groups in ranks.run(2, without_an_interface, timeout=30):
        assert_told(error, CommError, "gloo", "nowhere0", "GLOO_SOCKET_IFNAME")
        assert groups == 1
