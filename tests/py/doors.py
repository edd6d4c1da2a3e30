"""Ranks that come through another library's door: the environment that its launcher would make, on
gloo.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zerort.compat.deepspeed as shim

__all__ = [
    "BATCH",
    "enter",
    "micro_batch",
    "needs",
    "net",
    "rows",
    "said_in_words",
    "sentences",
    "settings",
    "tiny_llama",
    "tiny_tokenizer",
]

BATCH = 4
"""Samples of a micro-batch on one rank."""


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips where one of them is not installed. Nothing is imported: a rank has to be told first
    who answers for DeepSpeed.
    """
    missing = [name for name in packages if find_spec(name) is None]
    reason = f"needs {', '.join(missing)}: pip install zerort[compat-test]"
    return pytest.mark.skipif(bool(missing), reason=reason)


def enter(rank: int, world: int) -> None:
    """Before anything of Hugging Face's is imported."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",  # the group is there
        HF_HUB_OFFLINE="1",
        ACCELERATE_USE_DEEPSPEED="true",
        TOKENIZERS_PARALLELISM="false",
    )
    shim.install()
    from accelerate import PartialState

    # Accelerate gives DeepSpeed several processes only where there is an accelerator
    PartialState(backend="gloo")


def settings(stage: int, precision: str, **more: Any) -> dict[str, Any]:
    """A file as people have it for these integrations."""
    return {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 4},
        **more,
    }


def net() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of 8 and targets of 4, the same on every rank."""
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(count, 8, generator=draw)
    return inputs, torch.tanh(inputs @ torch.randn(8, 4, generator=draw))


def micro_batch(data: tuple[torch.Tensor, torch.Tensor], step: int) -> list[torch.Tensor]:
    """What Accelerate's loader hands this rank as its `step`-th batch: ranks take turns."""
    at = (step * dist.get_world_size() + dist.get_rank()) * BATCH
    return [part[at : at + BATCH] for part in data]


def tiny_llama(place: str | os.PathLike[str]) -> None:
    """A causal model of two layers saved as `from_pretrained` reads it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(place)


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of 8 in which each number follows from the one before."""
    draw = torch.Generator().manual_seed(11)
    starts = torch.randint(3, 32, (count, 1), generator=draw)
    tokens = 3 + (starts + torch.arange(8) * 5) % 29
    return [{"input_ids": row, "labels": row} for row in tokens]


def tiny_tokenizer(place: str | os.PathLike[str]) -> None:
    """Words `w3` to `w31`, beside the model that `tiny_llama` saves."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<bos>": 0, "<eos>": 1, "<pad>": 2, **{f"w{n}": n for n in range(3, 32)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(place)


def said_in_words(count: int) -> list[str]:
    """The sentences as text."""
    return [
        " ".join(f"w{int(token)}" for token in sentence["input_ids"])
        for sentence in sentences(count)
    ]
