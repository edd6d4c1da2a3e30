"""Every case of the table on two ranks: trained once in every way, and held against the naive twin
and, to the bit, against itself.

The ways of a case are trained one after another in one group, a few cases in each; all tests here
read what came out.
"""

import pytest

import ranks
from reference import Precision
from table import FAR_APART, LATER, SOON, STAGES, Run, reduction, trained_in_every_way
from training import assert_same, at_stage, digest, train_all, twin_of


def marked(runs: list[Run]) -> list[object]:
    return [pytest.param(*run, marks=pytest.mark.slow if run in LATER else ()) for run in runs]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("name", "gas"), marked(SOON + LATER))
def test_two_ranks_train_like_the_twin(name: str, gas: int, stage: int) -> None:
    expected = twin_of(name, 2, gas, Precision(gathers_sums=stage == 0), reduction(stage))
    assert_same(trained_in_every_way(name, gas)[stage], expected)


# Which bucket has left when a gradient comes more often than it did depends on the buckets; the
# rest is summed later.
ALIKE = [run for run in SOON + LATER if run[0] != "reused_more_often_checkpointed_reentrant"]


@pytest.mark.parametrize(("name", "gas"), marked(ALIKE))
def test_no_case_of_the_table_changes_a_bit(name: str, gas: int) -> None:
    at_boundary: list[str | int] = [0, 1, 2] if gas == 1 else [0, 1, *FAR_APART]
    if name == "mixed_dtypes":
        # What is not fp32 is rounded once more at stage 0, where the sums are gathered.
        at_boundary = [way for way in at_boundary if str(way).removeprefix("stage_")[0] != "0"]
    found = trained_in_every_way(name, gas)
    digests = {way: [digest(history) for history in found[way]] for way in at_boundary}
    assert len({each for of_all in digests.values() for each in of_all}) == 1, digests


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for name, _ in ALIKE}))
def test_no_case_of_the_table_changes_a_bit_far_apart_with_one_micro_batch(name: str) -> None:
    ways = [way for label, way in FAR_APART.items() if name != "mixed_dtypes" or "_0" not in label]
    found = ranks.run(2, train_all, name, 1, [at_stage(1), *ways])
    assert len({each for of_rank in found for each in of_rank}) == 1
