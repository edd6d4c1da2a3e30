"""The example with DeepSpeed's getting-started loop: with the import changed, and as DeepSpeed's
own program that zerort.compat.run starts.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import ranks

EXAMPLES = Path(__file__).parents[3] / "examples"
EXAMPLE = EXAMPLES / "deepspeed_loop.py"
IMPORT = "import zerort as deepspeed\n"

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("own_ranks")]


def options(save_dir: Path, steps: int) -> list[str]:
    return [
        f"--deepspeed_config={EXAMPLE.with_suffix('.json')}",
        f"--save_dir={save_dir}",
        f"--steps={steps}",
        "--save_interval=1000",
    ]


def losses(printed: str) -> dict[int, str]:
    """What rank 0 of two prints, by step."""
    lines = re.findall(r"^step +(\d+) +loss ([\d.]+)$", printed, re.MULTILINE)
    return {int(step): loss for step, loss in lines}


def under_torchrun(*program: str) -> dict[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *program],
        check=False,
        capture_output=True,
        text=True,
        timeout=140,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return losses(done.stdout)


def in_new_processes(*arguments: str) -> dict[int, str]:
    """The example on two ranks that need not import torch first."""
    return losses(ranks.run(2, example, arguments, timeout=120)[0])


def example(rank: int, world: int, arguments: tuple[str, ...]) -> str:
    sys.argv, sys.path[:0] = [str(EXAMPLE), *arguments], [str(EXAMPLES)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return out.getvalue()


def test_the_loop_learns(tmp_path: Path) -> None:
    found = in_new_processes(*options(tmp_path, steps=10))
    assert list(found) == [1, 10] and float(found[10]) < float(found[1]) - 0.5


@pytest.mark.slow
def test_the_loop_goes_on_where_it_was_and_is_the_same_program_under_deepspeeds_name(
    tmp_path: Path,
) -> None:
    text = EXAMPLE.read_text()
    assert text.count(IMPORT) == 1 and "zerort" not in text.split(IMPORT)[1]
    program = tmp_path / "program.py"
    program.write_text(text.replace(IMPORT, "import deepspeed\n"))
    start = ("-m", "zerort.compat.run", str(program))
    whole = under_torchrun(*start, *options(tmp_path / "whole", steps=20))
    assert list(whole) == [1, 10, 20] and float(whole[20]) < float(whole[1]) - 1
    half = options(tmp_path / "halves", steps=10)
    first, second = in_new_processes(*half), in_new_processes(*half)
    assert first == {1: whole[1], 10: whole[10]}
    assert list(second) == [11, 20] and second[20] == whole[20]


@pytest.mark.slow
def test_the_example_itself_is_started_by_torchrun(tmp_path: Path) -> None:
    assert list(under_torchrun(str(EXAMPLE), *options(tmp_path, steps=10))) == [1, 10]
