"""Makes checkpoints with a real DeepSpeed on two gloo ranks, and the weights with which it went on:

    DS_ACCELERATOR=cpu torchrun --nproc_per_node=2 make.py OUT STAGE-DTYPE...

OUT/STAGE-DTYPE gets the checkpoint behind step 3, and `weights.safetensors`: `before.NAME` are the
fp32 weights in it, `after.NAME` those behind step 6.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[2] / "py"))

from deepspeed_run import AFTER, BEFORE, Net, config_of, optimizer_of, train


def weights(folder: Path, stage: int) -> dict[str, torch.Tensor]:
    """The fp32 weights of a checkpoint, as DeepSpeed's own script rebuilds them; at stage 0, which
    it does not read, those of the module.
    """
    if stage:
        script = importlib.import_module("deepspeed.utils.zero_to_fp32")
        found: dict[str, torch.Tensor] = script.get_fp32_state_dict_from_zero_checkpoint(folder)
        return found
    path = folder / (folder / "latest").read_text() / "mp_rank_00_model_states.pt"
    module: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["module"]
    return module


def make(deepspeed: Any, out: Path, stage: int, dtype: str) -> None:
    model, rank, world = Net(), dist.get_rank(), dist.get_world_size()
    config = config_of(stage, dtype)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    train(engine, rank, world, range(BEFORE))
    engine.save_checkpoint(str(out), client_state={"epoch": 2, "seen": [1, 2]})
    train(engine, rank, world, range(BEFORE, AFTER))
    later = out.with_name(f"{out.name}-later")
    engine.save_checkpoint(str(later))
    dist.barrier()
    if rank == 0:
        kept = {
            f"{when}.{name}": value.float().contiguous().clone()
            for when, folder in (("before", out), ("after", later))
            for name, value in weights(folder, stage).items()
        }
        save_file(kept, out / "weights.safetensors")
        shutil.rmtree(later)
        for script in out.glob("zero_to_*.py"):
            script.unlink()
    dist.barrier()


def main() -> None:
    """Runs the command line."""
    torch.set_num_threads(1)
    deepspeed = importlib.import_module("deepspeed")
    backend: Any = (
        importlib.import_module("deepspeed.comm.torch") and sys.modules["deepspeed.comm.torch"]
    )
    backend.build_shm_op = lambda: None  # it would be compiled, for a collective of one machine
    deepspeed.init_distributed("gloo")
    for case in sys.argv[2:]:
        stage, dtype = case.split("-")
        make(deepspeed, Path(sys.argv[1]) / case, int(stage), dtype)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
