"""Ranks find one another at every start of a job, whatever an earlier one has left in the store."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from zerort.errors import CommError
from zerort.mesh.rendezvous import _name_of_this_start

pytestmark = pytest.mark.timeout(60)
SOON = timedelta(seconds=10)


@pytest.fixture(autouse=True)
def address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    monkeypatch.setenv("MASTER_PORT", "29400")


def start(store: dist.Store, ranks: Sequence[int], world: int, timeout: timedelta = SOON) -> list:
    """The name that each of `ranks` learns, or the error it raises."""

    def come(rank: int) -> str | CommError:
        try:
            return _name_of_this_start(store, rank, world, timeout)
        except CommError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(come, ranks))


def test_all_ranks_of_a_start_learn_one_name_and_the_next_start_another() -> None:
    store = dist.HashStore()
    first, second, fewer = (start(store, range(world), world) for world in (3, 3, 2))
    assert len({*first}) == len({*second}) == len({*fewer}) == 1
    assert len({*first, *second, *fewer}) == 3


def test_words_of_ranks_whose_start_failed_do_not_confuse_the_next() -> None:
    """Rank 0 of the first start never came; in the second, ranks 1 and 2 come after rank 0 has
    answered what their predecessors left.
    """
    store = dist.HashStore()
    assert all(
        isinstance(error, CommError) for error in start(store, (1, 2), 3, timedelta(seconds=0.2))
    )
    names: list[str] = []
    first = threading.Thread(
        target=lambda: names.append(_name_of_this_start(store, 0, 3, SOON)), daemon=True
    )
    first.start()
    first.join(0.2)
    assert first.is_alive(), "rank 0 went on although nobody of this start has come"
    names += start(store, (1, 2), 3)
    first.join(10)
    assert len(names) == 3 and len({*names}) == 1


def test_a_rank_that_does_not_come_is_named_with_the_address_of_the_store() -> None:
    found = start(dist.HashStore(), (0, 1, 3), 4, timedelta(seconds=0.5))
    assert "1 did not come" in str(found[0]) and "first of them 2" in str(found[0])
    assert "10.0.0.7:29400" in str(found[0])
    (alone,) = start(dist.HashStore(), (1,), 2, timedelta(seconds=0.2))
    assert "rank 0 did not come" in str(alone) and "10.0.0.7:29400" in str(alone)
