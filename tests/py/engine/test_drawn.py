"""Random models, parameters used at random on each rank, random bucket sizes and windows: always
the twin.

The draws are the same in every run, and a failing one is shrunk to the plainest configuration that
still fails.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ranks
from cases import DRAWN
from training import assert_same, train, twin_of


@pytest.mark.parametrize(("stage", "reduce_at"), [(0, None), (1, None), (2, None), (2, "boundary")])
@settings(max_examples=5, derandomize=True)
@given(
    name=st.sampled_from(list(DRAWN)),
    accumulation=st.sampled_from([1, 2, 4]),
    bucket=st.sampled_from([10_000, 700, 150, 40, 1]),
    window=st.sampled_from(["all", 3, 2, 1]),
)
def test_a_drawn_model_trains_like_the_twin(
    stage: int, reduce_at: str | None, name: str, accumulation: int, bucket: int, window: Any
) -> None:
    changes = {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket},
        "zerort": {"window": window, "reduce_at": reduce_at},
    }
    assert_same(ranks.shared(2, train, name, accumulation, changes), twin_of(name, 2, accumulation))
