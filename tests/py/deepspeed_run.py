"""A short run that DeepSpeed and zerort do alike: a tied and a frozen weight, a buffer, two groups,
a schedule, clipping. The engine API is the same, so one loop serves both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BEFORE, AFTER = 3, 6  # steps at which a checkpoint is made, and at which the run ends
OVERFLOWS = (1, 4)
"""Steps of an fp16 run whose loss is infinite."""
NAMES = ("embed.weight", "mid.weight", "back.weight")
NAMES_WITHOUT_DECAY = ("norm.weight", "norm.bias", "mid.bias", "back.bias")


class Net(nn.Module):
    """(batch, 4) tokens of 11 -> (batch, 4, 11)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(11, 6)
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.LayerNorm(6)
        self.mid = nn.Linear(6, 5)
        self.back = nn.Linear(5, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.arange(3.0))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.base(self.embed(tokens))
        return self.head(self.back(torch.tanh(self.mid(self.norm(hidden)))))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    decayed = {"params": [named[name] for name in NAMES], "weight_decay": 0.1}
    others = {"params": [named[name] for name in NAMES_WITHOUT_DECAY], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, others], lr=1e-2, eps=1e-3)


def config_of(stage: int, dtype: str) -> dict[str, Any]:
    schedule = {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 10}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "scheduler": {"type": "WarmupLR", "params": {**schedule, "warmup_type": "linear"}},
    }
    if dtype == "fp16":
        scale = {"initial_scale_power": 6, "loss_scale_window": 2, "hysteresis": 2}
        config["fp16"] = {"enabled": True, **scale}
    elif dtype != "fp32":
        config[dtype] = {"enabled": True}
    return config


def train(engine: Any, rank: int, world: int, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        tokens = torch.randint(0, 11, (8, 4), generator=generator).chunk(world)[rank]
        logits = engine(tokens).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        overflows = engine.fp16_enabled() and step in OVERFLOWS
        engine.backward(loss * float("inf") if overflows else loss)
        engine.step()
