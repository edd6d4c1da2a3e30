"""Plans and the reducer through the border: Python gets what the core says, and refusals are of our
classes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from zerort import _core
from zerort.errors import PlanError, StepError

PARAMS = [
    (1000, "f32", 0, 0),
    (7, "f32", 0, 0),
    (0, "f32", 0, 0),
    (300, "bf16", 0, 0),
    (1, "f32", 1, 0),
    (5000, "f32", 0, 0),
]


def plan(**changes: Any) -> _core.Plan:
    options: dict[str, Any] = {
        "params": PARAMS,
        "world": 2,
        "stage": 2,
        "cap_bytes": 8192,
    } | changes
    return _core.Plan(options.pop("params"), **options)


class TestPlan:
    def test_what_no_optimizer_has_lies_in_buckets_of_no_group_and_is_not_reduced(self) -> None:
        params = [
            (numel, dtype, None if n else 0, 0) for n, (numel, dtype, *_) in enumerate(PARAMS)
        ]
        made = plan(params=params, stage=3, units=[0, 0, 0, 1, 1, 1])
        held = [bucket for bucket in made.buckets if bucket.group is None]
        assert sorted(param for bucket in held for param in bucket.params) == [1, 2, 3, 4, 5]
        assert [(b.reduce_hops, b.publish_hops) for b in held] == [([], [])] * len(held)
        own = next(bucket for bucket in made.buckets if bucket.group == 0)
        assert made.schedule == [("launch", own.id), ("retire", own.id)]
        assert {unit: bucket.unit for bucket in held for unit in bucket.params}[1] == own.unit

    def test_every_parameter_lies_in_one_bucket_of_its_kind(self) -> None:
        seen = []
        for position, bucket in enumerate(plan().buckets):
            assert bucket.id == position
            assert bucket.numel == 2 * bucket.shard_numel
            assert bucket.numel % (2 * 128) == 0
            for param, offset, numel in zip(
                bucket.params, bucket.offsets, bucket.numels, strict=True
            ):
                assert (numel, bucket.dtype, bucket.group, bucket.wire) == PARAMS[param]
                assert offset * {"f32": 4, "bf16": 2}[bucket.dtype] % 64 == 0
                assert offset + numel <= bucket.numel
                seen.append(param)
        assert sorted(seen) == list(range(len(PARAMS)))

    def test_another_wire_format_is_another_bucket_and_another_digest(self) -> None:
        low = plan(params=[*PARAMS[:-1], (5000, "f32", 0, 2)])
        assert {bucket.wire: bucket.params for bucket in low.buckets if bucket.wire} == {2: [5]}
        assert low.digest != plan().digest

    def test_fragments_tile_every_parameter(self) -> None:
        covered: dict[int, int] = dict.fromkeys(range(len(PARAMS)), 0)
        for bucket, rank in itertools.product(plan(world=3).buckets, range(3)):
            for fragment in plan(world=3).fragments(bucket.id, rank):
                offset = bucket.offsets[bucket.params.index(fragment.param)]
                start = offset + fragment.param_start - rank * bucket.shard_numel
                assert start == fragment.shard_start
                assert fragment.shard_start + fragment.length <= bucket.shard_numel
                covered[fragment.param] += fragment.length
        assert covered == {param: numel for param, (numel, *_) in enumerate(PARAMS)}

    @pytest.mark.parametrize(
        ("stage", "reduce", "publish"),
        [
            (0, ["reduce_scatter", "all_gather"], []),
            (1, ["reduce_scatter"], ["all_gather"]),
            (2, ["reduce_scatter"], ["all_gather"]),
            (3, ["reduce_scatter"], ["all_gather"]),
        ],
    )
    def test_the_hops_of_a_bucket_without_a_unit_follow_from_the_stage(
        self, stage: int, reduce: list[str], publish: list[str]
    ) -> None:
        made = plan(stage=stage, params=[*PARAMS[:-1], (5000, "f32", 0, 2)])
        for bucket in made.buckets:
            hops = [*bucket.reduce_hops, *bucket.publish_hops]
            assert [hop.op for hop in bucket.reduce_hops] == reduce
            assert [hop.op for hop in bucket.publish_hops] == publish
            assert {hop.group for hop in hops} == {"shard"}
            assert {hop.wire for hop in bucket.reduce_hops} == {bucket.wire}
            assert {hop.wire for hop in bucket.publish_hops} <= {None}

    def test_one_rank_has_nothing_to_gather(self) -> None:
        for bucket in plan(world=1, stage=0).buckets + plan(world=1).buckets:
            assert [hop.op for hop in bucket.reduce_hops] == ["reduce_scatter"]
            assert bucket.publish_hops == []

    @pytest.mark.parametrize(
        ("stage", "placements"),
        [
            (0, (False, False, False)),
            (1, (True, False, False)),
            (2, (True, True, False)),
            (3, (True, True, True)),
        ],
    )
    def test_a_stage_is_three_placements(
        self, stage: int, placements: tuple[bool, bool, bool]
    ) -> None:
        made = plan(stage=stage)
        assert (made.shards_optimizer, made.shards_gradient, made.shards_parameter) == placements

    def test_the_schedule_is_a_list_of_commands(self) -> None:
        made = plan(window=1)
        order = [bucket.id for bucket in made.buckets]
        assert made.schedule == [
            (kind, bucket) for bucket in order for kind in ("launch", "retire")
        ]
        assert (made.world, made.window, made.num_params) == (2, 1, len(PARAMS))
        assert plan().window == len(order)

    def test_equal_plans_have_equal_digests_and_others_do_not(self) -> None:
        others = [
            plan(stage=1),
            plan(world=3),
            plan(window=1),
            plan(cap_bytes=1024),
            plan(params=PARAMS[:-1]),
        ]
        digests = {plan().digest, *(other.digest for other in others)}
        assert plan().digest == plan().digest
        assert len(digests) == 1 + len(others)
        assert all(0 <= digest < 2**64 for digest in digests)

    def test_an_observed_order_moves_launches_and_nothing_else(self) -> None:
        made = plan()
        moved = made.reordered(list(range(len(PARAMS))))
        launched = [bucket for kind, bucket in moved.schedule if kind == "launch"]
        assert launched == [
            bucket.id for bucket in sorted(made.buckets, key=lambda bucket: max(bucket.params))
        ]
        assert [bucket.offsets for bucket in moved.buckets] == [
            bucket.offsets for bucket in made.buckets
        ]
        assert moved.digest != made.digest

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"world": 0}, "at least one rank"),
            ({"world": -1}, "unknown world -1"),
            ({"stage": 4}, "stage 4 does not exist"),
            ({"stage": -1}, "stage -1 does not exist"),
            ({"stage": 300}, "stage 300 does not exist"),
            ({"cap_bytes": 0}, "cap of a bucket must be positive"),
            ({"cap_bytes": None}, "needs a cap"),
            ({"cap_elements": 5}, "one cap"),
            ({"window": 0}, "window"),
            (
                {"params": [(1, "f32", 0, 0), (-5, "f32", 0, 0)]},
                "parameter 1 can not have -5 elements",
            ),
            (
                {"params": [(1, "f32", 0, 0), (5, "int8", 0, 0)]},
                'parameter 1 has dtype "int8": expected f32, f16, bf16 or f64',
            ),
            ({"params": [(2**62, "f64", 0, 0)]}, "parameter 0 makes its bucket longer"),
        ],
    )
    def test_what_can_not_be_planned_is_refused_with_the_reason(
        self, changes: dict[str, Any], why: str
    ) -> None:
        with pytest.raises(PlanError, match=why):
            plan(**changes)

    @pytest.mark.parametrize(
        ("ask", "why"),
        [
            (lambda made: made.fragments(99, 0), "unknown bucket 99"),
            (lambda made: made.fragments(-1, 0), "unknown bucket -1"),
            (lambda made: made.fragments(0, 2), "unknown rank 2"),
            (lambda made: made.reordered([6]), "unknown parameter 6"),
            (lambda made: made.reordered([-1]), "unknown parameter -1"),
        ],
    )
    def test_what_a_plan_does_not_have_is_refused(
        self, ask: Callable[[_core.Plan], object], why: str
    ) -> None:
        with pytest.raises(PlanError, match=why):
            ask(plan())


class TestReducer:
    @pytest.fixture
    def learnt(self) -> _core.Reducer:
        """A reducer whose first pass, the one that only observes, is over."""
        reducer = _core.Reducer(plan())
        reducer.begin()
        for param in reversed(range(len(PARAMS))):
            assert reducer.grad_ready(param) is None
        finished = reducer.finish()
        assert (finished.hi, finished.absent, finished.late) == (len(plan().schedule), [], [])
        return reducer

    def test_the_first_pass_observes_the_order_of_arrival(self, learnt: _core.Reducer) -> None:
        assert learnt.observed == [5, 4, 3, 2, 1, 0]
        learnt.reorder(plan().reordered(learnt.observed))
        assert not learnt.in_pass

    def test_a_pass_hands_out_the_list_in_consecutive_ranges(self, learnt: _core.Reducer) -> None:
        learnt.begin()
        assert learnt.in_pass
        ends = [learnt.grad_ready(param) for param in (5, 4, 3, 2, 1, 0)]
        ranges = [end for end in ends if end is not None]
        assert ranges == sorted(set(ranges))
        assert len(ranges) > 1
        assert ranges[-1] == learnt.finish().hi == len(plan().schedule)

    def test_what_never_came_is_named_and_what_came_late_too(self, learnt: _core.Reducer) -> None:
        first = plan().buckets[0].params
        learnt.begin()
        assert [learnt.grad_ready(param) for param in first][-1] is not None
        learnt.grad_ready(first[-1])
        finished = learnt.finish()
        assert finished.absent == [param for param in range(len(PARAMS)) if param not in first]
        assert finished.late == [first[-1]]

    def test_sentinels_stand_for_their_buckets_between_passes(self, learnt: _core.Reducer) -> None:
        everything = list(range(len(PARAMS)))
        assert learnt.watched == everything
        learnt.post_sentinels()
        last = {
            min(bucket.params) for bucket in plan().buckets
        }  # the last to come was the first in the model
        assert learnt.watched == sorted(last)
        learnt.begin()
        assert not learnt.observing
        assert [learnt.grad_ready(param) for param in reversed(learnt.watched)][-1] == len(
            plan().schedule
        )
        with pytest.raises(StepError):
            learnt.dismiss_sentinels()
        assert learnt.finish().absent == []
        learnt.dismiss_sentinels()
        assert learnt.watched == everything

    def test_everything_is_watched_while_a_pass_observes(self) -> None:
        reducer = _core.Reducer(plan())
        reducer.post_sentinels()
        reducer.begin()
        assert reducer.observing
        assert reducer.watched == list(range(len(PARAMS)))

    def test_a_stuck_pass_explains_itself(self, learnt: _core.Reducer) -> None:
        assert learnt.explain() is None
        learnt.begin()
        index, kind, bucket, lacking = learnt.explain() or pytest.fail(
            "in a pass there is something to explain"
        )
        assert (index, kind) == (0, "launch")
        assert lacking == sorted(plan().buckets[bucket].params)

    def test_inactive_parameters_are_not_waited_for(self, learnt: _core.Reducer) -> None:
        learnt.set_active([param == 5 for param in range(len(PARAMS))])
        learnt.begin()
        assert learnt.grad_ready(5) == len(plan().schedule)
        assert learnt.finish().absent == []

    def test_a_gradient_outside_a_pass_is_told_of_when_armed(self, learnt: _core.Reducer) -> None:
        assert [learnt.grad_ready(0), learnt.grad_ready(1)] == [None, None]
        learnt.arm()
        assert [learnt.grad_ready(0), learnt.grad_ready(1)] == [0, None]
        learnt.arm()
        learnt.disarm()
        assert learnt.grad_ready(0) is None

    def test_the_life_of_a_bucket_has_its_times_and_its_last_parameter(
        self, learnt: _core.Reducer
    ) -> None:
        assert learnt.life() == []
        learnt.begin()
        for now, param in enumerate((5, 4, 3, 2, 1, 0)):
            learnt.grad_ready_at(param, 100 + now)
        learnt.finish()
        assert sorted(learnt.life()) == [
            (
                bucket.id,
                105 - max(bucket.params),
                105 - sorted(bucket.params)[:2][-1],
                105 - min(bucket.params),
                min(bucket.params),
            )
            for bucket in plan().buckets
        ]

    @pytest.mark.parametrize(
        ("call", "why"),
        [
            (
                lambda reducer: reducer.finish(),
                "called between passes, but only allowed during a pass",
            ),
            (
                lambda reducer: (reducer.begin(), reducer.begin()),
                "called during a pass, but only allowed between",
            ),
            (
                lambda reducer: (reducer.begin(), reducer.set_active([True] * 6)),
                "only allowed between passes",
            ),
            (
                lambda reducer: (reducer.begin(), reducer.reorder(plan())),
                "only allowed between passes",
            ),
            (lambda reducer: reducer.set_active([True]), "each of 6 parameters, got 1"),
            (lambda reducer: reducer.reorder(plan(world=3)), "another layout"),
            (lambda reducer: reducer.grad_ready(6), "unknown parameter 6: the plan has 6"),
            (lambda reducer: reducer.grad_ready(-1), "unknown parameter -1"),
            (lambda reducer: reducer.grad_ready_at(2**40, 0), "unknown parameter 1099511627776"),
        ],
    )
    def test_a_call_that_does_not_fit_is_a_step_error(
        self, call: Callable[[_core.Reducer], object], why: str
    ) -> None:
        with pytest.raises(StepError, match=why):
            call(_core.Reducer(plan()))


class TestReshard:
    def test_shards_of_two_ranks_become_shards_of_three(self) -> None:
        """Moves the data: every parameter arrives whole, and padding stays zero."""
        source, target = plan(world=2), plan(world=3, cap_bytes=1024, params=PARAMS[::-1])
        came_from = list(reversed(range(len(PARAMS))))
        full = [torch.randn(numel) for numel, *_ in PARAMS]
        held = {
            (b.id, rank): torch.zeros(b.shard_numel) for b in source.buckets for rank in range(2)
        }
        for (bucket, rank), shard in held.items():
            for part in source.fragments(bucket, rank):
                values = full[part.param][part.param_start : part.param_start + part.length]
                shard[part.shard_start : part.shard_start + part.length] = values
        for bucket, rank in itertools.product(target.buckets, range(3)):
            filled = torch.zeros(bucket.shard_numel)
            for start, from_rank, from_bucket, at, length in _core.reshard(
                source,
                target,
                bucket=bucket.id,
                rank=rank,
                came_from=[came_from[param] for param in bucket.params],
            ):
                filled[start : start + length] = held[from_bucket, from_rank][at : at + length]
            expected = torch.zeros(bucket.shard_numel)
            for part in target.fragments(bucket.id, rank):
                values = full[came_from[part.param]][
                    part.param_start : part.param_start + part.length
                ]
                expected[part.shard_start : part.shard_start + part.length] = values
            assert torch.equal(filled, expected)

    def test_what_the_source_does_not_have_is_not_listed(self) -> None:
        made = plan()
        for bucket in made.buckets:
            assert (
                _core.reshard(
                    made, made, bucket=bucket.id, rank=0, came_from=[-1] * len(bucket.params)
                )
                == []
            )

    @pytest.mark.parametrize(
        ("came_from", "why"),
        [
            ([5, 1, 2, 3, 4, 0], "elements, its source has"),
            ([], r"each of \d parameters, got 0"),
            ([9] * 6, "unknown parameter 9"),
            ([-2] * 6, "unknown parameter -2"),
        ],
    )
    def test_plans_that_disagree_are_refused(self, came_from: list[int], why: str) -> None:
        with pytest.raises(PlanError, match=why):
            for bucket in plan().buckets:
                origins = [came_from[param] for param in bucket.params] if came_from else []
                _core.reshard(plan(), plan(), bucket=bucket.id, rank=0, came_from=origins)


class Endless(Sequence[tuple[int, str, int]]):
    """Says that it is longer than any list can be."""

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        return (1, "f32", 0, 0)


def test_a_panic_is_a_python_exception_and_the_process_goes_on() -> None:
    with pytest.raises(BaseException) as raised:
        _core.Plan(Endless(), world=1, stage=0, cap_bytes=1)
    assert type(raised.value).__name__ == "PanicException"
    assert "capacity overflow" in str(raised.value)
    assert plan().num_params == len(PARAMS)


def test_classes_are_read_only_and_final() -> None:
    with pytest.raises(TypeError):
        type("Mine", (_core.Plan,), {})
    with pytest.raises(AttributeError):
        plan().world = 3  # type: ignore[misc]


class TestUnits:
    MODULES = [(-1, []), (0, [0]), (0, []), (2, [1, 2]), (2, [3]), (0, [4, 0])]  # noqa: RUF012

    def test_units_are_runs_of_subtrees(self) -> None:
        assert _core.cut_units(self.MODULES, [4, 2, 1, 3, 4], cap=6) == [0, 1, 1, 1, 2]
        assert _core.cut_units(self.MODULES, [4, 2, -1, 3, 4, 9], cap=3) == [0, 1, None, 2, 3, None]

    def test_a_tree_that_is_none_is_refused(self) -> None:
        with pytest.raises(PlanError, match="module 0 does not stand behind its parent"):
            _core.cut_units([(0, [])], [], cap=1)
        with pytest.raises(PlanError, match="unknown parameter 1: the plan has 1"):
            _core.cut_units([(-1, [1])], [1], cap=1)
        with pytest.raises(PlanError, match="unknown parameter -1"):
            _core.cut_units([(-1, [-1])], [1], cap=1)
        with pytest.raises(PlanError, match="the cap of a bucket must be positive"):
            _core.cut_units([], [], cap=0)

    def test_a_unit_is_whole_buckets_and_the_rest_is_replicated(self) -> None:
        units = [0, 0, 1, 1, 1, None]
        made = plan(stage=3, units=units)
        for bucket in made.buckets:
            assert {units[param] for param in bucket.params} == {bucket.unit}
            assert bucket.sharded == (bucket.unit is not None) == (bucket.publish_hops == [])
        for unit in made.units:
            whole = [bucket for bucket in made.buckets if bucket.unit == unit.id]
            assert unit.buckets == [bucket.id for bucket in whole]
            assert unit.params == [param for bucket in whole for param in bucket.params]
            assert unit.numel == sum(bucket.numel for bucket in whole)
        assert [unit.id for unit in made.units] == [0, 1]
        assert made.digest != plan(stage=3).digest

    @pytest.mark.parametrize(
        ("stage", "units", "message"),
        [
            (2, [0] + [None] * 5, "parameter 0 is in a unit, but at this stage"),
            (3, [6] + [None] * 5, "parameter 0 is in unit 6, beyond the number of parameters"),
            (3, [-1] + [None] * 5, "unknown unit -1"),
            (3, [0], "expected one entry for each of 6 parameters, got 1"),
        ],
    )
    def test_units_without_sense_are_refused(
        self, stage: int, units: list[int | None], message: str
    ) -> None:
        with pytest.raises(PlanError, match=message):
            plan(stage=stage, units=units)


def route(kind: int, key: int, then: int, stops: list[list[int]], fills: list[int]) -> list[int]:
    """As `Gatherer.routes` writes it, nothing held."""
    words = [kind, key, int(then > 0), then, len(stops)]
    for units in stops:
        words += [len(units), *units, 0]
    return [*words, len(fills) // 2, *fills]


class TestLists:
    FORTH = route(1, 1, 2, [[0], [1]], [])
    BACK = route(2, 2, 0, [[1], [0]], [0, 0, 1, 1])

    def made(self) -> _core.Plan:
        params = [(200, "f32", 0, 0)] * 2
        split = plan(params=params, stage=3, units=[0, 1], cap_elements=256, cap_bytes=None)
        return split.routed([self.FORTH, self.BACK], room=1000, depth=1)

    def test_lists_are_made_from_routes(self) -> None:
        forward, local, backward = self.made().lists
        assert forward.commands == [("need", 0), ("gather", 0), ("gather", 1), ("need", 1)]
        assert (forward.kind, forward.key, forward.start, forward.end) == ("forward", 1, [], [0, 1])
        assert (backward.kind, backward.key, backward.start) == ("backward", 2, [0, 1])
        assert backward.stops == local.stops == [[1], [0]]
        assert (backward.end, local.kind) == ([], "local_backward")
        assert [c for c in backward.commands if c[0] == "launch"] == [("launch", 0), ("launch", 1)]
        assert [c for c in local.commands if c[0] == "launch"] == []

    def test_a_program_is_the_schedule_as_integers(self) -> None:
        verbs = {"launch": 0, "retire": 1}
        made = self.made()
        assert made.program == [4 * bucket + verbs[kind] for kind, bucket in made.schedule]
        assert made.reordered([]).lists == []

    def test_a_reducer_follows_a_list(self) -> None:
        made = self.made()
        reducer = _core.Reducer(made)
        reducer.begin(observe=True)
        assert reducer.observing
        assert reducer.grad_ready(1) is None
        assert reducer.grad_ready(0) is None
        reducer.finish()
        reducer.begin(list=2)
        assert reducer.grad_ready(1) is None
        assert reducer.explain() == (0, "need", 0, [])
        assert reducer.finish().hi == len(made.lists[2].commands)
        with pytest.raises(StepError, match="unknown list 3: the plan has 3"):
            reducer.begin(list=3)

    def test_what_is_no_route_is_refused(self) -> None:
        for words in [[], [1, 2, 3], [*self.BACK, 0], route(1, 1, 0, [[2]], [])]:
            with pytest.raises(PlanError, match="a route names a unit or a bucket"):
                self.made().routed([words], room=1, depth=1)
