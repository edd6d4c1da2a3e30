"""Whole parameters whose buckets are cut evenly: what is sent at a boundary, what each rank keeps.
That the bits are those of the other way is shown in test_whole.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from whole import counted, engine_of, train

import ranks
from training import keep
from zerort.memory import Form
from zerort.mesh.gloo import GlooComm
from zerort.optim.muon import flops
from zerort.trace.reader import read, steps

pytestmark = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is torch 2.9's"
)
WORLDS = [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]


@contextmanager
def crossings() -> Iterator[list[tuple[torch.dtype, int, int]]]:
    """Of each all-to-all of parameters within: the dtype, and bytes that leave and that come."""
    inner, seen = GlooComm.all_to_all, []

    def watched(self: Any, recv: Tensor, send: Tensor, *splits: Any) -> Any:
        seen.append((send.dtype, send.nbytes, recv.nbytes))
        return inner(self, recv, send, *splits)

    GlooComm.all_to_all = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        GlooComm.all_to_all = inner  # type: ignore[method-assign]


def sent(rank: int, world: int, stage: int, changes: dict[str, Any]) -> dict[str, Any]:
    """What one rank sends in two steps of three micro-batches, and what the plan says."""
    engine = engine_of(stage, None, 3, "exchanged", **changes)
    parts = engine._parts
    with crossings() as seen, counted() as shapes:
        train(engine, rank, 2)
    model, plan = parts.boundary.flat, parts.reduction.plan
    optimizer = engine.optimizer
    found = {
        "seen": seen,
        "flops": sum(flops(shape, 5) for shape in shapes) / 2,
        "largest": max(
            flops(form.shape, 5)
            for bucket in model.stepped
            if bucket.spec.grain == "whole"
            for form in [Form.of(parameter.flatten(1)) for parameter in bucket.params]
        ),
        "exchanges": [
            (e.dtype, sum(e.send_splits), sum(e.recv_splits)) for e in plan.exchanges(rank)
        ],
        "owners": [plan.owner(param) for param in range(plan.num_params)],
        "numels": [parameter.numel() for parameter in model.params],
        "ways": {b.id: b.way for b in plan.buckets},
        "bucket of": {param: b.id for b in plan.buckets for param in b.params},
        "masters": {b.spec.id: b.master.numel() for b in model.trained},
        "rooms": {number: room.master.numel() for number, room in model.rooms.items()},
        "state": sum(
            value.numel()
            for segment in parts.boundary.optimizer.segments
            for value in optimizer.state.get(segment.tensor, {}).values()
            if isinstance(value, Tensor)
            and value.numel() > 1
            and segment.bucket.spec.id in model.rooms
        ),
        "open": [room._gradient for room in model.rooms.values()],
    }
    keep(engine)
    return found


sent_by_all = ranks.once(None)(
    lambda world, stage, bf16: ranks.shared(
        world, sent, stage, {"bf16": {"enabled": True}} if bf16 else {}, timeout=200
    )
)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_each_element_goes_to_its_owner_once_a_boundary_and_comes_back_once(
    world: int, bf16: bool
) -> None:
    found = sent_by_all(world, 2, bf16)
    values = torch.bfloat16 if bf16 else torch.float32
    total = 0
    for rank in found:
        [(_, there, back)] = rank["exchanges"]
        each = [(torch.float32, 4 * there, 4 * back)]
        each += [(values, values.itemsize * back, values.itemsize * there)]
        assert rank["seen"] == 2 * each  # with three micro-batches to a boundary
        total += there
    ways, home = found[0]["ways"], found[0]["bucket of"]
    exchanged = sum(
        numel for param, numel in enumerate(found[0]["numels"]) if ways[home[param]] == "exchanged"
    )
    assert 0.4 * exchanged < total <= exchanged
    assert total == sum(rank["exchanges"][0][2] for rank in found)


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_keeps_masters_and_state_of_what_it_owns_alone(world: int) -> None:
    found = sent_by_all(world, 2, False)
    for number, rank in enumerate(found):
        ways, home, rooms = rank["ways"], rank["bucket of"], rank["rooms"]
        assert rooms and all(rank["masters"][bucket] == 0 for bucket in rooms)
        own: dict[int, int] = dict.fromkeys(rooms, 0)
        for param, numel in enumerate(rank["numels"]):
            if ways[home[param]] == "exchanged" and rank["owners"][param] == number:
                own[home[param]] += numel
        # between two matrices lie less than 64 bytes
        assert all(own[b] <= length < own[b] + 32 for b, length in rooms.items())
        assert rank["state"] == sum(own.values())
        assert rank["open"] == [None] * len(rooms)


@pytest.mark.parametrize("world", WORLDS)
def test_no_rank_does_more_than_the_mean_and_the_largest_matrix(world: int) -> None:
    found = sent_by_all(world, 2, False)
    work = [rank["flops"] for rank in found]
    assert 0 < max(work) <= sum(work) / world + found[0]["largest"]


def traced(rank: int, world: int, folder: str) -> tuple[list[int], Any]:
    """Bytes that this rank sends at a boundary, and the summary of collectives."""
    trace = {"trace": {"path": f"{folder}/trace-{{rank}}.json"}}
    engine = engine_of(2, None, 1, "exchanged", zerort=trace, comms_logger={"enabled": True})
    train(engine, rank, 3)
    sent = list(engine._parts.boundary.exchange.sent)
    records = engine._parts.communication.records()
    engine.destroy()
    return sent, {key: record.count for key, record in records.items() if key[0] == "all_to_all"}


def test_a_trace_shows_the_exchange_as_communication(tmp_path: Path) -> None:
    found = ranks.run(2, traced, str(tmp_path))
    for rank, (sent, counts) in enumerate(found):
        events = read(tmp_path / f"trace-{rank}.json").events
        spans = [event for event in events if event["ph"] == "X"]
        names = Counter(span["name"] for span in spans)
        assert names["exchange gradients"] == names["exchange parameters"] == 3
        for what, size in zip(("gradients", "parameters"), sent, strict=True):
            [*sizes] = (s["args"]["bytes"] for s in spans if s["name"] == f"all_to_all {what} 0")
            assert sizes == [size] * 3
        assert sum(counts.values()) == 6 + 1 and {size for _, size in counts} <= {*sent, sent[0]}
        for step in steps(events)[1:]:  # behind the start, which brings the masters
            waits = [what for what, _ in step.waits if what.startswith("exchanged")]
            assert waits == ["exchanged gradients", "exchanged parameters"]
            assert step.exposed >= sum(took for what, took in step.waits if what in waits) > 0
