"""The example with DeepSpeed's getting-started loop: with the import changed, and as DeepSpeed's
own program that zerort.compat.run starts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
EXAMPLE = EXAMPLES / "deepspeed_loop.py"
IMPORT = "import zerort as deepspeed\n"

pytestmark = pytest.mark.timeout(300)


def losses(*program: str, save_dir: Path, steps: int) -> dict[int, str]:
    """What rank 0 of two prints, by step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = [
        f"--deepspeed_config={EXAMPLE.with_suffix('.json')}",
        f"--save_dir={save_dir}",
        f"--steps={steps}",
        "--save_interval=1000",
    ]
    paths = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *program, *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=140,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step +(\d+) +loss ([\d.]+)$", done.stdout, re.MULTILINE)
    return {int(step): loss for step, loss in lines}


def test_the_loop_learns(tmp_path: Path) -> None:
    found = losses(str(EXAMPLE), save_dir=tmp_path, steps=10)
    assert list(found) == [1, 10] and float(found[10]) < float(found[1]) - 0.5


@pytest.mark.slow
def test_the_loop_goes_on_where_it_was_and_is_the_same_program_under_deepspeeds_name(
    tmp_path: Path,
) -> None:
    text = EXAMPLE.read_text()
    assert text.count(IMPORT) == 1 and "zerort" not in text.split(IMPORT)[1]
    program = tmp_path / "program.py"
    program.write_text(text.replace(IMPORT, "import deepspeed\n"))
    whole = losses("-m", "zerort.compat.run", str(program), save_dir=tmp_path / "whole", steps=20)
    assert list(whole) == [1, 10, 20] and float(whole[20]) < float(whole[1]) - 1
    halves = tmp_path / "halves"
    first = losses(str(EXAMPLE), save_dir=halves, steps=10)
    second = losses(str(EXAMPLE), save_dir=halves, steps=10)
    assert first == {1: whole[1], 10: whole[10]}
    assert list(second) == [11, 20] and second[20] == whole[20]
