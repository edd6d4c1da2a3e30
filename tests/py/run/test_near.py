"""When a unit may be gathered from what its host has kept."""

from zerort.run.secondary import Near


def test_a_gather_is_near_once_all_buckets_of_an_earlier_one_are_kept() -> None:
    near = Near(2)
    assert not near.begin()
    near.note(0)
    assert not near.begin()
    near.note(0)
    near.note(1)
    assert near.begin() and near.begin()


def test_what_is_forgotten_is_gathered_from_all_ranks_once() -> None:
    near = Near(1)
    near.begin()
    near.note(0)
    near.forget()
    assert not near.begin()
    near.note(0)
    assert near.begin()


def test_a_gather_that_was_under_way_when_values_were_replaced_is_not_kept() -> None:
    near = Near(1)
    near.begin()
    near.forget()
    near.note(0)  # it brings the values of before
    assert not near.begin()
