"""Stage 3 gives stage 2's numbers, to the bit, however little room there is."""

import pytest
import torch

from cases import CASES
from table import EVERYTHING, LATE, REFUSED, Batches, at_stage_3
from training import Config, digest

ALIKE = [name for name in CASES if name not in REFUSED | LATE]


WAYS: dict[str, Config] = {
    "stage_2": {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 150},
        "zerort": {"reduce_at": "micro_batch"},
    },
    "one_unit": at_stage_3(1, bucket=1),
    "some_units": at_stage_3(1500),
    "everything": at_stage_3(EVERYTHING),
}

_on_two = Batches(
    2,
    {(name, gas): (name, gas, list(WAYS.values())) for name in (*ALIKE, *LATE) for gas in (1, 3)},
    8,
)
_on_more = {
    world: Batches(
        world,
        {
            name: (name, 1, list(WAYS.values()))
            for name in ("gpt_clipped", "odd_shapes_with_adamw", "tied", "groups")
        },
        4,
    )
    for world in (1, 3, 4)
}


def assert_alike(found: list[list[object]]) -> None:
    digests = {
        way: {digest(history) for history in of_ranks}  # type: ignore[arg-type]
        for way, of_ranks in zip(WAYS, found, strict=True)
    }
    assert len(set().union(*digests.values())) == 1, digests


@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("name", ALIKE)
def test_stage_3_changes_no_bit_of_a_case(name: str, gas: int) -> None:
    assert_alike(_on_two[name, gas])  # type: ignore[arg-type]


@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("name", sorted(LATE))
def test_late_gradients_are_summed_all_the_same(name: str, gas: int) -> None:
    stage_2, *others = (of_ranks[0] for of_ranks in _on_two[name, gas])
    for history in others:
        for there, here in zip(stage_2.weights, history.weights, strict=True):
            for weight, values in there.items():
                torch.testing.assert_close(here[weight], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["gpt_clipped", "odd_shapes_with_adamw", "tied", "groups"])
def test_neither_does_it_on_other_numbers_of_ranks(name: str, world: int) -> None:
    assert_alike(_on_more[world][name])  # type: ignore[arg-type]
