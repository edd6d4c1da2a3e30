"""How updated shards leave one after the other, while others are still being updated."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import zerort
from zerort.mesh import Work
from zerort.run.publication import Publication
from zerort.run.waits import Waits


class Counted(Work):
    """Is started once, however often it is asked to be."""

    def __init__(self, hop: Hop) -> None:
        super().__init__()
        self.hop, self.is_started = hop, False

    def start(self) -> Work:
        self.hop.asked.append(self.hop.number)
        if not self.is_started:
            self.is_started = True
            self.hop.sent.append(self.hop.number)
        return self


class Hop:
    """Of one collective, which is there at once."""

    name = "all_gather"

    def __init__(self, number: int, sent: list[int], asked: list[int]) -> None:
        self.number, self.sent, self.asked = number, sent, asked

    def make(self) -> Work:
        return Counted(self)

    def take(self) -> None:
        """Nothing."""


def publication(count: int) -> tuple[Publication, list[int], list[int]]:
    """Of so many buckets; numbers of what was sent, and of what was asked to be."""
    sent: list[int] = []
    asked: list[int] = []
    watch: Any = SimpleNamespace(enabled=False, mark=lambda: 0, waited=lambda *_: None)
    comm: Any = None
    buckets: list[Any] = [
        (
            SimpleNamespace(spec=SimpleNamespace(id=number, params=(number,)), names=["w"]),
            [Hop(number, sent, asked)],
        )
        for number in range(count)
    ]
    made = Publication(Waits(comm, watch, blocks=True))
    made.need(range(count))
    made.load(buckets)
    return made, sent, asked


def test_what_is_ready_is_sent_as_far_as_nothing_before_it_is_not() -> None:
    updates, sent, _ = publication(5)
    updates.start(1, {1, 3}, guarded=False)
    assert sent == []
    updates.start(1, {0, 1, 3}, guarded=False)
    assert sent == [0, 1]
    updates.launch(1, guarded=False)
    assert sent == [0, 1, 2, 3, 4]
    updates.start(2, {0}, guarded=False)
    assert sent == [0, 1, 2, 3, 4, 0]


def test_each_bucket_is_sent_once_however_many_follow_one_by_one() -> None:
    for count in (10, 40):
        updates, sent, asked = publication(count)
        ready: set[int] = set()
        for number in range(count):
            ready.add(number)
            updates.start(1, ready, guarded=False)
        assert sent == asked == list(range(count))


def test_one_that_was_broken_off_is_sent_before_those_behind_it() -> None:
    updates, sent, _ = publication(3)
    (_, hops), *_ = updates._buckets
    hop: Any = hops[0]
    own, hop.make = hop.make, lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        updates.start(1, {0, 1}, guarded=False)
    assert sent == []
    hop.make = own
    updates.start(1, {0, 1}, guarded=False)
    assert sent == [0, 1]


def calls_of_an_update(buckets: int) -> int:
    """How many functions are called while so many buckets are updated one by one."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(buckets)))
    engine, *_ = zerort.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": None,
            "zerort": {"bucket_bytes": 1024},
        },
    )
    optimizer = engine._parts.boundary.optimizer
    engine.backward(engine(torch.ones(1, 16)).sum())
    engine.step()
    batches = optimizer.batches(range(buckets))
    assert len(batches) == buckets
    calls = 0

    def heard(_: Any, event: str, __: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    for batch in batches:
        for bucket in batch:
            bucket.ready()
    sys.setprofile(heard)
    try:
        for batch in batches:
            optimizer.step(1.0, batch)
    finally:
        sys.setprofile(None)
    engine.destroy()
    return calls


def test_what_an_update_of_a_bucket_takes_does_not_grow_with_the_number_of_others() -> None:
    few, more, most = map(calls_of_an_update, (8, 16, 32))
    assert most - more == 2 * (more - few)
