"""The launchers: torchrun and `accelerate launch` over `zerort.compat.run`, each with two ranks on
CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import doors
import zerort_as_deepspeed

pytestmark = [
    pytest.mark.slow,
    doors.needs("accelerate"),
    pytest.mark.timeout(200),
    pytest.mark.usefixtures("own_ranks"),
]

PYTHON = Path(zerort_as_deepspeed.__file__).parents[1]  # sources, or where the wheel is
PROGRAM = """
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin

PartialState(backend="gloo")
accelerator = Accelerator()
model = torch.nn.Linear(8, 4)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
rows = torch.utils.data.TensorDataset(torch.ones(32, 8))
loader = torch.utils.data.DataLoader(rows, batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for (inputs,) in loader:
    accelerator.backward(model(inputs).pow(2).mean())
    optimizer.step()
    optimizer.zero_grad()
kind = type(model)
print(f"{accelerator.process_index} of {accelerator.num_processes}: {kind.__module__}", flush=True)
"""
RUN = ["-m", "zerort.compat.run"]
ACCELERATE = [
    "accelerate.commands.launch",
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--use_deepspeed",
    "--zero_stage=2",
    "--main_process_port=0",
]
WAYS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *RUN],
    "accelerate launch, which asks for DeepSpeed itself": [*RUN, "-m", *ACCELERATE],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_launcher_starts_ranks_that_find_zerort(way: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "zerort-0.dist-info").mkdir()
    (tmp_path / "zerort-0.dist-info" / "METADATA").write_text("Name: zerort\nVersion: 0\n")
    (tmp_path / "zerort-0.dist-info" / "entry_points.txt").write_text(
        "[torch.backends]\nzerort = zerort_as_deepspeed:start\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(tmp_path), str(PYTHON))),
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("ZERORT_AS_DEEPSPEED", None)
    done = subprocess.run(
        [sys.executable, *WAYS[way], str(tmp_path / "train.py")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if "zerort.compat" in line]
    assert sorted(lines) == [f"{rank} of 2: zerort.compat.deepspeed.engine" for rank in range(2)], (
        done.stderr
    )
