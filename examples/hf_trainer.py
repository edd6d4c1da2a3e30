"""The Trainer of transformers over zerort: a tiny Llama learns the source of this Python's own
standard library, byte by byte.

    pip install accelerate transformers
    python examples/hf_trainer.py                                             one process
    torchrun --nproc_per_node=2 examples/hf_trainer.py              two ranks on this machine

What differs from a script for DeepSpeed is the two lines of `install`. The configuration
hf_trainer.json beside this file is full of "auto", which the Trainer fills in from its arguments;
--stage takes another ZeRO stage. Nothing is downloaded. --resume goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import zerort.compat.deepspeed as shim

shim.install()  # before what imports deepspeed

from transformers import Trainer, TrainingArguments, set_seed  # noqa: E402

from corpus import Corpus  # noqa: E402
from llama import CONTEXT, begin, tiny_llama  # noqa: E402

OUTPUT = Path("runs/hf_trainer")


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """`count` windows of `CONTEXT` bytes, spread evenly over a text. Labels: the model shifts."""

    def __init__(self, text: torch.Tensor, count: int) -> None:
        self._text = text
        self._starts = torch.linspace(0, len(text) - CONTEXT, count).long().tolist()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self._starts[index]
        tokens = self._text[start : start + CONTEXT].long()
        return {"input_ids": tokens, "labels": tokens}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Train a tiny Llama with transformers' Trainer.")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: 60)")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage (default: 2)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser.parse_args()


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The file's configuration, with the command line's stage put in."""
    config: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
    if args.stage is not None:
        config["zero_optimization"]["stage"] = args.stage
    return config


def training(args: argparse.Namespace) -> TrainingArguments:
    """As for DeepSpeed: what is "auto" in the configuration stands here."""
    return TrainingArguments(
        output_dir=str(args.output),
        deepspeed=configuration(args),
        accelerator_config={"use_configured_state": True},
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=args.steps,
        learning_rate=3e-3,
        warmup_steps=args.steps // 10,
        logging_steps=max(1, args.steps // 6),
        save_steps=max(1, args.steps // 2),
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=max(1, args.steps // 2),
        report_to=[],
    )


def main() -> None:
    args = arguments()
    begin()
    given = training(args)
    set_seed(0)
    corpus = Corpus.load(None)
    trainer = Trainer(
        tiny_llama(),
        given,
        train_dataset=Windows(corpus.train, 20_000),
        eval_dataset=Windows(corpus.validation, 64),
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    found = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(args.output / "model"))
    if trainer.is_world_process_zero():
        bits = found / torch.log(torch.tensor(2.0)).item()
        print(f"validation: {bits:.3f} bits per byte; model: {args.output / 'model'}")


if __name__ == "__main__":
    main()
