"""`initialize(training_data=...)`: every sample once an epoch over the ranks, and a place that any
number of ranks goes on from.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset, get_worker_info

import ranks
import zerort
from logged import log_lines
from zerort.config.runtime import Loader
from zerort.errors import CheckpointError, ConfigError, StepError
from zerort.start.loader import TrainingLoader

SAMPLES = 22


def numbers(count: int = SAMPLES) -> TensorDataset:
    return TensorDataset(torch.arange(count, dtype=torch.float32).reshape(-1, 1))


def _initialize(data: Any = None, **more: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        **more.pop("changes", {}),
    }
    data = numbers() if data is None else data
    return zerort.initialize(
        model=nn.Linear(1, 1), training_data=data, **{"config": config, **more}
    )


def loader_of(
    data: Any, rank: int = 0, world: int = 1, micro: int = 3, **more: Any
) -> TrainingLoader:
    """The loader of one of `world` ranks, without the others."""
    comm: Any = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
    settings = Loader(**more.pop("settings", {}))
    return TrainingLoader(data, micro, comm, settings, **more)


def values(batch: list[Tensor]) -> list[int]:
    return [int(value) for value in batch[0].flatten()]


def samples(loader: TrainingLoader, batches: int | None = None) -> list[list[int]]:
    return [values(batch) for batch in itertools.islice(loader, batches)]


def together(per_rank: list[list[list[int]]]) -> list[int]:
    return [value for rank in per_rank for batch in rank for value in batch]


# Epochs


def _two_epochs(rank: int, world: int) -> list[list[list[int]]]:
    _, _, loader, _ = _initialize()
    return [samples(loader) for _ in range(2)]


def test_ranks_share_every_epoch_and_each_epoch_is_shuffled_anew() -> None:
    per_rank = ranks.run(2, _two_epochs)
    for epoch in range(2):
        assert sorted(together([rank[epoch] for rank in per_rank])) == list(range(SAMPLES))
        assert max(len(batch) for rank in per_rank for batch in rank[epoch]) == 3
    assert per_rank[0][0] != per_rank[0][1]


def test_the_order_is_that_of_torchs_distributed_sampler() -> None:
    for drop_last in (False, True):
        for rank, epoch in itertools.product(range(3), range(2)):
            sampler = torch.utils.data.DistributedSampler(
                numbers(), num_replicas=3, rank=rank, drop_last=drop_last
            )
            sampler.set_epoch(epoch)
            loader = loader_of(numbers(), rank, 3, micro=1, drop_last=drop_last)
            for _ in range(epoch):
                samples(loader)
            assert together([samples(loader)]) == list(sampler)


def test_an_epoch_left_early_is_over_and_the_next_has_another_order() -> None:
    loader = loader_of(numbers())
    first, second = samples(loader, 3), samples(loader)
    assert loader.epoch == 2
    assert first != second[:3]
    assert second == samples(_at(1))


def _at(epoch: int, **more: Any) -> TrainingLoader:
    loader = loader_of(numbers(), **more)
    loader.load_state_dict({"epoch": epoch, "samples": 0, "length": SAMPLES, "world": 1})
    return loader


def test_looking_for_a_first_batch_in_vain_is_no_epoch() -> None:
    loader = loader_of(numbers())
    iter(loader)
    assert samples(loader) == samples(_at(0))


def test_an_iteration_that_another_has_replaced_says_so() -> None:
    loader = loader_of(numbers())
    old = iter(loader)
    next(old)
    next(iter(loader))
    with pytest.raises(StepError, match="goes on after another has begun"):
        next(old)


# Places


@given(
    length=st.integers(1, 60),
    micro=st.integers(1, 4),
    before=st.integers(1, 5),
    after=st.integers(1, 5),
    batches=st.integers(0, 8),
    drop_last=st.booleans(),
)
def test_any_number_of_ranks_goes_on_from_any_place(
    length: int, micro: int, before: int, after: int, batches: int, drop_last: bool
) -> None:
    data = numbers(length)

    def crew(world: int, micro: int) -> list[TrainingLoader]:
        return [loader_of(data, rank, world, micro, drop_last=drop_last) for rank in range(world)]

    old, new = crew(before, micro), crew(after, micro + 1)
    running = [iter(loader) for loader in old]  # kept: as in the body of a loop
    seen = [[values(batch) for batch in itertools.islice(one, batches)] for one in running]
    states = [json.loads(json.dumps(loader.state_dict())) for loader in old]
    assert all(state == states[0] for state in states)
    for loader in new:
        loader.load_state_dict(states[0])
    rest = [samples(loader) for loader in new]
    assert len({len(share) for share in rest}) == 1, "ranks have as many batches each"
    if states[0]["epoch"] == 0:
        twice = together(seen) + together(rest)
        assert len(set(twice)) >= length - (after * (micro + 1) if drop_last else 0)
        # no sample comes again but to fill up the end of an epoch, on either number of ranks
        assert len(twice) - len(set(twice)) < before + after
        assert {loader.epoch for loader in new} == {1}
    # every epoch after that is whole again
    if not drop_last:
        assert set(together([samples(loader) for loader in new])) == set(range(length))


def test_a_place_in_the_body_of_the_last_batch_is_the_end_of_its_epoch() -> None:
    loader = loader_of(numbers())
    states = [dict(loader.state_dict()) for _ in loader]
    assert [state["samples"] for state in states] == [3, 6, 9, 12, 15, 18, 21, 22]
    again = loader_of(numbers())
    again.load_state_dict(states[-1])
    assert samples(again) == []
    assert samples(again) == samples(_at(1))


def test_who_restores_a_place_within_a_loop_may_go_on_with_it_or_leave_it() -> None:
    loader, state = loader_of(numbers()), _at(1).state_dict()
    going_on = iter(loader)
    next(going_on)
    loader.load_state_dict(state)
    assert values(next(going_on)) == samples(_at(0))[1]
    assert loader.state_dict()["samples"] == 6
    loader.load_state_dict(state)
    assert samples(loader) == samples(_at(1))


@pytest.mark.parametrize(
    "change",
    [{"epoch": -1}, {"epoch": 2**70}, {"epoch": "1"}, {"samples": None}, {"samples": True}],
)
def test_a_damaged_place_is_refused_and_changes_nothing(change: dict[str, Any]) -> None:
    loader = loader_of(numbers())
    with pytest.raises(CheckpointError, match="place is damaged: expected"):
        loader.load_state_dict({**_at(1).state_dict(), **change})
    assert loader.state_dict() == _at(0).state_dict()


def _warned_of_another_dataset(rank: int, world: int) -> list[str]:
    lines = log_lines()
    loader_of(numbers(20)).load_state_dict(_at(1).state_dict())
    return lines


def test_a_dataset_of_another_length_is_told() -> None:
    (lines,) = ranks.run(1, _warned_of_another_dataset)
    assert [line.split(",")[0] for line in lines] == ["training_data had 22 samples and has 20"]


# Few samples, and none


def test_fewer_samples_than_ranks_come_on_several() -> None:
    per_rank = [samples(loader_of(numbers(2), rank, 3)) for rank in range(3)]
    assert [len(batches) for batches in per_rank] == [1, 1, 1]
    assert set(together(per_rank)) == {0, 1}


@pytest.mark.parametrize(("count", "drop_last"), [(0, False), (2, True)])
def test_data_that_give_no_batch_are_refused(count: int, drop_last: bool) -> None:
    assert samples(loader_of(numbers(count), drop_last=drop_last)) == []
    with pytest.raises(ConfigError, match=f"training_data has {count} samples, which give no ba"):
        _initialize(numbers(count), changes={"dataloader_drop_last": drop_last})


def test_what_is_no_dataset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a dataset with __len__ .*, got generator"):
        _initialize(x for x in range(3))


def _unlike(rank: int, world: int) -> str:
    with pytest.raises(zerort.PlanMismatch) as caught:
        _initialize(numbers(SAMPLES + rank))
    return str(caught.value)


def test_ranks_with_other_datasets_are_told_so_at_the_start() -> None:
    said, other = ranks.run(2, _unlike)
    assert said == other
    assert "training_data is '22 samples' on rank 0 and '23 samples' on rank 1" in said


# Iterable datasets


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        return iter([torch.tensor([float(i)]) for i in range(first, SAMPLES, step)])


def stream_samples(loader: TrainingLoader, batches: int | None = None) -> list[list[int]]:
    return [[int(x) for x in batch.flatten()] for batch in itertools.islice(loader, batches)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_dataset_goes_on_at_its_batch_on_as_many_ranks(workers: int) -> None:
    settings = {"workers": workers}
    loader = loader_of(Stream(), world=2, settings=settings)
    going_on = iter(loader)
    whole = stream_samples(loader_of(Stream(), world=2, settings=settings))
    assert [[int(x) for x in next(going_on).flatten()] for _ in range(3)] == whole[:3]
    again = loader_of(Stream(), world=2, settings=settings)
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert stream_samples(again) == whole[3:]


def _stream_on_fewer_ranks(rank: int, world: int) -> tuple[list[str], list[list[int]]]:
    lines = log_lines()
    loader = loader_of(Stream(), world=2)
    going_on = iter(loader)
    next(going_on)
    again = loader_of(Stream(), world=1)
    again.load_state_dict(loader.state_dict())
    return lines, stream_samples(again)


def test_on_another_number_of_ranks_its_epoch_begins_anew_and_that_is_said() -> None:
    ((lines, came),) = ranks.run(1, _stream_on_fewer_ranks)
    assert came == stream_samples(loader_of(Stream()))
    assert len(lines) == 1
    assert "which was 2 and is 1: its epoch begins anew" in lines[0]


# Workers


class Where(Dataset[int]):
    """Each sample says which process fetched it, and counts how often its worker was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        self.asked += 1
        info = get_worker_info()
        return index, -1 if info is None else info.id, self.asked


def test_workers_fetch_and_stay_where_that_is_asked_for() -> None:
    for persistent in (False, True):
        settings = {"workers": 2, "persistent_workers": persistent}
        loader = loader_of(Where(), settings=settings)
        for _ in itertools.islice(loader, 1):  # an epoch left early, with batches under way
            pass
        epoch = [torch.stack(batch).T.tolist() for batch in loader]
        rows = [row for batch in epoch for row in batch]
        assert sorted(index for index, _, _ in rows) == list(range(12))
        assert {worker for _, worker, _ in rows} == {0, 1}
        assert (max(asked for _, _, asked in rows) > 6) is persistent


def test_a_collate_function_that_raises_in_a_worker_is_heard_and_the_next_epoch_is_whole() -> None:
    broken = [True]

    def collate(batch: list[Any]) -> Any:
        if broken[0] and len(batch) == 1:
            raise RuntimeError("cannot stack these")
        return torch.utils.data.default_collate(batch)

    loader = loader_of(numbers(), settings={"workers": 1}, collate_fn=collate)
    with pytest.raises(RuntimeError, match="cannot stack these"):
        samples(loader)
    broken[0] = False
    assert samples(loader) == samples(_at(1))


def test_the_loader_draws_nothing_from_torchs_random_numbers() -> None:
    before = torch.random.get_rng_state()
    samples(loader_of(numbers(), settings={"workers": 1}), 2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_keys_of_the_configuration_reach_the_loader() -> None:
    section = {"workers": 2, "persistent_workers": True, "pin_memory": False}
    _, _, loader, _ = _initialize(changes={"zerort": {"loader": section}})
    assert (loader._loader.num_workers, loader._loader.persistent_workers) == (2, True)
    pinned: Any = SimpleNamespace(rank=0, world=1, device=torch.device("cuda"))
    for wanted in (False, True):
        made = TrainingLoader(numbers(), 3, pinned, Loader(pin_memory=wanted))
        assert made._loader.pin_memory is wanted


def test_the_users_collate_function_makes_the_batches() -> None:
    _, _, loader, _ = _initialize(collate_fn=len)
    assert list(loader) == [3] * 7 + [1]
    assert len(loader) == 8


def test_the_configuration_may_come_from_the_command_line(tmp_path: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}})
    )
    parser = zerort.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    engine, *_ = zerort.initialize(args=args, model=nn.Linear(2, 1))
    assert engine.train_batch_size() == 2
    assert engine.get_lr() == [0.5]
    with pytest.raises(zerort.ConfigError, match="both given"):
        zerort.initialize(args=args, model=nn.Linear(2, 1), config={"train_batch_size": 2})
