"""The script beside `latest`, and DeepSpeed's functions, by which its users get plain weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_api import Everything

from saved import config_of, engine_of
from zerort import utils
from zerort.checkpoint import get_fp32_state_dict
from zerort.errors import CheckpointError


def test_the_script_beside_latest_does_what_deepspeeds_users_do_with_it(tmp_path: Path) -> None:
    engine = engine_of(config_of(1))
    engine.save_checkpoint(tmp_path, "unnamed", save_latest=False)
    assert not (tmp_path / "zero_to_fp32.py").exists()
    engine.save_checkpoint(tmp_path)
    argv = [sys.executable, "zero_to_fp32.py", ".", "out"]
    subprocess.run(argv, cwd=tmp_path, check=True, capture_output=True)
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(found["exit.weight"], engine.module.exit.weight)
    engine.destroy()


def test_an_older_script_is_replaced_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    engine, path = engine_of(config_of(1)), tmp_path / "zero_to_fp32.py"
    engine.save_checkpoint(tmp_path, "a")
    ours = path.read_bytes()
    path.write_bytes(ours + b"# an older version\n")
    engine.save_checkpoint(tmp_path, "b")
    assert path.read_bytes() == ours
    before = path.stat().st_mtime_ns
    engine.save_checkpoint(tmp_path, "c")
    assert path.stat().st_mtime_ns == before
    path.write_text("#!/usr/bin/env python\n# DeepSpeed Team\n")
    engine.save_checkpoint(tmp_path, "d")
    assert path.read_text().endswith("# DeepSpeed Team\n")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    engine.save_checkpoint(tmp_path, "e")
    assert path.is_symlink() and not (tmp_path / "elsewhere").exists()
    engine.destroy()


def test_a_script_that_a_dead_save_has_begun_is_deleted_and_no_other_file(tmp_path: Path) -> None:
    engine = engine_of(config_of(1))
    engine.save_checkpoint(tmp_path, "a")
    ours = (tmp_path / "zero_to_fp32.py").read_bytes()
    names = [f".tmp-zero_to_fp32.py-{digit * 16}" for digit in "123"]
    for name, content in zip(names, (ours[:700] + b"\0" * 30, b"", b"my own"), strict=True):
        (tmp_path / name).write_bytes(content)
    engine.save_checkpoint(tmp_path, "b")
    assert [(tmp_path / name).exists() for name in names] == [False, False, True]
    engine.destroy()


def test_deepspeeds_functions_give_the_same_weights(tmp_path: Path) -> None:
    engine = engine_of(config_of(2, "bf16"), Everything())
    engine.save_checkpoint(tmp_path, "t")
    expected = get_fp32_state_dict(tmp_path)
    lazy = utils.get_fp32_state_dict_from_zero_checkpoint(tmp_path, lazy_mode=True)
    assert lazy.keys() == expected.keys()
    for name, value in expected.items():
        one = lazy[name].contiguous()
        assert (lazy[name].shape, lazy[name].dtype, lazy[name].numel()) == (
            value.shape,
            value.dtype,
            value.numel(),
        )
        assert one.dtype == value.dtype and torch.equal(one, value), name
    plain = utils.get_fp32_state_dict_from_zero_checkpoint(tmp_path, "t", True)
    assert plain.keys() == get_fp32_state_dict(tmp_path, "t", True).keys()
    utils.convert_zero_checkpoint_to_fp32_state_dict(
        tmp_path, tmp_path / "out", max_shard_size="200B", safe_serialization=True
    )
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    utils.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "one", None)
    found = torch.load(tmp_path / "one" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    model = Everything()
    for parameter in model.parameters():
        parameter.detach().zero_()
    assert utils.load_state_dict_from_zero_checkpoint(model, tmp_path, "t") is model
    for name, value in model.named_parameters():
        assert torch.equal(value, expected[name]), name
    for wrong in ("5 apples", 7):
        with pytest.raises(CheckpointError, match="max_shard_size"):
            utils.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "x", wrong)
    for call in (utils.get_fp32_state_dict_from_zero_checkpoint, get_fp32_state_dict):
        with pytest.raises(CheckpointError, match="checkpoint_dir is empty"):
            call("")
    engine.destroy()
