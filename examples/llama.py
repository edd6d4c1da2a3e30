"""What the two examples with Hugging Face's libraries have in common."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 64


def begin() -> None:
    """Before anything else of Accelerate's: which backend its ranks talk over.

    It chooses one for accelerators alone; on the CPU it is to be said, or every rank trains alone.
    """
    os.environ.setdefault("ACCELERATE_USE_DEEPSPEED", "true")
    on_cpu = "RANK" in os.environ and not torch.accelerator.is_available()
    PartialState(**({"backend": "gloo"} if on_cpu else {}))


def tiny_llama() -> LlamaForCausalLM:
    """Over bytes, with 0.4 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
        )
    )
