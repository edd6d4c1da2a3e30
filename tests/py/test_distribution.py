"""What is given to others: the wheel and the sdist in dist/, as `make test-all` builds them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
LINUX = sys.platform == "linux"

pytestmark = pytest.mark.distribution


def only(pattern: str) -> Path:
    (found,) = DIST.glob(pattern)
    return found


@pytest.fixture(scope="module")
def wheel() -> Mapping[str, bytes]:
    with zipfile.ZipFile(only("zerort-*.whl")) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist() -> Mapping[str, bytes]:
    with tarfile.open(only("zerort-*.tar.gz")) as archive:
        files = (member for member in archive.getmembers() if member.isfile())
        return {
            member.name.partition("/")[2]: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in files
        }


def test_the_wheel_has_the_whole_package_and_says_that_it_is_typed(
    wheel: Mapping[str, bytes],
) -> None:
    package = ROOT / "python" / "zerort"
    here = {
        f"zerort/{path.relative_to(package)}"
        for path in package.rglob("*")
        if path.suffix in (".py", ".pyi") or path.name == "py.typed"
    }
    there = {name for name in wheel if name.startswith("zerort/")}
    assert "zerort/py.typed" in here
    (library,) = there - here
    assert re.fullmatch(r"zerort/_core\.(abi3\.so|pyd)", library)
    assert here <= there


def test_the_wheel_has_the_finder_for_deepspeeds_name_and_its_entry_point(
    wheel: Mapping[str, bytes],
) -> None:
    package = ROOT / "python" / "zerort_as_deepspeed"
    here = {f"zerort_as_deepspeed/{path.name}" for path in package.glob("*.py")}
    assert "zerort_as_deepspeed/finder.py" in here
    assert here <= wheel.keys()
    assert not [name for name in wheel if name.startswith("deepspeed")]
    (points,) = (data for name, data in wheel.items() if name.endswith("entry_points.txt"))
    assert b"[torch.backends]\nzerort=zerort_as_deepspeed:start" in points.replace(b" ", b"")


@pytest.mark.skipif(not LINUX, reason="glibc is Linux's")
def test_the_wheel_runs_on_every_glibc_from_2_28_on(wheel: Mapping[str, bytes]) -> None:
    assert re.search(r"-cp310-abi3-manylinux_2_28_\w+\.whl$", only("zerort-*.whl").name)
    versions = re.findall(rb"GLIBC_2\.(\d+)", wheel["zerort/_core.abi3.so"])
    assert versions and max(map(int, versions)) <= 28


def test_nothing_in_the_wheel_names_a_folder_of_who_built_it(wheel: Mapping[str, bytes]) -> None:
    folders = [str(ROOT), str(Path.home()), os.environ.get("CARGO_HOME", str(ROOT)), "/rustup/"]
    named = [
        (name, folder)
        for name, data in wheel.items()
        for folder in folders
        if len(folder) > 1 and folder.encode() in data
    ]
    assert named == []
    assert b"cargo/registry" in wheel["zerort/_core.abi3.so"], "the library has names to hide"


def test_the_wheel_and_the_sdist_bring_every_licence(
    wheel: Mapping[str, bytes], sdist: Mapping[str, bytes]
) -> None:
    folder = next(name for name in wheel if name.endswith("/METADATA")).removesuffix("METADATA")
    for name in ("LICENSE", "THIRD-PARTY-LICENSES"):
        text = (ROOT / name).read_bytes()
        assert wheel[f"{folder}licenses/{name}"] == text
        assert sdist[name] == text
    assert b"pyo3 " in wheel[f"{folder}licenses/THIRD-PARTY-LICENSES"]


def test_the_sdist_has_what_a_build_needs_and_no_more(sdist: Mapping[str, bytes]) -> None:
    needed = {"README.md", "LICENSE", "Cargo.toml", "Cargo.lock", "pyproject.toml", "PKG-INFO"}
    assert needed <= sdist.keys()
    assert {f"rust/{crate}/src/lib.rs" for crate in ("core", "py")} <= sdist.keys()
    assert "python/zerort/py.typed" in sdist
    assert not [name for name in sdist if name.endswith((".so", ".pyd")) or "target/" in name]
    assert sum(map(len, sdist.values())) < 4_000_000


@pytest.mark.timeout(1200)
def test_the_sdist_builds_and_trains_in_a_clean_environment(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", only("zerort-*.tar.gz")],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "CARGO_TARGET_DIR": str(tmp_path / "target")},
    )
    # what it depends on is taken from the environment of this test: torch is large
    (depends,) = (str(path) for path in [Path(torch.__file__).parents[1]])
    script = (
        "import sys, zerort, torch; assert 'venv/lib' in zerort.__file__, zerort.__file__;"
        "config = {'train_batch_size': 1, 'optimizer': {'type': 'SGD', 'params': {'lr': 1.0}}};"
        "engine, *_ = zerort.initialize(model=torch.nn.Linear(2, 1), config=config);"
        "engine.backward(engine(torch.ones(1, 2)).sum()); engine.step();"
        "print('trained by', zerort.__version__)"
    )
    done = subprocess.run(
        [python, "-c", f"import sys; sys.path.append({depends!r}); {script}"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.stdout.startswith("trained by ")
