"""Equal to the bit: stages, bucket sizes and windows are ways to get the same numbers, not other
numbers.

All variants of a case are trained one after another in one group; every variant is a test of its
own against the first.
"""

import pytest

import ranks
from table import EVERYTHING
from training import Config, train_all

BUCKETS = {"one_parameter_a_bucket": 1, "small_buckets": 150, "one_bucket": EVERYTHING}
WINDOWS = {
    "one_parameter_a_bucket": [1, "all"],
    "small_buckets": [1, 2, "all"],
    "one_bucket": ["all"],  # which is 1
}


def variants_at(stages: list[int], reduce_at: str) -> dict[str, Config]:
    """Stages x bucket sizes x windows; the first is the one the others are held against."""
    return {
        f"stage_{stage}-{label}-window_{window}": {
            "zero_optimization": {"stage": stage, "reduce_bucket_size": size},
            "zerort": {"window": window, "reduce_at": reduce_at},
        }
        for stage in stages
        for label, size in BUCKETS.items()
        for window in WINDOWS[label]
    }


AT_BOUNDARY = variants_at([0, 1, 2], "boundary")
AT_MICRO_BATCH = variants_at([2], "micro_batch")


@ranks.once(maxsize=None)
def digests(world: int, name: str, gas: int, reduce_at: str) -> dict[str, str]:
    """What every variant ended with."""
    variants = AT_BOUNDARY if reduce_at == "boundary" else AT_MICRO_BATCH
    results = ranks.run(world, train_all, name, gas, list(variants.values()), timeout=120)
    assert all(result == results[0] for result in results), "the ranks ended with different weights"
    return dict(zip(variants, results[0], strict=True))


def digest_of(variant: str, world: int, name: str, gas: int, reduce_at: str) -> str:
    return digests(world, name, gas, reduce_at)[variant]


@pytest.mark.parametrize("variant", AT_BOUNDARY)
@pytest.mark.parametrize(
    ("name", "gas"),
    [
        ("gpt_clipped", 1),
        ("odd_shapes_with_adamw", 3),
        ("unused_on_one_rank", 3),
        pytest.param("gpt_clipped", 3, marks=pytest.mark.slow),
        pytest.param("odd_shapes_with_adamw", 1, marks=pytest.mark.slow),
        pytest.param("unused_on_one_rank", 1, marks=pytest.mark.slow),
    ],
)
def test_stage_bucket_size_and_window_change_no_bit(name: str, gas: int, variant: str) -> None:
    first = next(iter(AT_BOUNDARY))
    assert digest_of(variant, 2, name, gas, "boundary") == digest_of(
        first, 2, name, gas, "boundary"
    )


@pytest.mark.parametrize("variant", AT_BOUNDARY)
def test_neither_do_they_on_three_ranks(variant: str) -> None:
    first = next(iter(AT_BOUNDARY))
    assert digest_of(variant, 3, "groups", 1, "boundary") == digest_of(
        first, 3, "groups", 1, "boundary"
    )


@pytest.mark.parametrize("variant", AT_MICRO_BATCH)
@pytest.mark.parametrize("name", ["gpt_clipped", "another_used_each_micro_batch"])
def test_neither_do_they_when_every_micro_batch_is_reduced(name: str, variant: str) -> None:
    first = next(iter(AT_MICRO_BATCH))
    assert digest_of(variant, 2, name, 3, "micro_batch") == digest_of(
        first, 2, name, 3, "micro_batch"
    )


@pytest.mark.parametrize("variant", AT_MICRO_BATCH)
def test_with_one_micro_batch_both_times_of_reduction_agree(variant: str) -> None:
    first = next(iter(AT_BOUNDARY))
    assert digest_of(variant, 2, "gpt_clipped", 1, "micro_batch") == digest_of(
        first, 2, "gpt_clipped", 1, "boundary"
    )


def test_the_comparison_notices_another_number() -> None:
    first = next(iter(AT_MICRO_BATCH))
    assert digest_of(first, 2, "gpt_clipped", 1, "micro_batch") != digest_of(
        first, 2, "gpt_clipped", 3, "micro_batch"
    )
