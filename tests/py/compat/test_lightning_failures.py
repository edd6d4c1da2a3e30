"""A rank that fails beside one that waits in a collective of Lightning's: that hears why."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

import ranks

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        find_spec("pytorch_lightning") is None, reason="pytorch-lightning is not installed"
    ),
]


def _broken(rank: int, world: int) -> tuple[str, float]:
    import lightning_failures

    return lightning_failures.broken(2)


def test_a_rank_in_a_log_hears_why_another_has_gone() -> None:
    waits, fails = ranks.attempt(2, _broken, timeout=80)
    assert isinstance(fails, ranks.Raised) and fails.kind == "KeyError", fails
    assert isinstance(waits, ranks.Returned), waits
    heard, seconds = waits.value
    assert heard.startswith("CommError: rank 0: reduce of Lightning's failed: rank 1 (process ")
    assert "gave its engine back after KeyError: 'batch 2' (lightning_failures.py:" in heard
    assert seconds < 30, "soon after the process has gone"
