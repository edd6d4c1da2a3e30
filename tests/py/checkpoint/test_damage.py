"""Damage: whatever has changed in a checkpoint is found before a value reaches the model, and
named.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import ranks
from saved import config_of, engine_of, index_of, manifest_of, train, weights
from zerort.checkpoint import get_fp32_state_dict, problems
from zerort.checkpoint.manifest import VALUE_LIMIT
from zerort.errors import CheckpointError

FLIPS = 660


def save_two(rank: int, world: int, folder: str) -> None:
    engine = engine_of(config_of(2))
    for count in (1, 2):
        train(engine, rank, world, range(count - 1, count))
        engine.save_checkpoint(folder, f"step{count}")


@pytest.fixture(scope="module")
def original(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("original")
    ranks.run(2, save_two, str(folder))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "c")
    return tmp_path / "c"


@pytest.fixture
def engine() -> Iterator[Any]:
    engine = engine_of(config_of(2))
    train(engine, 0, 1, range(1))
    yield engine
    engine.destroy()


def refuses(engine: Any, folder: Path, *names: str, tag: str = "step2") -> str:
    """Asserts that a load raises, naming all of `names`, and has changed nothing; returns the
    message.
    """
    before, moments, steps = weights(engine), state_of(engine), engine.global_steps
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder, tag)
    assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    assert all(
        torch.equal(one, other) for one, other in zip(state_of(engine), moments, strict=True)
    )
    assert engine.global_steps == steps
    for name in names:
        assert name in str(caught.value), str(caught.value)
    return str(caught.value)


def state_of(engine: Any) -> list[torch.Tensor]:
    return [value.clone() for held in engine.optimizer.state.values() for value in held.values()]


def test_every_flipped_bit_is_found_by_verify_and_by_load(folder: Path, engine: Any) -> None:
    chance = random.Random(0)
    shutil.rmtree(folder / "step1")
    names = ("rank_0.safetensors", "rank_1.safetensors", "manifest.json", "rank_1.json")
    for flip in range(FLIPS):
        path = folder / "step2" / names[flip % 4]
        data = bytearray(path.read_bytes())
        # A third each in the first bytes, where lengths and headers are, and the rest anywhere.
        at = chance.randrange(min(len(data), 300) if flip % 12 < 4 else len(data))
        bit = 1 << chance.randrange(8)
        data[at] ^= bit
        path.write_bytes(data)
        refuses(engine, folder, path.name)
        assert any(path.name in problem for problem in problems(folder, "step2")), (
            path.name,
            at,
            bit,
        )
        data[at] ^= bit
        path.write_bytes(data)
    assert engine.load_checkpoint(folder, "step2")[0] is not None


def test_a_flipped_bit_names_the_tensor_and_the_checkpoint_that_verifies(
    folder: Path, engine: Any
) -> None:
    path = folder / "step2" / "rank_1.safetensors"
    entry = next(
        t
        for t in index_of(folder / "step2", 1)["tensors"]
        if t["file"] == path.name and "runs" in t
    )
    data = bytearray(path.read_bytes())
    data[entry["start"]] ^= 1
    path.write_bytes(data)
    refuses(engine, folder, path.name, "tensor", "step1", "fallback=True")
    loaded, _ = engine.load_checkpoint(folder, fallback=True)
    assert loaded == str(folder / "step1") and engine.global_steps == 1


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def swap(one: Path, other: Path) -> None:
    one.rename(one.parent / ".swap")
    other.rename(one)
    (one.parent / ".swap").rename(other)


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut by a byte": (
        lambda c: cut(c / "step2/rank_1.safetensors", -1 + size(c)),
        "rank_1.safetensors",
    ),
    "cut in the header": (lambda c: cut(c / "step2/rank_1.safetensors", 20), "rank_1.safetensors"),
    "empty": (lambda c: cut(c / "step2/rank_0.safetensors", 0), "rank_0.safetensors"),
    "a byte more": (
        lambda c: cut(c / "step2/rank_0.safetensors", 1 + size(c, 0)),
        "rank_0.safetensors",
    ),
    "no manifest": (lambda c: (c / "step2/manifest.json").unlink(), "manifest"),
    "half a manifest": (lambda c: cut(c / "step2/manifest.json", 3000), "manifest.json"),
    "swapped shards": (
        lambda c: swap(c / "step2/rank_0.safetensors", c / "step2/rank_1.safetensors"),
        "rank_0",
    ),
    "another step's shard": (
        lambda c: shutil.copy(c / "step1/rank_1.safetensors", c / "step2/rank_1.safetensors"),
        "rank_1",
    ),
    "another step's manifest": (
        lambda c: shutil.copy(c / "step1/manifest.json", c / "step2/manifest.json"),
        "rank_",
    ),
    "a missing shard": (
        lambda c: (c / "step2/rank_1.safetensors").unlink(),
        "rank_1.safetensors is missing",
    ),
    "no index": (lambda c: (c / "step2/rank_1.json").unlink(), "rank_1.json is missing"),
    "half an index": (lambda c: cut(c / "step2/rank_0.json", 300), "rank_0.json"),
    "another step's index": (
        lambda c: shutil.copy(c / "step1/rank_1.json", c / "step2/rank_1.json"),
        "rank_1.json",
    ),
    "swapped indexes": (
        lambda c: swap(c / "step2/rank_0.json", c / "step2/rank_1.json"),
        "rank_0.json",
    ),
    "an index that is a link": (
        lambda c: link(c / "step2/rank_1.json", c / "step1/rank_1.json"),
        "symbolic link",
    ),
    "an extra shard": (
        lambda c: shutil.copy(c / "step2/rank_1.safetensors", c / "step2/rank_2.safetensors"),
        "rank_2.safetensors does not belong",
    ),
    "a symbolic link": (
        lambda c: link(c / "step2/rank_1.safetensors", c / "step1/rank_1.safetensors"),
        "symbolic link",
    ),
    "a pipe": (lambda c: pipe(c / "step2/rank_0.safetensors"), "no plain file"),
}


def size(folder: Path, rank: int = 1) -> int:
    return (folder / f"step2/rank_{rank}.safetensors").stat().st_size


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name(damage: str, folder: Path, engine: Any) -> None:
    inflict, name = DAMAGE[damage]
    inflict(folder)
    refuses(engine, folder, name)
    assert any(name in problem for problem in problems(folder, "step2"))
    with pytest.raises(CheckpointError, match=name):
        get_fp32_state_dict(folder, "step2")


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest, and rank 0's index, with right hashes and wrong contents."""
    manifest = {**manifest_of(folder), "index": index_of(folder, 0)}
    change(manifest)
    index = json.dumps(manifest.pop("index")).encode()
    if json.loads(index) != index_of(folder, 0):
        (folder / "rank_0.json").write_bytes(index)
        beside = next(entry for entry in manifest["files"] if entry["name"] == "rank_0.json")
        beside.update(bytes=len(index), **hashes_of(index))
    forge_body(folder, json.dumps(manifest).encode())


def rehash(folder: Path, data: bytes) -> None:
    """Rank 0's file has been forged into `data`, and all hashes follow."""
    blocks = hashes_of(data)

    def change(manifest: dict[str, Any]) -> None:
        manifest["index"]["blocks"] = blocks["blocks"]
        manifest["files"][0]["xxh3_128"] = blocks["xxh3_128"]

    (folder / "rank_0.safetensors").write_bytes(data)
    forge(folder, change)


def forge_body(folder: Path, body: bytes, number: int = 2) -> None:
    digest = xxhash.xxh3_128_hexdigest(body)
    head = f'{{"format": {number}, "xxh3_128": "{digest}", "manifest":\n'.encode()
    (folder / "manifest.json").write_bytes(head + body + b"\n}\n")


def hashes_of(data: bytes) -> dict[str, str]:
    """The hashes of a file of one block."""
    blocks = xxhash.xxh3_128_hexdigest(data)
    return {"blocks": blocks, "xxh3_128": xxhash.xxh3_128_hexdigest(blocks.encode())}


def set_tensor(index: int, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["index"]["tensors"][index].update(values)


def set_bucket(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["buckets"][0].update(values)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a huge tensor": (set_tensor(0, shape=[1 << 60]), "bytes"),
    "a product that overflows": (set_tensor(0, shape=[1 << 40, 1 << 40]), "bytes"),
    "overlapping tensors": (
        lambda m: m["index"]["tensors"][1].update(
            start=m["index"]["tensors"][0]["start"], end=m["index"]["tensors"][0]["end"]
        ),
        "tensor",
    ),
    "a tensor beyond its file": (
        lambda m: m["index"]["tensors"][0].update(start=1 << 40, end=(1 << 40) + 512),
        "tensor",
    ),
    "a tensor in the header": (lambda m: m["index"]["tensors"][0].update(start=0), "tensor"),
    "an unknown dtype": (set_tensor(0, dtype="F128"), "dtype"),
    "a negative size": (set_tensor(0, start=-1), "start"),
    "a fraction for a size": (set_tensor(0, start=1.5), "start"),
    "a file outside": (lambda m: m["files"][0].update(name="../step1/rank_0.safetensors"), "files"),
    "a huge file": (lambda m: m["files"][0].update(bytes=1 << 60), "blocks"),
    "a hash of other blocks": (lambda m: m["files"][0].update(xxh3_128="0" * 32), "blocks' hashes"),
    "a huge world": (lambda m: m.update(world=1 << 19), "files"),
    "runs that overlap": (set_tensor(0, runs=[[0, 1 << 50]]), "runs"),
    "runs beyond the shard": (
        lambda m: m["index"]["tensors"][0].update(
            runs=[[1 << 30, m["index"]["tensors"][0]["shape"][0]]]
        ),
        "runs",
    ),
    "a part of another file": (set_tensor(0, file="rank_1.safetensors"), "lies in"),
    "a part in the manifest": (
        lambda m: m["tensors"].append(m["index"]["tensors"].pop(0)),
        "index",
    ),
    "a part of another dtype": (
        lambda m: m["buckets"][0]["dtypes"].update(master="F16"),
        "which has F16",
    ),
    "parts that are not there": (lambda m: m["index"].update(tensors=[]), "no tensor"),
    "an index twice as long": (
        lambda m: m["index"]["tensors"].extend(m["index"]["tensors"]),
        "twice",
    ),
    "hashes in the manifest": (
        lambda m: m["files"][0].update(blocks=m["index"]["blocks"]),
        "where they do not belong",
    ),
    "no hashes of an index": (
        lambda m: [entry.pop("blocks") for entry in m["files"] if entry["name"] == "rank_0.json"],
        "where they do not belong",
    ),
    "an index beyond its limit": (
        lambda m: next(e for e in m["files"] if e["name"] == "rank_0.json").update(bytes=1 << 30),
        "rank_0.json",
    ),
    "an unknown key of an index": (lambda m: m["index"].update(surprise=1), "surprise"),
    "a bucket of nothing": (set_bucket(params=[], offsets=[]), "layout"),
    "a bucket twice": (lambda m: m["buckets"].append(m["buckets"][0]), "bucket"),
    "a parameter that is not there": (set_bucket(params=[99]), "layout"),
    "parameters on top of each other": (
        lambda m: m["buckets"][0].update(offsets=[0] * len(m["buckets"][0]["params"])),
        "layout",
    ),
    "a bucket beyond memory": (set_bucket(numel=(1 << 61) - 256), "layout"),
    "a parameter longer than its data": (
        lambda m: m["params"][0].update(shape=[1 << 50], strides=[1]),
        "longer",
    ),
    "strides that overlap": (lambda m: m["params"][0].update(strides=[1, 1]), "strides"),
    "strides beyond the data": (lambda m: m["params"][0].update(strides=[1 << 40, 1]), "strides"),
    "strides of another rank": (lambda m: m["params"][0].update(strides=[1]), "strides"),
    "negative strides": (lambda m: m["params"][0].update(strides=[-10, 1]), "strides"),
    "an unknown key": (lambda m: m.update(surprise=1), "surprise"),
    "a string for a number": (lambda m: m["counters"].update(global_steps="1"), "global_steps"),
    "an unknown tag": (lambda m: m.update(client_state={"$code": "print()"}), "does not read"),
    "a tensor that is not there": (
        lambda m: m.update(client_state={"$tensor": "x"}),
        "does not read|no tensor",
    ),
    "a scalar of many": (
        lambda m: m.update(client_state={"$scalar": ["F32", [1 << 40], 1.0]}),
        "does not read",
    ),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_manifest_is_refused(attack: str, folder: Path, engine: Any) -> None:
    change, name = HOSTILE[attack]
    forge(folder / "step2", change)
    message = refuses(engine, folder)
    assert any(part in message for part in name.split("|")), message


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b"[" * (8 << 20), "more than"),
        (b"[" * 1_000_000, "recursion|deep|Invalid JSON"),
        (b'{"client_state":' * 100_000, "recursion|deep|Invalid JSON"),
        (b'{"world": 1e999}', "manifest.json"),
        (b"1" * 100_000, "manifest.json"),
        (b"null", "manifest.json"),
        (b"\xff\xfe", "manifest.json"),
    ],
    ids=["brackets", "fewer brackets", "objects", "infinity", "a long number", "null", "no UTF-8"],
)
def test_a_manifest_that_is_no_manifest_is_refused(
    body: bytes, name: str, folder: Path, engine: Any
) -> None:
    forge_body(folder / "step2", body)
    message = refuses(engine, folder)
    assert any(part in message for part in name.split("|")), message


def test_a_manifest_of_a_later_format_says_so(folder: Path, engine: Any) -> None:
    forge_body(folder / "step2", b"{}", number=3)
    refuses(engine, folder, "format 3", "format 1 and 2")


def bombs(manifest: dict[str, Any], tensor: dict[str, Any]) -> dict[str, bytes]:
    """Manifests within the limit of bytes that would take gigabytes if they were believed."""
    many = VALUE_LIMIT // 3
    lists, objects, zeros = (f"[{','.join([item] * many)}]" for item in ("[]", "{}", "0"))
    keys = "{" + ",".join(f'"{number}":0' for number in range(many)) + "}"
    made = {
        "lists": ({"client_state": "BOMB", "stage": 9}, lists),
        "keys": ({"counters": "BOMB"}, keys),
        "files": ({"files": "BOMB"}, objects),
        "runs": ({"tensors": [{**tensor, "runs": "BOMB"}]}, zeros),
        "names": ({"aliases": "BOMB"}, keys),
    }
    return {
        **{
            name: json.dumps({**manifest, **change}).replace('"BOMB"', bomb).encode()
            for name, (change, bomb) in made.items()
        },
        "zeros": b'{"client_state":[' + b"0," * (30 << 20) + b"0]}",
        "deep": b"[" * (60 << 20),
    }


def attacked(original: Path, base: Path) -> list[str]:
    """A folder for each attack, with one checkpoint in it; returns their names."""
    made = []

    def folder(name: str) -> Path:
        made.append(name)
        return Path(shutil.copytree(original, base / name / "t"))

    for name, (change, _) in HOSTILE.items():
        forge(folder(name), change)
    tensor = index_of(original, 0)["tensors"][0]
    for name, body in bombs(manifest_of(original), tensor).items():
        forge_body(folder(name), body)
    cut(folder("a manifest of 10 GB") / "manifest.json", 10 << 30)  # sparse
    cut(folder("a file of 10 GB") / "rank_0.safetensors", 10 << 30)
    cut(folder("an index of 10 GB") / "rank_0.json", 10 << 30)
    return made


def climb(rank: int, world: int, good: str, base: str, names: list[str]) -> dict[str, int]:
    """MiB by which refusing each has raised the largest memory that this process has had."""
    engine = engine_of(config_of(2))
    assert engine.load_checkpoint(good, "step2")[0] is not None
    grown, before = {}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in names:
        with pytest.raises(CheckpointError):
            engine.load_checkpoint(Path(base) / name, "t")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        grown[name], before = (peak - before) >> 10, peak
    return grown


def test_no_attack_takes_more_than_a_gigabyte(folder: Path, tmp_path: Path) -> None:
    names = attacked(folder / "step2", tmp_path / "bad")
    grown = ranks.run(1, climb, str(folder), str(tmp_path / "bad"), names, timeout=120)[0]
    assert len(grown) == len(HOSTILE) + 10
    assert sum(grown.values()) < 1024, {name: mib for name, mib in grown.items() if mib}


@pytest.mark.parametrize(
    "head",
    [
        (1 << 62).to_bytes(8, "little"),
        (100_000_001).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"{]",
        (4).to_bytes(8, "little") + b"[[[[",
        (2).to_bytes(8, "little") + b"{}",
    ],
    ids=["huge", "above the limit", "no JSON", "open brackets", "no tensors"],
)
def test_a_hostile_header_is_refused_even_if_the_hashes_are_right(
    head: bytes, folder: Path
) -> None:
    path = folder / "step2" / "rank_0.safetensors"
    rehash(folder / "step2", head + path.read_bytes()[len(head) :])
    found = problems(folder, "step2")
    assert len(found) == 1 and ("header" in found[0] or "tensors end" in found[0]), found


def test_a_tensor_renamed_in_the_header_is_refused_even_if_the_hashes_are_right(
    folder: Path,
) -> None:
    path = folder / "step2" / "rank_0.safetensors"
    rehash(folder / "step2", path.read_bytes().replace(b'"bucket.0.master"', b'"bucket.9.master"'))
    assert any("bucket.9.master" in problem for problem in problems(folder, "step2"))
