"""The example with Lightning's Trainer: started by the Trainer itself, and by torchrun to go on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "lightning_fit.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

pytestmark = [
    pytest.mark.usefixtures("own_ranks"),
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        find_spec("pytorch_lightning") is None, reason="pytorch-lightning is not installed"
    ),
]


def fit(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> tuple[int, float]:
    """Steps, and bits a byte of the best checkpoint."""
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLE), f"--folder={folder}", *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=140,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    steps, bits = re.findall(r"^(\d+) steps, ([\d.]+) bits a byte$", done.stdout, re.MULTILINE)[0]
    return int(steps), float(bits)


@pytest.mark.slow
def test_the_example_learns_on_ranks_that_the_trainer_starts(tmp_path: Path) -> None:
    steps, bits = fit(tmp_path, "--epochs=1")
    assert steps == 16
    assert bits < 5.5, "untrained it is 8"
    assert (tmp_path / "last.ckpt" / "checkpoint" / "manifest.json").is_file()


@pytest.mark.slow
def test_the_example_goes_on_at_stage_3_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    stage = "--strategy=zerort_stage_3"
    whole = fit(tmp_path / "whole", stage, "--epochs=2", launcher=TORCHRUN)
    fit(tmp_path / "halves", stage, "--epochs=1", launcher=TORCHRUN)
    halves = fit(tmp_path / "halves", stage, "--epochs=2", "--resume", launcher=TORCHRUN)
    assert halves == whole
    assert whole[0] == 32
