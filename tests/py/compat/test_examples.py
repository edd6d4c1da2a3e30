"""The examples of the doors, as people start them: under torchrun, on two ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import doors

pytestmark = pytest.mark.usefixtures("own_ranks")

EXAMPLES = Path(__file__).parents[3] / "examples"


def start(folder: Path, name: str, *options: str) -> str:
    """What it printed."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node=2", str(EXAMPLES / name), *options],
        cwd=folder,
        env={
            **os.environ,
            **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        },
        check=False,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def bits(text: str) -> list[float]:
    """Bits per byte of the held-out text, as the last line says them."""
    [line] = re.findall("validation: (.*) ", text)
    return [float(number) for number in re.findall(r"\d+\.\d{3}", line)]


@doors.needs("accelerate", "transformers")
@pytest.mark.slow
def test_the_trainer_learns_saves_and_resumes(tmp_path: Path) -> None:
    [learned] = bits(start(tmp_path, "hf_trainer.py", "--steps=12"))
    assert learned < 6.5  # of 8
    assert (tmp_path / "runs/hf_trainer/checkpoint-6/latest").is_file()
    assert (tmp_path / "runs/hf_trainer/model/model.safetensors").is_file()


@doors.needs("accelerate", "transformers")
@pytest.mark.slow
def test_the_trainer_goes_on_at_its_last_checkpoint(tmp_path: Path) -> None:
    start(tmp_path, "hf_trainer.py", "--steps=12", "--stage=3")
    text = start(tmp_path, "hf_trainer.py", "--steps=24", "--stage=3", "--resume")
    assert bits(text)[0] < 6
    steps = re.findall(r"'epoch': '([^']*)'", text)
    assert steps and float(steps[0]) * 20_000 / 32 > 12, text  # nothing of the first half again


@doors.needs("accelerate", "transformers")
@pytest.mark.slow
def test_the_loop_with_accelerate_learns_at_stage_3(tmp_path: Path) -> None:
    before, after = bits(start(tmp_path, "accelerate_loop.py", "--steps=12", "--stage=3"))
    assert after < before - 1
    assert (tmp_path / "runs/accelerate_loop/model/model.safetensors").is_file()
