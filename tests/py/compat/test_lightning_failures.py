"""A rank that fails beside one that waits in a collective of Lightning's: that one hears why."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import ranks

pytestmark = [
    pytest.mark.timeout(170),
    pytest.mark.skipif(
        find_spec("pytorch_lightning") is None, reason="pytorch-lightning is not installed"
    ),
]
WORDS = {
    "in step": "in step",
    "in backward": "in backward",
    "in validation": "in validation",
    "in callback": "in callback",
    "between batches": "between batches",
    "saved on exception": "in step",
}
FIRST = "between batches"
"""Where rank 0 is the one that fails."""
SECONDS = 15.0
"""In which all is over; zerort.timeout is 40 there, Lightning's 1800."""


def _going_on(rank: int, world: int, stages: list[int], folder: str) -> dict[int, Any]:
    import lightning_failures

    return {stage: lightning_failures.goes_on(stage, Path(folder)) for stage in stages}


@pytest.mark.parametrize(
    "stages", [[3], pytest.param([0, 1, 2], marks=pytest.mark.slow)], ids=["3", "0 to 2"]
)
def test_who_waits_hears_the_reason_of_a_rank_whose_process_goes_on(
    stages: list[int], tmp_path: Path
) -> None:
    waits, fails = ranks.run(2, _going_on, stages, str(tmp_path), timeout=160)
    for stage in stages:
        for case, word in WORDS.items():
            both = waits[stage][case], fails[stage][case]
            (heard, seconds), (raised, longest) = both[::-1] if case == FIRST else both
            assert heard.startswith(("CommError: ", "StepError: ")), (stage, case)
            assert f"KeyError: '{word}'" in heard, (stage, case)
            assert raised == f"KeyError: '{word}'" or case == "saved on exception", (stage, case)
            assert max(seconds, longest) < SECONDS, (stage, case)
        for found in (waits, fails):
            assert found[stage]["after"][0] == "6", "the next fit works"


def _ending(rank: int, world: int) -> tuple[str, float]:
    import lightning_failures

    return lightning_failures.goes(2)


@pytest.mark.slow
def test_a_rank_in_a_log_hears_why_another_has_gone() -> None:
    waits, fails = ranks.attempt(2, _ending, timeout=80)
    assert isinstance(fails, ranks.Raised) and fails.kind == "KeyError", fails
    assert isinstance(waits, ranks.Returned), waits
    heard, seconds = waits.value
    assert heard.startswith("CommError: rank 0: reduce of Lightning's failed: rank 1 has failed: ")
    assert "KeyError: 'in step'" in heard
    assert seconds < SECONDS
