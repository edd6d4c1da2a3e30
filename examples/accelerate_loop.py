"""A loop of one's own with Accelerate over zerort: a tiny Llama learns the source of this Python's
own standard library, byte by byte.

    pip install accelerate transformers
    python examples/accelerate_loop.py                                        one process
    torchrun --nproc_per_node=2 examples/accelerate_loop.py         two ranks on this machine

What differs from a script for DeepSpeed is the two lines of `install`. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zerort.compat.deepspeed as shim

shim.install()  # before what imports deepspeed

from accelerate import Accelerator  # noqa: E402
from accelerate.utils import DeepSpeedPlugin, set_seed  # noqa: E402

from corpus import Corpus  # noqa: E402
from llama import CONTEXT, begin, tiny_llama  # noqa: E402

MICRO_BATCH, ACCUMULATION = 8, 2
OUTPUT = Path("runs/accelerate_loop")


def windows(text: Tensor, count: int) -> Tensor:
    """`count` rows of `CONTEXT` bytes, spread evenly over a text, int64."""
    starts = torch.linspace(0, len(text) - CONTEXT, count).long()
    return text[starts[:, None] + torch.arange(CONTEXT)].long()


def loader(rows: Tensor, *, shuffled: bool = False) -> torch.utils.data.DataLoader[Tensor]:
    """Micro-batches of rows; Accelerate deals them out among the ranks."""
    drawn = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=MICRO_BATCH,
        shuffle=shuffled,
        generator=drawn,
        drop_last=shuffled,
    )


def accelerator_of(stage: int) -> Accelerator:
    """Over a plugin, as for DeepSpeed."""
    begin()
    plugin = DeepSpeedPlugin(
        zero_stage=stage,
        gradient_accumulation_steps=ACCUMULATION,
        gradient_clipping=1.0,
        zero3_save_16bit_model=True,
    )
    return Accelerator(gradient_accumulation_steps=ACCUMULATION, deepspeed_plugin=plugin)


@torch.no_grad()
def bits_per_byte(accelerator: Accelerator, model: Any, held_out: Any) -> float:
    """Mean over the held-out windows of all ranks."""
    model.eval()
    losses = [
        accelerator.gather_for_metrics(model(input_ids=rows, labels=rows).loss.repeat(len(rows)))
        for rows in held_out
    ]
    model.train()
    return float(torch.cat(losses).mean()) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny Llama in an Accelerate loop.")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: 60)")
    parser.add_argument(
        "--stage", type=int, choices=(0, 1, 2, 3), default=2, help="ZeRO stage (default: 2)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    args = parser.parse_args()

    accelerator = accelerator_of(args.stage)
    set_seed(0)
    model: Any = tiny_llama()
    corpus = Corpus.load(None)
    each = args.steps * ACCUMULATION * MICRO_BATCH * accelerator.num_processes
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    # Accelerate steps it once for each rank.
    total = args.steps * accelerator.num_processes
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    model, optimizer, train, held_out, schedule = accelerator.prepare(
        model,
        optimizer,
        loader(windows(corpus.train, each), shuffled=True),
        loader(windows(corpus.validation, 64)),
        schedule,
    )
    before = bits_per_byte(accelerator, model, held_out)
    for index, rows in enumerate(train, start=1):
        with accelerator.accumulate(model):
            loss = model(input_ids=rows, labels=rows).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if index % (10 * ACCUMULATION) == 0:
            accelerator.print(f"step {index // ACCUMULATION}: loss {loss.item():.3f}")
    after = bits_per_byte(accelerator, model, held_out)
    accelerator.save_state(str(args.output / "state"))
    accelerator.save_model(model, str(args.output / "model"))
    accelerator.print(
        f"validation: {before:.3f} bits per byte before, {after:.3f} after; "
        f"model: {args.output / 'model'}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
