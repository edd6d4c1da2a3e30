"""Who answers to `import deepspeed`: zerort once it was asked to, and nobody else's work is undone.
Where it matters what is imported first, a case is a Python of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ranks
import zerort_as_deepspeed
from zerort_as_deepspeed.version import SURFACE, VERSION

# the standard library has one since Python 3.11; before, pytest brings its own
TOML = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
ROOT = Path(__file__).parents[3]
ALIAS = ROOT / "compat" / "alias"
PYTHON = Path(zerort_as_deepspeed.__file__).parents[1]  # sources, or where the wheel is
INSTALL = "import zerort.compat.deepspeed as shim; shim.install()\n"


@dataclass(frozen=True)
class Done:
    """What a program has written, and how it ended."""

    stdout: str
    stderr: str


def python(
    *lines: str,
    paths: Sequence[Path] = (),
    variable: str | None = None,
    cwd: Path | None = None,
    anew: bool = False,
) -> Done:
    """Runs `lines` where torch and zerort are imported already; or `anew`, where nothing is."""
    where = [str(path) for path in paths]
    if not anew:
        return ranks.run(1, execute, "\n".join(lines), where, variable, cwd)[0]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        env=environment(where, variable),
        cwd=cwd,
        check=False,
    )
    return Done(done.stdout, done.stderr)


def environment(paths: Sequence[str], variable: str | None = None) -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, str(PYTHON)])}
    found.pop("ZERORT_AS_DEEPSPEED", None)
    return found if variable is None else {**found, "ZERORT_AS_DEEPSPEED": variable}


def execute(
    rank: int, world: int, source: str, paths: list[str], variable: str | None, cwd: Path | None
) -> Done:
    out, failed = io.StringIO(), ""
    os.environ.update(environment([], variable))
    sys.path[:0] = ["", *paths]
    if cwd is not None:
        os.chdir(cwd)
    with contextlib.redirect_stdout(out):
        try:
            exec(source, {"__name__": "__main__"})
        except Exception:
            failed = traceback.format_exc()
    return Done(out.getvalue(), failed)


def said(*lines: str, **where: Any) -> str:
    done = python(*lines, **where)
    assert done.stderr == "", done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with zerort's entry points, as an installation has them."""
    project = TOML.loads((ROOT / "pyproject.toml").read_text())["project"]
    place = tmp_path_factory.mktemp("site")
    (place / "zerort-0.dist-info").mkdir()
    (place / "zerort-0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: zerort\nVersion: 0\n"
    )
    (place / "zerort-0.dist-info" / "entry_points.txt").write_text(
        "\n".join(
            f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    return place


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package deepspeed of somebody else's, with metadata."""
    place = tmp_path_factory.mktemp("real")
    (place / "deepspeed").mkdir()
    (place / "deepspeed" / "__init__.py").write_text("import torch\nREAL = True\n")
    (place / "deepspeed-0.19.8.dist-info").mkdir()
    (place / "deepspeed-0.19.8.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.8\n"
    )
    return place


# ---- install()


def test_after_install_the_name_the_version_and_the_modules_are_there() -> None:
    out = said(
        INSTALL,
        "from importlib import metadata, util",
        "print(util.find_spec('deepspeed') is not None, metadata.version('deepspeed'))",
        "print('deepspeed' in metadata.packages_distributions())",
        "print([d.metadata['Name'] for d in metadata.distributions()].count('deepspeed'))",
        "import deepspeed, zerort",
        "from deepspeed.runtime.engine import DeepSpeedEngine",
        "from deepspeed.runtime import zero, lr_schedules",
        "from deepspeed import comm as dist",
        "print(issubclass(DeepSpeedEngine, zerort.Engine), zero.Init is zerort.zero.Init)",
        "print(deepspeed.__version__, dist.get_rank(), dist.get_world_size())",
        "print(lr_schedules.VALID_LR_SCHEDULES)",
    )
    assert out.splitlines() == [
        f"True {VERSION}",
        "True",
        "1",
        "True True",
        f"{VERSION} 0 1",
        "['LRRangeTest', 'OneCycle', 'WarmupLR', 'WarmupDecayLR', 'WarmupCosineLR']",
    ]


def test_without_install_nothing_answers() -> None:
    done = python("import zerort, zerort.compat.deepspeed", "import deepspeed")
    assert "ModuleNotFoundError: No module named 'deepspeed'" in done.stderr


def test_a_name_that_is_not_built_raises_when_it_is_used_and_not_before() -> None:
    out = said(
        INSTALL,
        "import deepspeed, deepspeed.inference.engine",
        "from deepspeed.pipe import PipelineModule",
        "from deepspeed.moe.layer import MoE",
        "class Mine(PipelineModule): pass",
        "print(isinstance(Mine, PipelineModule), isinstance(3, (int, MoE)))",
        "try: raise KeyError",
        "except (deepspeed.runtime.SomeError, KeyError): print('caught')",
        "def used(use):",
        "    try: use()",
        "    except NotImplementedError as error: print(str(error).split()[0])",
        "def enter():",
        "    with deepspeed.OnDevice: pass",
        "used(lambda: Mine(3))",
        "used(lambda: deepspeed.init_inference(None))",
        "used(lambda: deepspeed.inference.engine.InferenceEngine.generate(1))",
        "used(lambda: len(deepspeed.sequence.groups))",
        "used(lambda: list(deepspeed.sequence.groups))",
        "used(lambda: deepspeed.sequence.groups[0])",
        "used(enter)",
        "used(lambda: deepspeed.comm.no_such_collective())",
        "print(deepspeed.comm.ReduceOp.SUM is __import__('torch').distributed.ReduceOp.SUM)",
    )
    assert out.splitlines() == [
        "False True",
        "caught",
        "deepspeed.pipe.PipelineModule",
        "deepspeed.init_inference",
        "deepspeed.inference.engine.InferenceEngine.generate",
        "deepspeed.sequence.groups",
        "deepspeed.sequence.groups",
        "deepspeed.sequence.groups",
        "deepspeed.OnDevice",
        "deepspeed.comm.no_such_collective",
        "True",
    ]


def test_an_installed_deepspeed_is_hidden_only_on_request(real: Path) -> None:
    refused = python(INSTALL, paths=[real])
    assert re.search(
        r"ConfigError: a DeepSpeed is installed \(0\.19\.8, .*uninstall it", refused.stderr
    )
    for ask, variable in (("shim.install(shadow=True)", None), ("shim.install()", "shadow")):
        out = said(
            "import zerort.compat.deepspeed as shim",
            ask,
            "import deepspeed; print(deepspeed.__version__)",
            "from importlib import metadata; print(metadata.version('deepspeed'))",
            paths=[real],
            variable=variable,
        )
        assert out.splitlines() == [VERSION, VERSION]


def test_a_deepspeed_that_is_imported_stays_and_is_named(real: Path) -> None:
    done = python("import deepspeed", INSTALL, paths=[real], variable="shadow")
    assert "ConfigError: deepspeed is imported already, from " in done.stderr


def test_a_folder_of_that_name_is_no_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "ds.json").write_text("{}")
    out = said(INSTALL, "import deepspeed; print(deepspeed.__version__)", cwd=tmp_path)
    assert out == VERSION


@pytest.mark.parametrize("module", ["accelerate.accelerator", "transformers.integrations"])
def test_who_looked_before_and_found_none_is_named(module: str) -> None:
    pytest.importorskip("transformers", reason="needs transformers: zerort[compat-test]")
    done = python(f"import {module}", "import transformers.integrations.deepspeed", INSTALL)
    assert re.search(rf"ConfigError: {module}\S* was imported before", done.stderr) or (
        "accelerate.accelerator was imported before" in done.stderr
    )


# ---- the variable


@pytest.mark.parametrize(
    ("first", "beside"),
    [
        ("torch", False),
        ("zerort", False),
        ("deepspeed", True),
        pytest.param("torch", True, marks=pytest.mark.slow),
        pytest.param("zerort", True, marks=pytest.mark.slow),
    ],
)
def test_the_variable_is_enough_whichever_is_imported_first(
    installed: Path, first: str, beside: bool
) -> None:
    """Beside the distribution that stands for zerort too, without which nobody can be asked before
    torch or zerort is imported.
    """
    out = said(
        f"import {first}",
        "import deepspeed; print(deepspeed.__version__, deepspeed.initialize.__module__)",
        "import sys; print(sys.modules['deepspeed'] is deepspeed)",
        paths=[installed, *([ALIAS] if beside else [])],
        variable="1",
        anew=True,
    )
    assert out.splitlines() == [f"{VERSION} zerort.compat.deepspeed.start", "True"]


def test_without_the_variable_the_entry_point_does_nothing(installed: Path) -> None:
    out = said(
        "import torch, sys",
        "print(sorted(n for n in sys.modules if n.startswith(('zerort', 'deepspeed'))))",
        "print([f for f in sys.meta_path if hasattr(f, 'answers_for_deepspeed')])",
        paths=[installed],
        anew=True,
    )
    assert out.splitlines() == ["['zerort_as_deepspeed']", "[]"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("", ""), ("0", ""), ("False", ""), (" off ", ""), ("1", "1"), ("Shadow", "shadow")],
)
def test_the_variable_says_yes_no_or_shadow(
    monkeypatch: pytest.MonkeyPatch, text: str, wanted: str
) -> None:
    monkeypatch.setenv("ZERORT_AS_DEEPSPEED", text)
    assert zerort_as_deepspeed.wanted() == wanted


def test_the_entry_point_takes_less_than_a_millisecond() -> None:
    out = said(
        "import sys, time",
        "times = []",
        "for _ in range(20):",
        "    for name in [n for n in sys.modules if n.startswith('zerort_as')]:",
        "        del sys.modules[name]",
        "    before, began = set(sys.modules), time.perf_counter()",
        "    import zerort_as_deepspeed; zerort_as_deepspeed.start()",
        "    times.append(time.perf_counter() - began)",
        "print(min(times) * 1e3, set(sys.modules) - before)",
    )
    assert float(out.split()[0]) < 1.0
    assert out.split()[1:] == ["{'zerort_as_deepspeed'}"]


def test_the_variable_does_not_hide_a_deepspeed_that_is_installed(
    installed: Path, real: Path
) -> None:
    done = python("import deepspeed", paths=[installed, real], variable="1", anew=True)
    assert "Refused: deepspeed is imported already" in done.stderr
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stderr  # torch names a way out too
    entry = "import zerort_as_deepspeed; zerort_as_deepspeed.start(); print('went on')"
    done = python(entry, "import deepspeed", paths=[real], variable="1")
    assert "ImportError: a DeepSpeed is installed" in done.stderr
    assert done.stdout == "went on\n"  # who does not ask for it is not told
    out = said(entry, "import deepspeed; print(deepspeed.REAL)", paths=[real])
    assert out == "went on\nTrue"


# ---- the distribution that stands for zerort


def test_its_version_is_the_surface_that_is_answered_for() -> None:
    project = TOML.loads((ALIAS / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION == f"{SURFACE}+zerort"
    assert "Private :: Do Not Upload" in project["classifiers"]
    extras = TOML.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "deepspeed" not in str(extras["optional-dependencies"])


def test_it_answers_whoever_imports_it_first(tmp_path: Path) -> None:
    out = said(
        "import deepspeed.comm, deepspeed, sys, zerort.compat.deepspeed as shim",
        "shim.install()",
        "print(deepspeed.__version__, shim.is_installed(), sys.modules['deepspeed'] is deepspeed)",
        paths=[ALIAS],
    )
    assert out == f"{VERSION} True True"


def test_it_says_so_where_zerort_is_not_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import deepspeed"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ALIAS)},
        check=False,
    )
    assert "stands for zerort, and zerort is not installed" in done.stderr


@pytest.mark.slow
def test_it_is_installed_from_a_checkout(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="needs setuptools, which builds it")
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation"]
    copy = tmp_path / "alias"
    subprocess.run(["cp", "-r", str(ALIAS), str(copy)], check=True)
    subprocess.run(
        [*command, "-q", "--no-deps", "--target", str(tmp_path / "site"), str(copy)],
        check=True,
        capture_output=True,
    )
    out = said(
        "from importlib import metadata; print(metadata.version('deepspeed'))",
        "import deepspeed; print(deepspeed.__version__)",
        paths=[tmp_path / "site"],
    )
    assert out.splitlines() == [VERSION, VERSION]


# ---- python -m zerort.compat.run


USAGE = "usage: python -m zerort.compat.run [-m MODULE | SCRIPT] [ARGS...]"
SCRIPT = """
import os, sys, deepspeed
print(deepspeed.__version__, sys.argv[1:], __name__, os.environ["ZERORT_AS_DEEPSPEED"])
import beside
"""


def run(*arguments: str) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "zerort.compat.run", *arguments],
        capture_output=True,
        text=True,
        env=environment([]),
        check=False,
    )
    assert done.returncode == 7, done.stderr
    return Done(done.stdout, done.stderr)


def test_a_script_and_a_module_run_as_python_runs_them(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("print('beside'); raise SystemExit(7)")
    expected = [f"{VERSION} ['-m', '--lr=1'] __main__ 1", "beside"]
    script = run(str(tmp_path / "program.py"), "-m", "--lr=1")
    assert script.stdout.splitlines() == expected, script.stderr
    module = said(
        "from zerort.compat.run import main",
        "try: main(['-m', 'program', '-m', '--lr=1'])",
        "except SystemExit as left: print(left.code)",
        paths=[tmp_path],
    )
    assert module.splitlines() == [*expected, "7"]


def test_a_command_line_that_names_no_program_says_what_it_takes() -> None:
    out = said(
        "import sys; sys.stderr = sys.stdout",
        "from zerort.compat.run import main",
        "for arguments in ([], ['-m'], ['--help']): print(main(arguments))",
    )
    assert out.splitlines() == [USAGE, "2"] * 3


def test_run_says_in_one_line_that_a_deepspeed_is_installed(real: Path) -> None:
    out = said(
        "import sys; sys.stderr = sys.stdout",
        "from zerort.compat.run import main",
        "print(main(['-m', 'this']))",
        paths=[real],
    )
    line, status = out.splitlines()
    assert line.startswith("zerort: a DeepSpeed is installed")
    assert status == "1"


def test_the_launchers_name_says_torchrun() -> None:
    out = said(
        INSTALL,
        "from deepspeed.launcher.runner import main, DEEPSPEED_ENVIRONMENT_NAME",
        "from zerort.compat.deepspeed.pieces import command",
        "import sys; sys.stderr = sys.stdout",
        "print(command())",
        "try: main()",
        "except ValueError as error: print(error)",
    )
    first, status, second = out.splitlines()
    assert status == "2"
    assert first == second
    assert "torchrun --nproc_per_node=N -m zerort.compat.run" in first
