"""Trains a small model under torchrun and lets rank 0 write its weights: the same program on gloo
and on NCCL.

torchrun --nproc_per_node=2 train_small.py STAGE ACCUMULATION OUTPUT
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import zerort
from training import weights


def main(stage: int, accumulation: int, output: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 64))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000},
    }
    engine, *_ = zerort.initialize(model=model, config=config)
    draw = torch.Generator().manual_seed(1 + torch.distributed.get_rank())
    for _ in range(5 * accumulation):
        batch = torch.randn(4, 64, generator=draw).to(engine.device)
        engine.backward(engine(batch).square().mean())
        engine.step()
    found = {
        "device": engine.device.type,
        "norm": engine.get_global_grad_norm(),
        "weights": weights(engine),
    }
    if torch.distributed.get_rank() == 0:
        torch.save(found, output)
    engine.destroy()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
