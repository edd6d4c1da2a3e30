"""A frozen base that no optimizer has is saved and loaded by name: whole below stage 3, and there
each rank's part.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import adapters
import ranks
import zerort
from adapters import assert_same, engine_over, made, settings, values
from training import keep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def engine_at(stage: int, dtype: str, seed: int = 5, cap: int = 300) -> Any:
    config = settings(stage, cap=cap, bf16={"enabled": dtype == "bf16"})
    config["zerort"]["checkpoint"] = {"overwrite": True}
    engine = engine_over(made(seed=seed), config)
    keep(engine)
    return engine


def train(engine: Any, rank: int, numbers: range) -> None:
    for number in numbers:
        adapters.step(engine, number, rank)


def there_and_back(rank: int, world: int, folder: str, dtype: str) -> list[Any]:
    """Stage 2 to 3 and back, each from other values; beside it stage 2 alone."""
    alone = engine_at(2, dtype)
    train(alone, rank, range(2))
    alone.save_checkpoint(folder, "two")
    train(alone, rank, range(2, 4))

    sharded = engine_at(3, dtype, seed=6, cap=200)
    sharded.load_checkpoint(folder, "two")
    train(sharded, rank, range(2, 3))
    sharded.save_checkpoint(folder, "three")
    before = values(sharded.module)
    sharded.save_checkpoint(folder, "trained", exclude_frozen_parameters=True)

    back = engine_at(2, dtype, seed=7, cap=500)
    back.load_checkpoint(folder, "three")
    assert_same([0, values(back.module)], [0, before])
    train(back, rank, range(3, 4))
    train(sharded, rank, range(3, 4))
    for engine in (back, sharded):
        assert_same([0, values(engine.module)], [0, values(alone.module)])

    # What was left out keeps the values that are there.
    other = engine_at(3, dtype, seed=8)
    own = values(other.module)
    other.load_checkpoint(folder, "trained")
    found = values(other.module)
    trained = {n for n, p in other.module.named_parameters() if p.requires_grad}
    assert all(torch.equal(found[n], before[n] if n in trained else own[n]) for n in found)
    return [before, trained]


def elsewhere(rank: int, world: int, folder: str, dtype: str) -> dict[str, Tensor]:
    engine = engine_at(3, dtype, seed=9)
    engine.load_checkpoint(folder, "three")
    return values(engine.module)


def of_rank(folder: Path, rank: int) -> dict[str, tuple[torch.dtype, int]]:
    """Dtype and elements of what a rank has written."""
    with safe_open(folder / f"rank_{rank}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name: (tensor.dtype, tensor.numel()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_goes_from_stage_to_stage_and_to_other_ranks_to_the_bit(
    dtype: str, tmp_path: Path
) -> None:
    before, trained = ranks.run(2, there_and_back, str(tmp_path), dtype)[0]
    for world in (1, 3):
        for found in ranks.run(world, elsewhere, str(tmp_path), dtype):
            assert_same([0, found], [0, before])

    # Each rank has written its part, in the dtype of the base, and nothing whole but buffers.
    manifest = json.loads((tmp_path / "three" / "manifest.json").read_text())["manifest"]
    held = [
        number
        for number, bucket in enumerate(manifest["buckets"])
        if manifest["params"][bucket["params"][0]]["group"] is None
    ]
    frozen = sum(tensor.numel() for name, tensor in before.items() if name not in trained)
    for rank in range(2):
        tensors = of_rank(tmp_path / "three", rank)
        assert [name for name in tensors if name.startswith("param.")] == []
        parts = [tensors[f"bucket.{b}.master"] for b in held if f"bucket.{b}.master" in tensors]
        assert {kind for kind, _ in parts} == {DTYPES[dtype]}
        assert abs(sum(numel for _, numel in parts) - frozen / 2) < 128 * len(held)
        left = of_rank(tmp_path / "trained", rank)
        assert not any(f"bucket.{b}.master" in left for b in held)

    # And other programs read it.
    state = zerort.checkpoint.get_fp32_state_dict(tmp_path, "three")
    script = [sys.executable, str(tmp_path / "three" / "zero_to_fp32.py"), str(tmp_path / "three")]
    subprocess.run([*script, str(tmp_path / "out")], check=True, capture_output=True)
    rebuilt = torch.load(tmp_path / "out" / "pytorch_model.bin")
    assert rebuilt.keys() == state.keys() > before.keys()
    for name, value in before.items():
        assert state[name].dtype == rebuilt[name].dtype == torch.float32
        if name not in trained:
            assert torch.equal(state[name], value.float()), name
        assert torch.equal(state[name], rebuilt[name])


def taken_in(rank: int, world: int, folder: str) -> list[Any]:
    """The optimizer's own frozen base becomes one that it has not, and the other way round."""
    found = []
    config = settings(3)
    config["zerort"]["checkpoint"] = {"overwrite": True}
    for first, then in ((True, False), (False, True)):
        engine, other = given(config, 5, first), given(config, 6, then)
        train(engine, rank, range(2))
        engine.save_checkpoint(folder, "tag")
        other.load_checkpoint(folder, "tag")
        found.append([values(engine.module), values(other.module)])
        train(other, rank, range(2, 3))
    return found


def given(config: dict[str, Any], seed: int, everything: bool) -> Any:
    model = made(seed=seed)
    params = list(model.parameters()) if everything else adapters.adapters_of(model)
    engine, *_ = zerort.initialize(
        model=model, optimizer=torch.optim.AdamW(params, lr=0.05), config=config
    )
    keep(engine)
    return engine


def test_what_the_optimizer_had_may_be_held_now_and_the_other_way_round(tmp_path: Path) -> None:
    for found in ranks.run(2, taken_in, str(tmp_path)):
        for saved, loaded in found:
            assert_same([0, saved], [0, loaded])
