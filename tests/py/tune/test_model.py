"""Steps with other buckets are predicted from one measured plan: against figures that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from zerort import _core
from zerort.tune.fit import Line
from zerort.tune.host import Host
from zerort.tune.model import Predictor, best
from zerort.tune.profile import Profile
from zerort.tune.wire import Wire

PARAMS = 600
"""Of 1024 elements."""
TINY, MORE, ALL = 16 << 10, 256 << 10, 1 << 30
"""Bytes of a bucket: 150 buckets, 10, one."""


def plan(nbytes: int, *, world: int = 2, stage: int = 2, params: int = PARAMS) -> _core.Plan:
    return _core.Plan([(1024, "f32", 0, 0)] * params, world=world, stage=stage, cap_bytes=nbytes)


@dataclass(frozen=True)
class Truth:
    """What a rank does, in seconds: of a bucket, and of a byte or element."""

    pack: Line
    sums: Line
    update: Line
    backward: float = 0.12
    micro_batches: int = 1

    def step(self, of: _core.Plan) -> dict[str, float]:
        """What is measured of it, with a plan."""
        launches = len(of.buckets)
        passes = self.micro_batches if of.reduces_every_micro_batch else 1
        numel = sum(bucket.numel for bucket in of.buckets)
        owned = numel / of.world if of.shards_optimizer else numel
        hops = sum(hop.group != "own" for hop in of.buckets[0].reduce_hops)
        pack = self.pack.alpha * launches + self.pack.beta * 4 * numel
        sums = self.sums.alpha * launches * hops + self.sums.beta * 4 * numel * (hops > 0)
        update = self.update.alpha * launches + self.update.beta * owned
        return {"reducing": passes * (pack + sums), "update": update}

    def profile(self, of: _core.Plan, host: Host) -> Profile:
        """Of a run with a plan."""
        step = self.step(of)
        computed = 0.04 + self.backward
        wall = self.micro_batches * computed + 0.01 + sum(step.values())
        arrivals = [self.backward * (PARAMS - at) / PARAMS for at in range(PARAMS)]
        return Profile(
            wall=wall,
            exposed=0.0,
            micro_batches=self.micro_batches,
            forward=0.04,
            backward=self.backward,
            reducing=step["reducing"],
            update=step["update"],
            publishing=0.0,
            other=0.01,
            arrivals=tuple(arrivals),
            host=host,
        )

    def host(self, cold: float = 1.0) -> Host:
        """As it is tried: a bucket costs so many times as much in a step."""
        return Host(
            self.pack.times(1 / cold, 1.0),
            self.sums.times(1 / cold, 1.0),
            self.update.times(1 / cold, 1.0),
        )


TRUTH = Truth(Line(4e-4, 5e-10), Line(1e-4, 3e-10), Line(1e-3, 1e-8))
FREE = Wire(2, Line(0.0, 0.0), Line(0.0, 0.0), 0.0)


def predictor(of: _core.Plan, profile: Profile, wire: Wire = FREE) -> Predictor:
    return Predictor(wire, profile, of, blocks=True, sums_pieces=True)


def walls(truth: Truth, caps: Sequence[int], **changes: int) -> list[float]:
    return [truth.profile(plan(cap, **changes), truth.host()).wall for cap in caps]


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_each_bucket_costs_is_taken_out_with_it(
    stage: int, micro_batches: int, world: int
) -> None:
    """Exactly, where buckets cost in a step what they cost when they are tried."""
    truth = replace(TRUTH, micro_batches=micro_batches)
    caps = [TINY, MORE, ALL]
    wire = replace(FREE, ranks=world)
    expected = walls(truth, caps, stage=stage, world=world)
    for cap in caps:
        of = plan(cap, stage=stage, world=world)
        model = predictor(of, truth.profile(of, truth.host()), wire)
        found = [model.seconds(plan(cap, stage=stage, world=world)) for cap in caps]
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cold", [0.5, 2.0, 8.0, 15.0])
def test_a_step_finds_buckets_dearer_than_they_were_tried(cold: float) -> None:
    """The plan that was measured is predicted as it was, and one bucket for the whole near to what
    it takes.
    """
    tiny, _, whole = walls(TRUTH, [TINY, MORE, ALL])
    model = predictor(plan(TINY), TRUTH.profile(plan(TINY), TRUTH.host(cold)))
    assert model.seconds(plan(TINY)) == pytest.approx(tiny, rel=1e-4)
    assert model.seconds(plan(ALL)) == pytest.approx(whole, rel=0.1)
    assert model.seconds(plan(ALL)) < model.seconds(plan(MORE)) < model.seconds(plan(TINY))


@pytest.mark.parametrize("slow", [0.8, 1.3])
def test_what_bytes_take_longer_is_not_put_down_to_a_few_large_buckets(slow: float) -> None:
    """Memory was faster or slower while a step ran than while bytes were tried."""
    truth = Truth(Line(1e-4, 5e-9), Line(1e-5, 3e-9), Line(2e-4, 2e-7))
    host = truth.host()
    host = Host(*(line.times(1.0, 1 / slow) for line in (host.pack, host.sums, truth.update)))
    few, more = plan(1 << 20), plan(MORE)
    model = predictor(few, truth.profile(few, host))
    (expected,) = walls(truth, [MORE])
    assert model.seconds(more) == pytest.approx(expected, rel=0.03)


def test_larger_buckets_are_proposed_where_many_tiny_ones_are_updated_one_by_one() -> None:
    wire = Wire(2, Line(5e-4, 4e-10), Line(9e-4, 4e-10), 2e-3, lanes=2)
    model = predictor(plan(TINY), TRUTH.profile(plan(TINY), TRUTH.host(8.0)), wire)
    found = best(model, lambda _: plan(TINY))
    assert found.setting.bucket_bytes > 16 * TINY
    assert found.seconds < 0.75 * model.seconds(plan(TINY))


def test_buckets_stay_as_they_are_where_one_costs_nothing() -> None:
    truth = Truth(Line(0.0, 1e-9), Line(0.0, 0.0), Line(0.0, 1e-8))
    model = predictor(plan(TINY), truth.profile(plan(TINY), truth.host()))
    assert model.seconds(plan(ALL)) >= model.seconds(plan(TINY))


def test_before_the_first_update_it_counts_as_it_was_tried() -> None:
    """As where fp16 has skipped the steps that were observed."""
    of = plan(TINY)
    profile = replace(TRUTH.profile(of, TRUTH.host()), update=0.0)
    model = predictor(of, profile)
    assert model.prediction(of).update_ns == pytest.approx(1e9 * TRUTH.step(of)["update"], rel=1e-4)
    posting = predictor(of, profile, replace(FREE, start_gather=1e-3))
    more = posting.prediction(of).update_ns - model.prediction(of).update_ns
    assert more == pytest.approx(1e6 * len(of.buckets))
    # at stage 0 nothing is published
    whole = plan(TINY, stage=0)
    costs = [
        predictor(whole, profile, wire).prediction(whole).update_ns
        for wire in (FREE, replace(FREE, start_gather=1e-3))
    ]
    assert costs[0] == costs[1]


def test_an_update_that_cannot_be_tried_counts_by_its_elements() -> None:
    host = replace(TRUTH.host(), update=None)
    of = plan(TINY)
    model = predictor(of, TRUTH.profile(of, host), replace(FREE, start_gather=1e-3))
    updates = [model.prediction(plan(cap)).update_ns for cap in (TINY, ALL)]
    assert updates == pytest.approx([1e9 * TRUTH.step(of)["update"]] * 2, rel=1e-2)
    sent = predictor(of, replace(TRUTH.profile(of, host), publishing=1e-3 * len(of.buckets)))
    for cap in (TINY, ALL):
        more = sent.prediction(plan(cap)).update_ns - model.prediction(plan(cap)).update_ns
        assert more == pytest.approx(1e6 * len(plan(cap).buckets)), "publishing is a bucket's"
    unseen = predictor(of, replace(TRUTH.profile(of, host), update=0.0))
    assert unseen.prediction(plan(ALL)).update_ns == 0
    sending = replace(unseen, wire=replace(FREE, start_gather=1e-3))
    assert sending.prediction(of).update_ns == 1e6 * len(of.buckets)


def test_a_model_that_has_nothing_to_reduce_or_update_is_predicted() -> None:
    """All is frozen, or all parameters are empty."""
    held = _core.Plan([(1024, "f32", None, 0)] * 4, world=2, stage=2, cap_bytes=64)
    empty = _core.Plan([(0, "f32", 0, 0)] * 4, world=2, stage=2, cap_bytes=64)
    for of in (held, empty):
        profile = replace(
            TRUTH.profile(of, TRUTH.host()), arrivals=(0.0,) * 4, reducing=0.0, update=0.0
        )
        least = profile.forward + profile.backward + profile.other
        assert predictor(of, profile).seconds(of) >= least


def test_all_that_may_be_under_way_is_no_window() -> None:
    """Whatever number of buckets that is now."""
    model = predictor(plan(ALL), TRUTH.profile(plan(ALL), TRUTH.host()))
    assert best(model, lambda _: plan(ALL)).setting.window is None
