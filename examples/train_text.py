"""Teaches a small byte-level GPT the source of this Python's own standard library.

    python examples/train_text.py                                             one process
    torchrun --nproc_per_node=2 examples/train_text.py              two ranks on this machine
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d \\
             --rdzv_endpoint=HOST:29400 examples/train_text.py      many machines, the same file

With --max-restarts=3 before the script and --resume behind it, torchrun starts all ranks anew when
one is lost, and they go on from the last checkpoint (docs/restarts.md).

Nothing is downloaded. How it is trained stands in train_text.json beside this file; bits per byte
start at 8. With --resume a run that was interrupted, however rudely, goes on from its last
checkpoint, on any number of ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zerort
from corpus import Corpus
from gpt import GPT, Shape, next_token_loss
from progress import Progress

VALIDATION_WINDOWS = 48
PROMPT = b"def "
SAMPLE_BYTES = 300
MONITORED = Path("runs/train_text/monitor")


def arguments() -> argparse.Namespace:
    """What the command line says; everything else is in the configuration file."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level GPT on source text with zerort."
    )
    parser.add_argument(
        "--steps", type=int, help="optimizer steps (default: the configuration's total_num_steps)"
    )
    parser.add_argument(
        "--stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage (default: the configuration's)"
    )
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).with_suffix(".json"), help="DeepSpeed JSON"
    )
    parser.add_argument(
        "--text", type=Path, help="a text file, or a folder of *.py (default: the standard library)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("runs/train_text/checkpoints"), help="their folder"
    )
    parser.add_argument(
        "--save_every",
        type=int,
        default=50,
        help="steps between checkpoints; 0 for none (default: 50)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, if there is one"
    )
    parser.add_argument(
        "--monitors",
        action="store_true",
        help=f"write loss and learning rate into {MONITORED}, for TensorBoard and as CSV",
    )
    return parser.parse_args()


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The file's configuration with the command line's stage and number of steps put in."""
    config: dict[str, Any] = json.loads(args.config.read_text())
    if args.stage is not None:
        config.setdefault("zero_optimization", {})["stage"] = args.stage
    if args.monitors:
        place = {"output_path": str(MONITORED.parent), "job_name": MONITORED.name}
        for kind in ("tensorboard", "csv_monitor"):
            config[kind] = {"enabled": True, **place}
    schedule = config.get("scheduler", {}).get("params", {})
    if args.steps is None:
        args.steps = schedule.get("total_num_steps", 800)
    elif "total_num_steps" in schedule:
        schedule["total_num_steps"] = args.steps
        schedule["warmup_num_steps"] = max(
            1, min(schedule.get("warmup_num_steps", 1), args.steps // 10)
        )
    return config


def traces(config: dict[str, Any]) -> list[Path]:
    """Where each rank's trace will be, their folder made; empty when no trace is asked for."""
    template = os.environ.get("ZERORT_TRACE") or config.get("zerort", {}).get("trace", {}).get(
        "path"
    )
    if not template:
        return []
    paths = [Path(template.replace("{rank}", str(rank))) for rank in range(ranks()[1])]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    return paths


def train(
    engine: zerort.Engine, corpus: Corpus, args: argparse.Namespace, progress: Progress
) -> None:
    """Runs until `engine.global_steps` is `args.steps`, and saves on the way."""
    size, parts = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    rank, world = ranks()
    while engine.global_steps < args.steps:
        first = engine.global_steps * parts
        for index in range(first, first + parts):
            batch = corpus.batch(index, rank, world, size=size, context=engine.module.shape.context)
            inputs, targets = (part.to(engine.device) for part in batch)
            loss = next_token_loss(engine(inputs), targets)
            engine.backward(loss)
            engine.step()
        progress.advance(engine, loss, tokens=parts * world * inputs.numel())
        if args.save_every and engine.global_steps % args.save_every == 0:
            engine.save_checkpoint(args.checkpoints)


@torch.no_grad()
def bits_per_byte(engine: zerort.Engine, corpus: Corpus) -> float:
    """Mean over the same held-out windows on every call, which the monitors are told. All ranks
    compute it: a forward may be collective.
    """
    engine.eval()
    inputs, targets = corpus.held_out(VALIDATION_WINDOWS, engine.module.shape.context)
    losses = [
        next_token_loss(engine(some.to(engine.device)), wanted.to(engine.device))
        for some, wanted in zip(inputs.split(8), targets.split(8), strict=True)
    ]
    engine.train()
    found = float(torch.stack(losses).mean()) / math.log(2)
    engine.monitor.write_events([("Validation/bits_per_byte", found, engine.global_samples)])
    return found


def sample(engine: zerort.Engine) -> str:
    """Text that the model writes after `PROMPT`, drawn from a fixed seed."""
    torch.manual_seed(1)
    engine.eval()
    prompt = torch.tensor([list(PROMPT)], device=engine.device)
    # At stage 3 parameters are gathered once here, not once for every byte.
    with zerort.zero.GatheredParameters(list(engine.module.parameters())):
        written: Tensor = engine.module.generate(prompt, SAMPLE_BYTES)
    engine.train()
    return bytes(written[0].tolist()).decode("utf-8", errors="replace")


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def main() -> None:
    args = arguments()
    try:
        config = configuration(args)
        written = traces(config)
        corpus = Corpus.load(args.text)
    except (OSError, ValueError) as error:
        sys.exit(f"train_text: {error}")
    torch.manual_seed(args.seed)
    model = GPT(Shape())
    engine, *_ = zerort.initialize(model=model, config=config)
    if args.resume:
        engine.load_checkpoint(args.checkpoints)

    progress = Progress(total=args.steps, shown=ranks()[0] == 0)
    progress.introduce(engine, corpus)
    before = bits_per_byte(engine, corpus)
    with progress:
        train(engine, corpus, args, progress)
    after = bits_per_byte(engine, corpus)
    text = sample(engine)
    engine.destroy()  # which writes this rank's trace
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # and the others have written theirs
    progress.report(before, after, text, written[0] if written else None)
    if args.monitors:
        progress.console.print(f"monitors: {MONITORED} (tensorboard --logdir {MONITORED})")
    # on several hosts without a common folder the others' traces are elsewhere
    progress.page([trace for trace in written if trace.exists()])


if __name__ == "__main__":
    main()
