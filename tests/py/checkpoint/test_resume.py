"""Resuming: any world, stage, bucket size and order of parameters gives the same bits back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ranks
from saved import (
    GLOBAL_BATCH,
    WIDTH,
    Net,
    Refactored,
    Unsynced,
    assert_equal,
    config_of,
    contents,
    engine_of,
    manifest_of,
    tensors_of,
    train,
    weights,
)
from training import keep
from zerort.optim import Lion

BLOCK = 1 << 20
WORLDS = (1, 2, 3, 4)
STAGES = (0, 1, 2)
DTYPES = ("fp32", "bf16")
SAVED_AT, END = 3, 5


def name_of(world: int, stage: int, dtype: str) -> str:
    return f"w{world}-s{stage}-{dtype}"


def save_all(rank: int, world: int, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Trains at every stage and dtype, saves on the way, and returns the weights at the end of
    training.
    """
    ends = {}
    for stage in STAGES:
        for dtype in DTYPES:
            engine = engine_of(config_of(stage, dtype))
            engine._checkpoints.disk = Unsynced()
            train(engine, rank, world, range(SAVED_AT))
            engine.save_checkpoint(folder, name_of(world, stage, dtype))
            train(engine, rank, world, range(SAVED_AT, END))
            ends[name_of(world, stage, dtype)] = weights(engine)
            keep(engine)
    return ends


def load_all(rank: int, world: int, folder: str, again: str) -> dict[str, dict[str, torch.Tensor]]:
    """Resumes from every checkpoint at every stage, saves at once, and goes on to the end of
    training.

    Each engine loads one checkpoint after another: nothing of the one before may be left.
    """
    ends = {}
    for dtype in DTYPES:
        for stage in STAGES:
            engine = engine_of(config_of(stage, dtype))
            engine._checkpoints.disk = Unsynced()
            for source in (name_of(w, s, dtype) for w in WORLDS for s in STAGES):
                engine.load_checkpoint(folder, source)
                engine.module.norm.requires_grad_(False)  # as it was
                resumed = f"{source}-at-{name_of(world, stage, dtype)}"
                engine.save_checkpoint(again, resumed)
                train(engine, rank, world, range(engine.global_steps, END))
                ends[resumed] = weights(engine)
            keep(engine)
    return ends


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("saved")
    ends: dict[str, dict[str, torch.Tensor]] = {}
    for world in WORLDS:
        ends |= ranks.shared(world, save_all, str(folder))[0]
    return folder, ends


def same_arithmetic(source: str, target: str) -> bool:
    """Whether the steps after a resume are the uninterrupted run's to the bit: as many ranks, and
    the same roundings.

    In bf16 stage 0 rounds the sums that several ranks gather; stages 1 and 2 step with the fp32
    sums.
    """
    (world, stage, dtype), (new_world, new_stage, _) = source.split("-"), target.split("-")
    rounded = dtype == "bf16" and world != "w1" and (stage == "s0") != (new_stage == "s0")
    return world == new_world and not rounded


@pytest.mark.parametrize(
    "world", [2, *(pytest.param(more, marks=pytest.mark.slow) for more in (1, 3, 4))]
)
def test_every_world_and_stage_resumes_from_every_other_to_the_bit(
    world: int, saved: Any, tmp_path: Path
) -> None:
    folder, ends = saved
    results = ranks.shared(world, load_all, str(folder), str(tmp_path), timeout=150)
    assert len(results[0]) == 3 * 12 * 2
    for resumed, end in results[0].items():
        source, _, target = resumed.partition("-at-")
        assert_equal(contents(tmp_path / resumed), contents(folder / source))
        uninterrupted = ends[source]
        for name, value in end.items():
            if same_arithmetic(source, target):
                assert torch.equal(value, uninterrupted[name]), (resumed, name)
            else:
                distance = (value.float() - uninterrupted[name].float()).norm() / uninterrupted[
                    name
                ].float().norm()
                assert distance <= (2e-6 if target.endswith("fp32") else 4e-3), (
                    resumed,
                    name,
                    float(distance),
                )
    for other in results[1:]:
        for resumed, end in other.items():
            assert all(
                torch.equal(value, results[0][resumed][name]) for name, value in end.items()
            ), resumed


def test_plain_torch_goes_on_from_what_a_checkpoint_holds(tmp_path: Path) -> None:
    engine = engine_of(config_of(2))
    train(engine, 0, 1, range(3))
    engine.save_checkpoint(tmp_path, "t")
    train(engine, 0, 1, range(3, 4))
    twin, found = Net(), contents(tmp_path / "t")
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, eps=1e-3)
    for name, parameter in twin.named_parameters():
        steps = 1.0 if "norm" in name else 3.0
        assert found[f"{name} values"] == {"step": {"$scalar": ["F32", [], steps]}}
        flat = {key: found[f"{name} state.{key}"] for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {
            "step": torch.tensor(steps),
            **{key: value.reshape(parameter.shape) for key, value in flat.items()},
        }
        parameter.data.copy_(found[f"{name} master"].reshape(parameter.shape))
    x = torch.randn(GLOBAL_BATCH, WIDTH, generator=torch.Generator().manual_seed(3))
    twin(x).pow(2).mean().backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    optimizer.step()
    for name, value in weights(engine).items():
        assert torch.allclose(twin.state_dict()[name], value, rtol=1e-5, atol=1e-7), name


def save_one(rank: int, world: int, folder: str) -> None:
    engine = engine_of(config_of(2, bucket=300))
    train(engine, rank, world, range(3))
    engine.save_checkpoint(folder, "t")


def load_refactored(rank: int, world: int, folder: str) -> None:
    engine = engine_of(config_of(1, bucket=1000), Refactored())
    engine.load_checkpoint(folder, "t")
    engine.save_checkpoint(folder, "again")


def test_another_order_of_parameters_and_another_bucket_size_change_no_bit(tmp_path: Path) -> None:
    ranks.shared(3, save_one, str(tmp_path))
    ranks.shared(2, load_refactored, str(tmp_path))
    one, other = manifest_of(tmp_path / "t"), manifest_of(tmp_path / "again")
    assert [p["name"] for p in one["params"]] != [p["name"] for p in other["params"]]
    assert len(one["buckets"]) != len(other["buckets"])
    assert_equal(contents(tmp_path / "again"), contents(tmp_path / "t"))


class Strided(nn.Module):
    """Parameters that lie in one order of their elements or in another; `wide` has the same strides
    in both.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        one = form == "contiguous"
        self.conv = nn.Conv2d(6, 9, 3)
        self.wide = nn.Parameter(torch.randn(1, 31, 1))
        self.flat = nn.Parameter(torch.randn(17, 29) if one else torch.randn(29, 17).t())
        self.cube = nn.Parameter(
            torch.randn(3, 8, 5) if one else torch.randn(5, 3, 8).permute(1, 2, 0)
        )
        self.none = nn.Parameter(torch.empty(4, 0, 3))
        if not one:
            self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each gradient depends on its element alone, so that no order of summation is in play."""
        return torch.stack([(p.float() * x).square().sum() for p in self.parameters()]).sum()


def turn(
    rank: int,
    world: int,
    folder: str,
    form: str,
    stage: int,
    dtype: str,
    tags: tuple[str | None, str],
) -> Any:
    """Loads the first tag or trains 2 steps, saves the second, steps once more; returns weights in
    their shape.
    """
    engine = engine_of(config_of(stage, dtype, gradient_clipping=0.0), Strided(form))
    if tags[0] is not None:
        engine.load_checkpoint(folder, tags[0])
    for step in range(engine.global_steps, 3):
        if step == 2:
            engine.save_checkpoint(folder, tags[1])
        engine.backward(engine(torch.tensor(1.0 + step)))
        engine.step()
    return weights(engine)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forms", [("contiguous", "turned"), ("turned", "contiguous")], ids=str)
def test_parameters_that_lie_otherwise_in_memory_are_turned(
    forms: tuple[str, str], dtype: str, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    two = ranks.shared(2, turn, folder, forms[0], 2, dtype, (None, "two"))
    one = ranks.shared(1, turn, folder, forms[1], 0, dtype, ("two", "one"))
    three = ranks.shared(3, turn, folder, forms[0], 1, dtype, ("one", "three"))
    strides = [
        {p["name"]: p["strides"] for p in manifest_of(tmp_path / tag)["params"]}
        for tag in ("two", "one")
    ]
    assert {name for name, lies in strides[0].items() if strides[1][name] != lies} == {
        "conv.weight",
        "flat",
        "cube",
    }
    saved = contents(tmp_path / "two")
    assert {"cube master", "cube state.exp_avg", "cube state.exp_avg_sq"} <= saved.keys()
    assert_equal(contents(tmp_path / "one"), saved)
    assert_equal(contents(tmp_path / "three"), saved)
    for end in (*two[1:], *one):
        assert_equal(end, two[0])
    for name, value in three[0].items():
        # A mean of three equal gradients is rounded.
        assert torch.allclose(
            value, two[0][name], rtol=1e-6 if dtype == "fp32" else 2**-7, atol=1e-6
        ), name


def big_engine(stage: int, *, turned: bool = False) -> Any:
    """One bucket of 24 MB, and as much of the optimizer's state."""
    model = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(6)))
    if turned:
        model[0].weight = nn.Parameter(model[0].weight.detach().t().clone().t())
    return engine_of(config_of(stage, bucket=10**8), model, lambda params: Lion(params, lr=0.1))


def save_big(rank: int, world: int, folder: str) -> None:
    engine = big_engine(1)
    engine.backward(engine(torch.ones(1, 1000)).mean())
    engine.step()
    engine.save_checkpoint(folder, "t")


def load_big(rank: int, world: int, folder: str, stage: int, turned: bool) -> int:
    engine = big_engine(stage, turned=turned)
    engine.load_checkpoint(folder, "t")
    return engine._checkpoints.bytes_read


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_rank_reads_its_share_and_the_rest_of_its_blocks(
    stage: int, turned: bool, tmp_path: Path
) -> None:
    ranks.shared(2, save_big, str(tmp_path))
    manifest = manifest_of(tmp_path / "t")
    assert len(manifest["buckets"]) == 1
    read = ranks.shared(4, load_big, str(tmp_path), stage, turned)
    shards = sum(
        entry["end"] - entry["start"] for entry in tensors_of(tmp_path / "t") if "runs" in entry
    )
    slices = 2  # masters and one kind of state, each of which begins and ends within a block
    assert shards > 48_000_000 and sum(read) >= shards
    # The turned parameter, a sixth of all, is the last one of the bucket: rank 3 has it whole, rank
    # 2 a part.
    more = [0, 0, 1, 0] if turned else [0, 0, 0, 0]
    for share, whole in zip(read, more, strict=True):
        assert share <= shards / 4 + whole * shards / 6 + (1 + whole) * slices * 2 * BLOCK
