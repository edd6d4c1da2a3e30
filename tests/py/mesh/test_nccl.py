"""NCCL's communicator, over gloo in its place: what a GPU's library is asked for."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import ranks
from zerort.mesh import meet
from zerort.mesh.control import GlooControl
from zerort.mesh.nccl import NcclComm

MINUTE = timedelta(seconds=60)
CPU = torch.device("cpu")


def over_gloo(rank: int, world: int) -> dict[str, Any]:
    asked: list[str] = []
    make = dist.new_group

    def new_group(ranks: Any, backend: str, **options: Any) -> Any:
        asked.append(backend)
        return make(ranks, backend=backend.replace("theirs", "gloo"), **options)

    dist.new_group = new_group
    dist.get_default_backend_for_device = lambda device: "theirs"
    control = meet(MINUTE)
    assert isinstance(control, GlooControl)
    comm = NcclComm(control, CPU, MINUTE)
    send = torch.arange(4.0) + 10 * rank
    recv = send.view(2, 2)[rank]
    comm.reduce_scatter(recv, send).start().wait()
    whole = torch.zeros(2)
    whole[rank] = 1.0 + rank
    comm.all_gather(whole).start().wait()
    value = torch.tensor([float(rank)])
    comm.broadcast(value)
    comm.close()
    return {
        "asked": asked,
        "sum": recv.tolist(),
        "whole": whole.tolist(),
        "value": value.item(),
        "left": len(dist.distributed_c10d._world.pg_map),
    }


def test_gradients_and_parameters_share_one_group_and_control_is_gloos() -> None:
    for rank, found in enumerate(ranks.run(2, over_gloo)):
        assert found["asked"] == ["gloo", "theirs"]
        assert found["sum"] == [10.0 + 4 * rank, 12.0 + 4 * rank]
        assert found["whole"] == [1.0, 2.0]
        assert found["value"] == 0.0
        assert found["left"] == 1


def a_peer_is_lost(rank: int, world: int) -> dict[str, Any]:
    """Closes a communicator over which a collective hangs, once its control group has failed."""
    make, named, aborted = dist.new_group, dist.get_backend, list[Any]()
    theirs: list[Any] = []

    def new_group(ranks: Any, backend: str, **options: Any) -> Any:
        group = make(ranks, backend=backend.replace("theirs", "gloo"), **options)
        if backend == "theirs":
            theirs.append(group)
        return group

    dist.new_group = new_group
    dist.get_default_backend_for_device = lambda device: "theirs"
    dist.get_backend = lambda group=None: "theirs" if group in theirs else named(group)
    dist.distributed_c10d._abort_process_group = aborted.append
    control = meet(MINUTE)
    assert isinstance(control, GlooControl)
    comm = NcclComm(control, CPU, MINUTE)
    if rank == 0:
        comm.all_gather(torch.zeros(2)).start()  # rank 1 never comes
        control.failure("vote", RuntimeError("rank 1 has gone"))
    start = time.monotonic()
    comm.close()
    return {"aborted": aborted == theirs, "seconds": time.monotonic() - start}


def test_a_communicator_that_has_lost_a_peer_gives_up_what_is_under_way() -> None:
    survivor, _ = ranks.run(2, a_peer_is_lost)
    assert survivor["aborted"]
    assert survivor["seconds"] < 30
