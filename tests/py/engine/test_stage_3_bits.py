"""Stage 3 gives stage 2's numbers, to the bit, however little room there is."""

import pytest
import torch

from cases import CASES
from table import EVERYTHING, LATE, REFUSED, Batches, Run, at_stage_3, halved
from training import Config, digest

ALIKE = [name for name in CASES if name not in REFUSED | LATE]


WAYS: dict[str, Config] = {
    "stage_2": {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 150},
        "zerort": {"reduce_at": "micro_batch"},
    },
    "one_unit": at_stage_3(1, bucket=1),
    "some_units": at_stage_3(1500),
}
MORE_WAYS = {**WAYS, "everything": at_stage_3(EVERYTHING)}

SOON, LATER = halved(ALIKE)
LATE_RUNS: list[Run] = [(name, gas) for name in sorted(LATE) for gas in (1, 3)]


def _batches(runs: list[Run], ways: dict[str, Config]) -> Batches:
    return Batches(2, {run: (*run, list(ways.values())) for run in runs}, 8)


_soon, _later = _batches(SOON + LATE_RUNS, WAYS), _batches(LATER, MORE_WAYS)
_on_more = {
    world: Batches(
        world,
        {
            name: (name, 1, list(MORE_WAYS.values()))
            for name in ("gpt_clipped", "odd_shapes_with_adamw", "tied", "groups")
        },
        4,
    )
    for world in (1, 3, 4)
}


def assert_alike(found: list[list[object]], ways: dict[str, Config]) -> None:
    digests = {
        way: {digest(history) for history in of_ranks}  # type: ignore[arg-type]
        for way, of_ranks in zip(ways, found, strict=True)
    }
    assert len(set().union(*digests.values())) == 1, digests


@pytest.mark.parametrize(("name", "gas"), SOON)
def test_stage_3_changes_no_bit_of_a_case(name: str, gas: int) -> None:
    assert_alike(_soon[name, gas], WAYS)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gas"), LATER)
def test_neither_with_the_other_number_of_accumulation_steps(name: str, gas: int) -> None:
    assert_alike(_later[name, gas], MORE_WAYS)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "gas"), LATE_RUNS)
def test_late_gradients_are_summed_all_the_same(name: str, gas: int) -> None:
    stage_2, *others = (of_ranks[0] for of_ranks in _soon[name, gas])
    for history in others:
        for there, here in zip(stage_2.weights, history.weights, strict=True):
            for weight, values in there.items():
                torch.testing.assert_close(here[weight], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "world", [3, *(pytest.param(more, marks=pytest.mark.slow) for more in (1, 4))]
)
@pytest.mark.parametrize("name", ["gpt_clipped", "odd_shapes_with_adamw", "tied", "groups"])
def test_neither_does_it_on_other_numbers_of_ranks(name: str, world: int) -> None:
    assert_alike(_on_more[world][name], MORE_WAYS)  # type: ignore[arg-type]
