"""What grows with a model stands beside each rank's file: the manifest does not, and checkpoints
whose manifest still held it all are read as ever.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zerort
from saved import assert_equal, contents, index_of, manifest_of
from zerort.checkpoint import get_client_state, get_fp32_state_dict, problems
from zerort.checkpoint.blocks import BLOCK
from zerort.checkpoint.formats import ExportOptions, export_checkpoint
from zerort.checkpoint.manifest import (
    INDEX_LIMIT,
    MANIFEST_LIMIT,
    FileEntry,
    Index,
    Manifest,
    TensorEntry,
    dump,
    dump_index,
    index_file,
    rank_file,
)
from zerort.checkpoint.parsing import parse, parse_index
from zerort.checkpoint.report import show
from zerort.checkpoint.zero_to_fp32 import read_checkpoint
from zerort.errors import CheckpointError

OLD = Path(__file__).with_name("format_1.tar.gz")
"""Two ranks at stage 2, two steps of AdamW, by the last version that wrote format 1."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path / "runs", filter="data")
    return tmp_path / "runs"


def engine_like_it() -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    engine, *_ = zerort.initialize(
        model=model, optimizer=lambda params: torch.optim.AdamW(params, lr=0.25), config=config
    )
    return engine


def test_a_checkpoint_of_format_1_is_read_verified_and_exported(old: Path) -> None:
    expected = torch.load(old / "weights.pt", weights_only=True)
    assert '{"format": 1,' in (old / "old" / "manifest.json").read_text()
    assert problems(old, "old") == []
    engine = engine_like_it()
    assert engine.load_checkpoint(old)[0] == str(old / "old")
    found = engine.module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    engine.save_checkpoint(old, "new")
    assert '{"format": 2,' in (old / "new" / "manifest.json").read_text()
    assert_equal(contents(old / "old"), contents(old / "new"))
    for tag in ("old", "new"):
        weights = get_fp32_state_dict(old, tag)
        script = read_checkpoint(old / tag, exclude_frozen=False)
        for name, value in expected.items():
            assert torch.equal(weights[name].to(value.dtype), value)
            assert torch.equal(script[name].to(value.dtype), value)
    assert get_client_state(old, "old")["names"] == ("a", 1)
    for name in ("dcp", "safetensors", "deepspeed-universal"):
        export_checkpoint(old, "old", old / name, name, ExportOptions())
    assert show(old, "old").document["tensors"] == show(old, "new").document["tensors"]
    engine.destroy()


def test_a_flipped_bit_in_format_1_is_found(old: Path) -> None:
    path = old / "old" / "rank_0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert any("rank_0.safetensors is damaged" in problem for problem in problems(old, "old"))
    engine = engine_like_it()
    with pytest.raises(CheckpointError, match=r"rank_0\.safetensors is damaged"):
        engine.load_checkpoint(old)
    engine.destroy()


def test_the_script_finds_damage_in_an_index(tmp_path: Path) -> None:
    engine = engine_like_it()
    engine.save_checkpoint(tmp_path, "one")
    engine.destroy()
    path = tmp_path / "one" / "rank_0.json"
    path.write_bytes(path.read_bytes().replace(b"master", b"mastel", 1))
    done = subprocess.run(
        [sys.executable, tmp_path / "zero_to_fp32.py", tmp_path, tmp_path / "out"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "rank_0.json is damaged" in done.stderr


# Sizes of models that nobody can hold here.

WORLD, PARAMS, KINDS = 512, 2000, ("master", "state.exp_avg", "state.exp_avg_sq")
BUCKET = 500_000_000
"""Elements, the usual size."""


def index_of_rank(rank: int, buckets: int, shard: int) -> tuple[FileEntry, Index]:
    """What a rank writes of so many buckets, in shards of so many elements, in fp32."""
    at, tensors = 4096, []
    for number in range(buckets):
        for kind in KINDS:
            name = f"bucket.{number}.{kind}"
            end = at + 4 * shard
            entry = TensorEntry(
                name=name,
                file=rank_file(rank),
                dtype="F32",
                shape=(shard,),
                start=at,
                end=end,
                runs=((0, shard),),
            )
            tensors.append(entry)
            at = end
    index = Index(tensors=tuple(tensors), blocks="0" * 32 * -(-at // BLOCK))
    size = FileEntry(name=rank_file(rank), bytes=at, xxh3_128="0" * 32)
    digest = size.hashes(index.blocks).xxh3_128
    return size.model_copy(update={"xxh3_128": digest}), index


def simulated(terabytes: float, base: dict[str, Any]) -> tuple[Manifest, Index, bytes]:
    """A manifest, an index of one rank's and that in bytes."""
    shard = BUCKET // WORLD // 128 * 128
    buckets = round(terabytes * 1e12 / (4 * len(KINDS)) / (shard * WORLD))
    file, index = index_of_rank(0, buckets, shard)
    data = dump_index(index, "rank_0.json")
    digits = "0" * 32 * -(-len(data) // BLOCK)
    beside = FileEntry(name="rank_0.json", bytes=len(data), xxh3_128="0" * 32, blocks=digits)
    beside = beside.model_copy(update={"xxh3_128": beside.hashes().xxh3_128})
    files = []
    for rank in range(WORLD):
        name = rank_file(rank)
        files.append(file.model_copy(update={"name": name}).model_dump(exclude_defaults=True))
        files.append(beside.model_copy(update={"name": index_file(name)}).model_dump())
    each = shard * WORLD * buckets // PARAMS
    param = base["params"][0]
    params = [
        {**param, "name": f"layers.{i}.weight", "shape": [each], "strides": [1]}
        for i in range(PARAMS)
    ]
    bucket = {
        "params": [],
        "offsets": [],
        "numel": shard * WORLD,
        "shard_numel": shard,
        "dtypes": dict.fromkeys(KINDS, "F32"),
    }
    made = {
        **base,
        "world": WORLD,
        "ranks": base["ranks"] * WORLD,
        "tensors": [],
        "files": [*files, next(e for e in base["files"] if e["name"] == "zero_to_fp32.py")],
        "params": params,
        "buckets": [bucket] * buckets,
    }
    return Manifest.model_validate_json(json.dumps(made)), index, data


def test_a_checkpoint_of_10_tb_has_a_small_manifest_and_small_indexes(tmp_path: Path) -> None:
    engine = engine_like_it()
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step()
    engine.save_checkpoint(tmp_path, "one")
    engine.destroy()
    assert {t["name"] for t in index_of(tmp_path / "one", 0)["tensors"]} == {
        f"bucket.0.{kind}" for kind in KINDS
    }
    base = manifest_of(tmp_path / "one")
    base["ranks"] = [{"rng": {}}]
    sizes = {}
    for terabytes in (1, 10):
        manifest, index, data = simulated(terabytes, base)
        assert sum(entry.bytes for entry in manifest.files) > 0.99 * terabytes * 1e12
        written = dump(manifest)
        assert parse(written) == manifest
        assert parse_index(data, manifest, rank_file(0)) == index
        sizes[terabytes] = len(written), len(data)
    assert sizes[10][0] < MANIFEST_LIMIT / 50 and sizes[10][1] < INDEX_LIMIT / 20, sizes
    assert sizes[10][0] < 2 * sizes[1][0]  # buckets alone, whose number is the configuration's
    in_the_manifest = WORLD * sizes[10][1]
    assert in_the_manifest > 5 * MANIFEST_LIMIT  # where format 1 had it
