"""The cursor for parameters through the border: two ranks in one process, who are each other's
peers by hand.
"""

from __future__ import annotations

import pytest

from zerort import _core
from zerort.errors import PlanError, StepError

LAUNCH, RETIRE, GATHER, FREE = range(4)


def gather(*units: int) -> list[int]:
    return [4 * unit + GATHER for unit in units]


def free(*units: int) -> list[int]:
    return [4 * unit + FREE for unit in units]


def split(units: int = 3) -> _core.Plan:
    """A unit of 256 elements for each parameter."""
    return _core.Plan(
        [(200, "f32", 0, 0)] * units,
        world=2,
        stage=3,
        cap_elements=256,
        units=range(units),  # type: ignore[arg-type]
    )


class Ranks:
    """Two ranks of one plan; `each` calls both."""

    def __init__(self, room: int = 512) -> None:
        self.plan = split()
        self.room = room
        self.reducers = [_core.Reducer(self.plan) for _ in range(2)]
        self.both = [
            _core.Gatherer(reducer, rank=rank, room=room)
            for rank, reducer in enumerate(self.reducers)
        ]
        self.sets = [[g.set_of([unit]) for unit in range(3)] for g in self.both]

    def roll(self) -> list[_core.Reading]:
        rows = [number for g in self.both for number in g.row([7])]
        return [g.read(rows) for g in self.both]

    def open(self, kind: _core._At, seq: int = 0) -> list[_core.Reading]:
        for g in self.both:
            g.open(kind, 0, seq)
        readings = self.roll()
        for g in self.both:
            g.begin()
        return readings

    def ask(self, needs: list[int]) -> None:
        """Each rank needs a unit that no list brings."""
        for g, sets, unit in zip(self.both, self.sets, needs, strict=True):
            answer = g.need(sets[unit])
            assert answer is not None
            assert answer[1] == unit == g.asking
        for g, reading in zip(self.both, self.roll(), strict=True):
            assert (reading.what, reading.units) == ("serve", list(dict.fromkeys(needs)))
            assert g.serve(reading.units) == gather(*dict.fromkeys(needs))
            g.served()

    def use(self, unit: int, node: int = -1, seq: int = -1) -> list[list[int]]:
        """Both ranks use a unit; returns what each was handed out before."""
        done = []
        for g, sets in zip(self.both, self.sets, strict=True):
            answer = g.need(sets[unit], node)
            done.append([] if answer is None else answer[0])
            if answer is not None:
                assert answer[1] is None
                g.arrived(sets[unit])
            assert g.acquire(sets[unit], seq)
            g.release(sets[unit])
        return done

    def step(self) -> None:
        """A free forward and backward, which teach, and the boundary."""
        assert [r.list for r in self.open("forward")] == [None, None]
        for unit in range(3):
            self.ask([unit, unit])
            self.use(unit, seq=10 * unit)
        for g in self.both:
            g.close()
        self.open("backward")
        for reducer in self.reducers:
            reducer.begin(observe=True)
        for unit in (2, 1, 0):
            for g, sets in zip(self.both, self.sets, strict=True):
                g.need(sets[unit], 10 * unit + 5)
            if self.both[0].asking is not None:
                self.ask([unit, unit])
            self.use(unit, 10 * unit + 5)
            for reducer in self.reducers:
                assert reducer.grad_ready(unit) is None
        for g, reducer in zip(self.both, self.reducers, strict=True):
            reducer.finish()
            g.close()
            assert g.live == 0

    def learn(self) -> None:
        readings = self.open("boundary")
        assert [reading.news for reading in readings] == [True, True]
        self.plan = self.plan.routed(self.both[0].routes(), room=self.room, depth=1)
        for g, reducer in zip(self.both, self.reducers, strict=True):
            reducer.reorder(self.plan)
            g.load(self.plan)
            g.told()


def test_a_pass_without_a_list_asks_for_every_unit_and_is_learnt() -> None:
    ranks = Ranks()
    ranks.step()
    assert [g.news for g in ranks.both] == [True, True]
    ranks.learn()
    assert [(r.kind, r.list) for r in ranks.open("forward")] == [("forward", 0)] * 2
    assert ranks.use(0) == [gather(0, 1)] * 2
    assert ranks.use(1) == [free(0) + gather(2)] * 2
    assert ranks.use(1) == [[], []]
    assert ranks.use(2) == [[], []]
    assert [g.close() for g in ranks.both] == [[], []]
    assert [g.live for g in ranks.both] == [512, 512]
    assert [g.state(2) for g in ranks.both] == ["whole", "whole"]
    assert not ranks.both[0].news


def test_a_backward_goes_by_the_list_and_frees_what_older_nodes_cannot_read() -> None:
    ranks = Ranks()
    ranks.step()
    ranks.learn()
    ranks.open("forward")
    for unit in range(3):
        ranks.use(unit, seq=10 * unit)
    for g in ranks.both:
        g.close()
    readings = ranks.open("backward")
    for reducer, reading in zip(ranks.reducers, readings, strict=True):
        assert reading.list is not None
        reducer.begin(list=reading.list)
    assert ranks.use(2, node=25) == [[], []]
    g, reducer = ranks.both[0], ranks.reducers[0]
    assert reducer.grad_ready(2) is None
    assert g.need(ranks.sets[0][1], 15) == ([*free(2), *gather(0), LAUNCH], None)
    g.arrived(ranks.sets[0][1])
    hi = reducer.grad_ready(1)
    assert (hi, g.need(ranks.sets[0][0], 5)) == (None, ([*free(1), 4 + LAUNCH], None))
    g.arrived(ranks.sets[0][0])
    hi = reducer.grad_ready(0)
    assert hi is not None
    assert g.reached(hi) == [8 + LAUNCH, RETIRE, 4 + RETIRE, 8 + RETIRE]
    assert g.reached(hi) == []
    reducer.finish()
    assert g.close() == free(0)


def test_ranks_in_another_order_are_served() -> None:
    ranks = Ranks()
    ranks.open("forward")
    ranks.ask([0, 1])
    for g, sets, unit in zip(ranks.both, ranks.sets, [0, 1], strict=True):
        assert g.need(sets[unit]) is None
        assert g.need(sets[1 - unit]) is None, "what the other asked for stays where it has room"


def test_ranks_at_different_places_learn_it_at_one_roll() -> None:
    ranks = Ranks()
    ranks.both[0].open("forward")
    ranks.both[1].open("boundary")
    own = [7, 0, 0, 0, 0, 0]
    for reading in ranks.roll():
        assert (reading.what, reading.rank, reading.kind) == ("diverged", 1, "boundary")
        assert reading.rows == [("forward", 0, own), ("boundary", 0, own)]
    assert [g.abandon() for g in ranks.both] == [[], []]
    assert [r.what for r in ranks.open("forward")] == ["together"] * 2


def test_what_one_rank_evaluates_the_others_serve() -> None:
    ranks = Ranks()
    ranks.both[0].open("evaluation")
    ranks.both[1].open("forward")
    alone, again = ranks.roll()
    assert (alone.what, again.what) == ("alone", "again")
    one, other = ranks.both
    one.begin()
    assert one.need(0) == ([], 0)
    asked = ranks.roll()
    assert [reading.units for reading in asked] == [[0], [0]]
    assert [g.serve([0]) for g in ranks.both] == [gather(0)] * 2
    assert (one.served(), other.served()) == ([], free(0))
    assert one.close() == free(0)


def test_a_failed_rank_says_so_and_serves() -> None:
    ranks = Ranks()
    ranks.both[0].open("backward")
    ranks.both[1].fail()
    ranks.both[1].open("serve")
    for reading in ranks.roll():
        assert (reading.what, reading.kind, reading.failed) == ("together", "backward", [1])


def test_calls_out_of_order_are_refused() -> None:
    g = Ranks().both[0]
    for call, message in [
        (lambda: g.need(0), "no pass is under way"),
        (g.row, "no roll is under way"),
        (g.begin, "no roll is under way"),
        (lambda: g.read([0] * 2 * g.WIDTH), "not the rows of all ranks"),
        (lambda: g.read([1]), "not the rows of all ranks"),
        (lambda: g.set_of([3]), "unknown unit 3: the plan has 3"),
        (lambda: g.set_of([-1]), "unknown unit -1"),
        (lambda: g.acquire(99), "unknown set 99: there are 3"),
        (lambda: g.release(99), "unknown set 99: there are 3"),
        (lambda: g.arrived(0), "unit 0 has not been gathered"),
        (lambda: g.serve([3]), "unknown unit 3: the plan has 3"),
        (lambda: g.state(3), "unknown unit 3"),
        (lambda: g.open("need"), '"need" can not be opened'),
        (lambda: g.open("forward", -1), "unknown module -1"),
        (lambda: g.load(split(2)), "another layout"),
    ]:
        with pytest.raises((StepError, PlanError), match=message):
            call()
    assert g.close() == []
    assert g.reached(9) == []
    assert not g.acquire(0)
    g.open("forward")
    with pytest.raises(StepError, match="a pass is under way: close it first"):
        g.open("forward")
    with pytest.raises(StepError, match="has room for 6 integers of its caller, got 7"):
        g.row([0] * 7)
