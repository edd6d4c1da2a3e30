"""What the ranks know after a vote."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ranks
from zerort.mesh import connect
from zerort.step.vote import Ballot, Verdict, vote

pytestmark = pytest.mark.timeout(60)
NOBODY: tuple[int, ...] = ()


def _vote(rank: int, world: int, groups: dict[str, Any] | None) -> Verdict:
    mesh = connect(timedelta(seconds=30), torch.device("cpu"), groups)
    buckets = [SimpleNamespace(squares=9.0), SimpleNamespace(squares=torch.tensor(16.0))]
    flat: Any = SimpleNamespace(trained=buckets)
    verdict = vote(mesh, flat, Ballot(unreduced=rank, poisoned=rank == 1, fingerprint=2**63 + 1))
    mesh.close()
    return verdict


def test_the_norm_is_over_the_shards_of_all_ranks() -> None:
    for verdict in ranks.run(2, _vote, None):
        assert verdict.norm == pytest.approx(50**0.5, rel=1e-6)
        assert (verdict.unreduced, verdict.poisoned, verdict.mismatched) == (1, (1,), NOBODY)


def test_what_several_ranks_hold_alike_enters_the_norm_once() -> None:
    replicas = {"shard": [[0], [1]], "replica": [[0, 1]]}
    for verdict in ranks.run(2, _vote, replicas):
        assert verdict.norm == 5.0
