"""Which rank's work a prediction is made from."""

from __future__ import annotations

import pytest

from zerort.tune.fit import Line
from zerort.tune.host import Host
from zerort.tune.profile import Profile, slowest

NOTHING = Host(Line(0.0, 0.0), Line(0.0, 0.0), None)


def profile(*steps: float, other: float = 0.0) -> Profile:
    """Of a rank that computed so long in each step, and waited 1 s."""
    middle = sorted(steps)[len(steps) // 2]
    return Profile(middle + 1.0, 1.0, 1, 0.0, 0.0, 0.0, 0.0, 0.0, other, (), NOTHING, steps)


def test_the_others_wait_for_the_rank_that_computes_longest() -> None:
    slow = profile(3.0, 3.0, 3.0)
    assert slowest([profile(1.0, 1.0, 1.0), slow]) == slow


def test_where_ranks_are_slow_in_turn_a_step_takes_what_the_slowest_in_it_does() -> None:
    """Each computes 1 s in most steps, but in most steps one of them 2 s."""
    ranks = [profile(2.0, 1.0, 1.0, 2.0, 1.0), profile(1.0, 2.0, 1.0, 1.0, 2.0, other=0.25)]
    found = slowest(ranks)
    assert found.other == pytest.approx(ranks[0].other + 1.0)
    assert found.wall == 2.0


def test_steps_of_different_number_are_compared_as_far_as_all_have_them() -> None:
    assert slowest([profile(1.0), profile(1.0, 5.0, 5.0)]).other == 0.0
