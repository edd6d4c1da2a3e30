"""Makes checkpoints with a real DeepSpeed on two gloo ranks, and the weights with which it went on:

    DS_ACCELERATOR=cpu torchrun --nproc_per_node=2 make.py OUT STAGE-DTYPE[-sub|-elastic]...

OUT/CASE gets the checkpoint behind step 3, and `weights.safetensors`: `before.NAME` are the fp32
weights in it, `after.NAME` those behind step 6, and `after.loss_scale` the scale. With `from=DIR`
before the cases each loads the universal checkpoint there instead of making one, and `after.NAME`
alone are written. Those in `universal` are made of cases by

    python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder CASE/TAG \\
        --output_folder OUT/TAG
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


MORE = {"sub": {"sub_group_size": 40}, "elastic": {"elastic_checkpoint": True}}


def make(deepspeed: Any, out: Path, universal: str | None) -> None:
    stage, dtype, *more = out.name.split("-")
    model, rank, world = Net(), dist.get_rank(), dist.get_world_size()
    config = config_of(int(stage), dtype)
    for name in more:
        config["zero_optimization"].update(MORE[name])
    if universal is not None:
        config["checkpoint"] = {"load_universal": True}
        with torch.no_grad():  # so that what is not loaded shows
            for parameter in model.parameters():
                parameter.add_(1.0 if parameter.requires_grad else 0.0)
    if dtype == "fp16":
        # it asks the processor for instructions that torch can do without
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    if universal is None:
        train(engine, rank, world, range(BEFORE))
        engine.save_checkpoint(str(out), client_state={"epoch": 2, "seen": [1, 2]})
    else:
        _, client_state = engine.load_checkpoint(universal)
        assert (engine.global_steps, client_state["epoch"]) == (BEFORE, 2)
    go_on(engine, rank, world, out)


def go_on(engine: Any, rank: int, world: int, out: Path) -> None:
    stage = int(out.name[0])
    train(engine, rank, world, range(BEFORE, AFTER))
    later = out.with_name(f"{out.name}-later")
    engine.save_checkpoint(str(later))
    dist.barrier()
    if rank == 0:
        kept: dict[str, torch.Tensor] = {
            f"{when}.{name}": value.float().contiguous().clone()
            for when, folder in (("before", out), ("after", later))
            if folder.exists()
            for name, value in weights(folder, stage).items()
        }
        if engine.fp16_enabled():
            kept["after.loss_scale"] = torch.tensor(float(engine.optimizer.cur_scale))
        out.mkdir(exist_ok=True, parents=True)
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
    # 0.18 gathers into a view that torch 2.15 guards while gradients are recorded
    dist.all_gather_into_tensor = torch.no_grad()(dist.all_gather_into_tensor)
    deepspeed.init_distributed("gloo")
    universal = None
    for case in sys.argv[2:]:
        if case.startswith("from="):
            universal = case.removeprefix("from=")
        else:
            make(deepspeed, Path(sys.argv[1]) / case, universal)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
