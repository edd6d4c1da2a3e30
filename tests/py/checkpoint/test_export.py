"""Weights for other programs: the 16-bit export, the stand-alone script, fp32 state dicts, and the
command line.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_api import Everything, everything, step

import ranks
import training
from saved import Net, adamw, config_of, engine_of, train, weights
from zerort.checkpoint import get_fp32_state_dict, load_state_dict_from_zero_checkpoint
from zerort.cli import main
from zerort.errors import CheckpointError
from zerort.zero import GatheredParameters


def export(rank: int, world: int, folder: str) -> dict[str, torch.Tensor]:
    engine = engine_of(config_of(2, "bf16"))
    train(engine, rank, world, range(2))
    assert engine.save_16bit_model(f"{folder}/deep/er") is True
    engine.save_16bit_model(folder, "model.safetensors")
    engine.save_checkpoint(folder)
    return weights(engine)


def masters(rank: int, world: int, folder: str) -> dict[str, torch.Tensor]:
    """The fp32 masters of a training in bf16, put together from the engine's own memory."""
    engine = engine_of(config_of(0, "bf16"))
    engine.load_checkpoint(folder)
    found = {}
    for bucket in engine._parts.boundary.flat.buckets:
        for name, start, length in zip(
            bucket.names, bucket.spec.offsets, bucket.spec.numels, strict=True
        ):
            found[name] = bucket.master.narrow(0, start, length).clone()
    return found


def test_both_formats_hold_the_weights_in_the_compute_dtype(tmp_path: Path) -> None:
    expected = ranks.run(2, export, str(tmp_path))[0]
    zipped = torch.load(tmp_path / "deep" / "er" / "pytorch_model.bin", weights_only=True)
    for found in (zipped, load_file(tmp_path / "model.safetensors")):
        assert found.keys() == expected.keys()
        assert all(
            value.dtype == torch.bfloat16 and torch.equal(value, expected[n])
            for n, value in found.items()
        )
    assert not list(tmp_path.rglob(".tmp-*"))


def test_fp32_weights_are_the_masters_not_the_cast_parameters(tmp_path: Path) -> None:
    cast = ranks.run(2, export, str(tmp_path))[0]
    expected = ranks.run(1, masters, str(tmp_path))[0]
    found = get_fp32_state_dict(tmp_path)
    assert found.keys() == expected.keys() == cast.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32 and torch.equal(value.reshape(-1), expected[name])
        assert torch.equal(value.bfloat16(), cast[name])
    assert any(not torch.equal(value, value.bfloat16().float()) for value in found.values())


def test_tied_weights_stand_once_in_safetensors_and_twice_in_a_state_dict(tmp_path: Path) -> None:
    engine = everything(0)
    step(engine)
    engine.save_16bit_model(tmp_path, "model.safetensors")
    engine.save_16bit_model(tmp_path, "frozen.bin", exclude_frozen_parameters=True)
    engine.save_checkpoint(tmp_path)
    once = load_file(tmp_path / "model.safetensors")
    assert "embed.weight" in once and "head.weight" not in once
    assert "base.weight" not in torch.load(tmp_path / "frozen.bin", weights_only=True)
    found = get_fp32_state_dict(tmp_path)
    assert found["head.weight"] is found["embed.weight"]
    assert found["turned"].is_contiguous() and torch.equal(found["turned"], engine.module.turned)
    assert "base.weight" not in get_fp32_state_dict(tmp_path, exclude_frozen_parameters=True)
    plain = load_state_dict_from_zero_checkpoint(Everything(), tmp_path)
    for name, value in weights(engine).items():
        assert torch.equal(plain.state_dict()[name], value), name


def load_into_shards(rank: int, world: int, folder: str) -> list[bool]:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    engine = engine_of(config_of(3) | {"zero_optimization": zero})
    engine.save_checkpoint(folder)
    saved = training.weights(engine)
    params = list(engine.module.parameters())
    found = []
    gathered = GatheredParameters(params), GatheredParameters(params, modifier_rank=0)
    for outer in (*gathered, nullcontext()):
        train(engine, rank, world, range(1))
        found.append(same(training.weights(engine), saved))
        with outer:
            load_state_dict_from_zero_checkpoint(engine.module, folder)
        found.append(same(training.weights(engine), saved))
    train(engine, rank, world, range(1))
    engine.destroy()
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_checkpoint_is_loaded_into_a_module_in_shards_within_a_gather_or_alone(
    tmp_path: Path,
) -> None:
    for found in ranks.shared(2, load_into_shards, str(tmp_path)):
        assert found == [False, True] * 3


def test_an_export_that_fails_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(config_of(1))
    engine.save_16bit_model(tmp_path)
    before = (tmp_path / "pytorch_model.bin").read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine._checkpoints.disk, "write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        engine.save_16bit_model(tmp_path)
    assert os.listdir(tmp_path) == ["pytorch_model.bin"]
    assert (tmp_path / "pytorch_model.bin").read_bytes() == before


@pytest.mark.parametrize(
    "name", ["../up.bin", "a/b.bin", "/up.bin", "..", ".", "", ".hidden", "latest"]
)
def test_an_export_whose_name_could_be_something_else_is_refused(name: str, tmp_path: Path) -> None:
    engine = engine_of(config_of(1))
    with pytest.raises(CheckpointError, match="cannot be the name"):
        engine.save_16bit_model(tmp_path / "in", name)
    assert list(tmp_path.iterdir()) == []


# The command line.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "150")
    engine = engine_of(config_of(1), Net(), adamw)
    for count in (1, 2):
        train(engine, 0, 1, range(count - 1, count))
        engine.save_checkpoint(tmp_path, f"step{count}")
    return tmp_path


def test_ls_and_show_say_what_there_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "step1" / "manifest.json").write_text("{}")
    assert main(["ckpt", "ls", str(folder)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line][1:]
    assert "step2 *" in lines[0]
    assert "step1" in lines[1] and "unreadable" in lines[1]
    assert main(["ckpt", "show", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "norm.weight" in out and "exp_avg_sq" in out and "AdamW" in out and "37 x 10" in out


def test_verify_finds_damage_and_its_status_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ckpt", "verify", str(folder)]) == 0
    os.truncate(folder / "step2" / "rank_0.safetensors", 9)
    assert main(["ckpt", "verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "step1: ok" in out and "step2: damaged" in out and "has 9 bytes" in out
    assert main(["ckpt", "verify", str(folder), "step1"]) == 0
    assert main(["ckpt", "verify", str(folder / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_diff_compares_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ckpt", "diff", str(folder / "step1"), str(folder / "step1")]) == 0
    assert "all equal" in capsys.readouterr().out
    assert main(["ckpt", "diff", str(folder / "step1"), str(folder / "step2")]) == 1
    out = capsys.readouterr().out
    assert "entry.weight" in out and "370 of 370" in out and "norm.weight" not in out
