"""`zerort ckpt export`: what others read is what was saved, and it is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_api import Everything
from torch.distributed.checkpoint import FileSystemReader, load

import ranks
from saved import adamw, config_of, contents, engine_of, manifest_of, train
from zerort import cli
from zerort.checkpoint import get_fp32_state_dict
from zerort.checkpoint.formats import FORMATS, ExportOptions, _plain, export_checkpoint
from zerort.errors import CheckpointError


def save(rank: int, world: int, folder: str) -> None:
    engine = engine_of(config_of(3, "bf16"))
    train(engine, rank, world, range(3, 5))
    engine.save_checkpoint(folder, "t", client_state={"epoch": 4, "seen": torch.arange(3)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(2, save, str(folder))
    return folder


def test_the_universal_form_has_a_folder_for_each_parameter(saved: Path, tmp_path: Path) -> None:
    out = export_checkpoint(
        saved, None, tmp_path / "a" / "u", "deepspeed-universal", ExportOptions(ranks=2)
    )
    assert sorted(os.listdir(out)) == ["latest_universal", "t"]
    assert (out / "latest_universal").read_text() == "t"
    held = contents(saved / "t")
    for name, value in get_fp32_state_dict(saved).items():
        home = out / "t" / "zero" / name
        expected = {"fp32": value}
        expected |= {k: held[f"{name} state.{k}"] for k in ("exp_avg", "exp_avg_sq")}
        for kind, tensor in expected.items():
            found = torch.load(home / f"{kind}.pt", weights_only=True)
            assert found["cat_dim"] == 0 and torch.equal(found["param"], tensor), (name, kind)
        assert torch.load(home / "step.pt", weights_only=True).item() == 2
    common = torch.load(out / "t" / "zero" / "optimizer_state.pt", weights_only=True)
    assert common["param_groups"][0]["betas"] == (0.9, 0.999)
    models = sorted((out / "t").glob("*_model_states.pt"))
    assert [path.name.partition("mp_rank")[0] for path in models] == [
        "",
        "zero_pp_rank_0_",
        "zero_pp_rank_1_",
    ]
    model = torch.load(models[0], weights_only=True)
    assert (model["global_steps"], model["epoch"], model["mp_world_size"]) == (2, 4, 1)
    assert torch.equal(model["seen"], torch.arange(3))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_reads_its_form_by_name(saved: Path, tmp_path: Path) -> None:
    out = export_checkpoint(saved, "t", tmp_path / "d", "dcp")
    weights, held = get_fp32_state_dict(saved), contents(saved / "t")
    model = {name: torch.zeros_like(value) for name, value in weights.items()}
    state = {name: {"exp_avg": torch.zeros_like(value)} for name, value in weights.items()}
    whole: dict[str, Any] = {"model": model, "optimizer": {"state": state}}
    load(whole, storage_reader=FileSystemReader(out), no_dist=True)
    for name, value in weights.items():
        assert torch.equal(model[name], value), name
        assert torch.equal(state[name]["exp_avg"], held[f"{name} state.exp_avg"]), name


def test_safetensors_are_cut_and_have_an_index(saved: Path, tmp_path: Path) -> None:
    weights = get_fp32_state_dict(saved)
    for limit, count in ((10**9, 1), (2000, 3)):
        out = export_checkpoint(
            saved, None, tmp_path / str(limit), "safetensors", ExportOptions(limit=limit)
        )
        index = json.loads((out / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert len(files) == count and {p.name for p in out.glob("*.safetensors")} == files
        found = {n: load_file(out / file)[n] for n, file in index["weight_map"].items()}
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], value) for name, value in weights.items())
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in weights.values())


@pytest.mark.parametrize("form", FORMATS)
def test_odd_models_go_into_every_form(form: str, tmp_path: Path) -> None:
    engine = engine_of(config_of(1), Everything(), adamw)
    engine.save_checkpoint(tmp_path, "t")
    engine.destroy()
    weights = get_fp32_state_dict(tmp_path)
    out = export_checkpoint(tmp_path, "t", tmp_path / "out", form)
    if form == "safetensors":
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        aliases = manifest_of(tmp_path / "t")["aliases"]
        assert index.keys() == weights.keys() - aliases.keys()
        for name, file in index.items():
            assert torch.equal(load_file(out / file)[name], weights[name]), name
    if form == "deepspeed-universal":
        for name in weights.keys() - manifest_of(tmp_path / "t")["aliases"].keys():
            path = out / "t" / "zero" / name / "fp32.pt"
            found = torch.load(path, weights_only=True)["param"]
            assert torch.equal(found.to(weights[name].dtype), weights[name]), name


@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_checkpoint_is_not_exported_and_nothing_is_left(
    form: str, saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "c"))
    path = folder / "t" / "rank_1.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    # the last bytes may be of a state, which weights alone do not read
    if form == "safetensors":
        for at in range(2000, len(data), 100):
            data[at] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank_1\.safetensors is damaged"):
        export_checkpoint(folder, None, tmp_path / "out" / "x", form)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_there_stays_and_objects_do_not_go_along(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    argv = ["ckpt", "export", str(saved), str(tmp_path / "mine"), "--to", "safetensors"]
    assert cli.main(argv) == 2 and "exists already" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == []
    argv[3] = str(tmp_path / "new")
    assert cli.main([*argv, "--max-shard-size", "1KB"]) == 0
    with pytest.raises(SystemExit):
        cli.main([*argv[:4], "--to", "nothing"])
    engine = engine_of(config_of(1))
    engine.save_checkpoint(tmp_path, "o", client_state={"a": Odd()}, allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"client_state\['a'\]"):
        export_checkpoint(tmp_path, "o", tmp_path / "u", "deepspeed-universal")
    assert not (tmp_path / "u").exists()
    engine.destroy()


class Odd:
    """An object of the caller's."""


@pytest.mark.parametrize("name", ["../up", "a/b", "..", "a\\b"])
def test_a_name_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be the name of a folder"):
        _plain(name)
