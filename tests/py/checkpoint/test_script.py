"""The script in a checkpoint: stands alone, gives the library's weights, and is as careful."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_api import everything, step
from test_damage import HOSTILE, forge
from test_export import export

import ranks
from saved import weights
from zerort.checkpoint import get_fp32_state_dict, zero_to_fp32

ALONE = """
import runpy, sys
for name in ("zerort", "pydantic", "rich", *{hidden!r}):
    sys.modules[name] = None
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_script(*argv: Any, hidden: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs the script of a checkpoint in a process that cannot import zerort."""
    code = ALONE.format(argv=list(map(str, argv)), hidden=hidden)
    return subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_script_in_a_checkpoint_stands_alone(tmp_path: Path) -> None:
    ranks.run(3, export, str(tmp_path))
    script, out = tmp_path / "global_step2" / "zero_to_fp32.py", tmp_path / "out"
    expected = get_fp32_state_dict(tmp_path)
    done = run_script(script, tmp_path, out, hidden=("xxhash",))
    assert done.returncode == 0 and "not verified" in done.stderr, done.stderr
    found = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert found.keys() == expected.keys() and all(
        torch.equal(v, expected[n]) for n, v in found.items()
    )
    done = run_script(script, script.parent, out, "--safe_serialization", "--max_shard_size", "3KB")
    assert done.returncode == 0 and "not verified" not in done.stderr, done.stderr
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    merged = {name: value for file in files for name, value in load_file(out / file).items()}
    assert merged.keys() == expected.keys() and all(
        torch.equal(v, expected[n]) for n, v in merged.items()
    )


def test_the_script_knows_odd_models_and_damage(tmp_path: Path) -> None:
    engine = everything(0)
    step(engine)
    engine.save_checkpoint(tmp_path, "odd")
    script, out = tmp_path / "odd" / "zero_to_fp32.py", tmp_path / "out"
    done = run_script(script, tmp_path, out, "-t", "odd", "--exclude_frozen_parameters")
    assert done.returncode == 0, done.stderr
    found = torch.load(out / "pytorch_model.bin", weights_only=True)
    for name, value in weights(engine).items():
        assert (name not in found) if name == "base.weight" else torch.equal(found[name], value), (
            name
        )
    data = bytearray((tmp_path / "odd" / "rank_0.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "odd" / "rank_0.safetensors").write_bytes(data)
    done = run_script(script, tmp_path, out, "-t", "odd")
    assert done.returncode != 0 and "rank_0.safetensors is damaged" in done.stderr


# What somebody has prepared. The script runs here in the test's own process.


@pytest.fixture(scope="module")
def original(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("original")
    engine = everything(0)
    step(engine)
    engine.save_checkpoint(folder, "t")
    engine.save_checkpoint(folder, "u", save_latest=False)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "c"))


def refused(folder: Path, capsys: Any, monkeypatch: Any, *options: str) -> str:
    """What the script says; nothing is written."""
    out = folder.parent / "out"
    monkeypatch.setattr(sys, "argv", ["zero_to_fp32.py", str(folder), str(out), *options])
    assert zero_to_fp32.main() == 1
    assert not out.exists()
    said = str(capsys.readouterr().err)
    assert "Traceback" not in said and len(said) < 1000
    return said


def put(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


PREPARED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "latest is a pipe": (lambda c: put(c / "latest", os.mkfifo), "latest is no plain file"),
    "latest is a folder": (lambda c: put(c / "latest", os.mkdir), "latest is no plain file"),
    "latest leads away": (
        lambda c: put(c / "latest", lambda path: path.symlink_to("/dev/zero")),
        "latest is a symbolic link",
    ),
    "latest is long": (lambda c: (c / "latest").write_bytes(bytes(10**6)), "latest has more than"),
    "latest is damaged": (lambda c: (c / "latest").write_text("u\n"), "latest is damaged"),
    "latest names a path": (
        lambda c: (c / "latest").write_text(f"../c/t\n{sha256(b'../c/t').hexdigest()}\n"),
        "cannot be the tag",
    ),
    "no latest": (lambda c: (c / "latest").unlink(), "has no file `latest`"),
    "the manifest is a pipe": (
        lambda c: put(c / "t" / "manifest.json", os.mkfifo),
        "manifest.json is no plain file",
    ),
    "the manifest leads away": (
        lambda c: put(c / "t/manifest.json", lambda p: p.symlink_to(c / "u/manifest.json")),
        "manifest.json is a symbolic link",
    ),
    "the manifest is long": (
        lambda c: os.truncate(c / "t" / "manifest.json", 65 << 20),
        "manifest.json has more than",
    ),
    "the manifest is damaged": (
        lambda c: (c / "t" / "manifest.json").write_text("{}\n"),
        "manifest.json is damaged",
    ),
    "the shard is a pipe": (
        lambda c: put(c / "t" / "rank_0.safetensors", os.mkfifo),
        "rank_0.safetensors is no plain file",
    ),
    "the shard leads away": (
        lambda c: put(
            c / "t/rank_0.safetensors", lambda p: p.symlink_to(c / "u/rank_0.safetensors")
        ),
        "rank_0.safetensors is a symbolic link",
    ),
    "the shard is missing": (lambda c: (c / "t/rank_0.safetensors").unlink(), "No such file"),
    "the shard is short": (
        lambda c: os.truncate(c / "t" / "rank_0.safetensors", 9),
        "rank_0.safetensors has 9 bytes",
    ),
    "a file of another name": (
        lambda c: forge(c / "t", lambda m: m["files"][0].update(name="../u/rank_0.safetensors")),
        "is no checkpoint's",
    ),
}


@pytest.mark.parametrize("case", PREPARED)
def test_the_script_refuses_what_the_library_refuses(
    case: str, folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    prepare, reason = PREPARED[case]
    prepare(folder)
    assert reason in refused(folder, capsys, monkeypatch)


@pytest.mark.parametrize("tag", ["../c/t", "/etc", ".", "", "linked", "none"])
def test_the_script_takes_no_tag_that_leaves_the_folder(
    tag: str, folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    (folder / "linked").symlink_to(folder / "t")
    assert tag in refused(folder, capsys, monkeypatch, "-t", tag)


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_manifest_that_lies_ends_the_script_without_a_traceback(
    attack: str, folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    change, _ = HOSTILE[attack]
    forge(folder / "t", change)
    monkeypatch.setattr(sys, "argv", ["zero_to_fp32.py", str(folder), str(tmp_path / "out")])
    # The script looks at what it needs: it may read weights beside a lie about something else.
    assert zero_to_fp32.main() in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


def test_the_script_replaces_what_was_there_and_follows_no_link_of_that_name(
    folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("work")
    (tmp_path / "out" / "model.safetensors").symlink_to(tmp_path / "precious")
    argv = ["zero_to_fp32.py", str(folder), str(tmp_path / "out"), "--safe_serialization"]
    monkeypatch.setattr(sys, "argv", argv)
    assert zero_to_fp32.main() == 0
    assert (tmp_path / "precious").read_text() == "work"
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
