"""Trains a model that would not fit one rank's memory, on several.

    torchrun --nproc_per_node=2 examples/train_large.py                     1.5 GB of weights
    torchrun --nproc_per_node=2 examples/train_large.py --limit_gb 5        and a limit to prove it

In fp32 with Adam a parameter takes 16 bytes: the value, its gradient and two moments. At stage 3
each of N ranks keeps 1/N of that, and beside it the few units that are in use. The model is born
sharded, so that no rank ever holds it whole. `--limit_gb` limits what each rank may allocate
(RLIMIT_DATA); with `--stage 2` the same model then fails to start.
"""

from __future__ import annotations

import argparse
import os
import resource

import torch
from rich.progress import track

import zerort
from gpt import GPT, Shape, next_token_loss

GB = 1e9


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Train a GPT whose parameters are sharded.")
    parser.add_argument("--width", type=int, default=2048, help="of the residual stream")
    parser.add_argument("--depth", type=int, default=7, help="blocks")
    parser.add_argument("--context", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (default: 4)")
    parser.add_argument("--stage", type=int, choices=(2, 3), default=3, help="ZeRO stage")
    parser.add_argument("--limit_gb", type=float, help="what one rank may allocate, in GB")
    return parser.parse_args()


def configuration(stage: int, width: int) -> dict[str, object]:
    """Units of one large matrix, and room for six of them."""
    unit = 4 * width * width
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": unit,
            "stage3_max_live_parameters": 6 * unit,
        },
        "zerort": {"window": 2},
    }


def train(engine: zerort.Engine, args: argparse.Namespace) -> float:
    """Runs the steps on tokens that repeat, so that there is something to learn."""
    rank = int(os.environ.get("RANK", "0"))
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, 256, (1, args.context + 1), generator=generator).to(engine.device)
    loss = torch.tensor(0.0)
    for _ in track(range(args.steps), description="steps", disable=rank != 0):
        loss = next_token_loss(engine(tokens[:, :-1]), tokens[:, 1:])
        engine.backward(loss)
        engine.step()
    return float(loss.detach())


def main() -> None:
    args = arguments()
    if args.limit_gb:
        resource.setrlimit(resource.RLIMIT_DATA, (int(args.limit_gb * GB),) * 2)
    config = configuration(args.stage, args.width)
    shape = Shape(context=args.context, width=args.width, depth=args.depth, heads=16)
    zerort.init_distributed()
    before = peak()
    with zerort.zero.Init(config_dict_or_path=config):
        model = GPT(shape)
    elements = sum(parameter.numel() for parameter in model.parameters())
    engine, *_ = zerort.initialize(model=model, config=config)
    loss = train(engine, args)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    parts = 16 * elements / (world if args.stage == 3 else 1)
    print(
        f"rank {os.environ.get('RANK', '0')}: {elements / 1e6:.0f} million parameters, "
        f"{4 * elements / GB:.2f} GB of weights; loss {loss:.2f}; state by the formula "
        f"{parts / GB:.2f} GB, peak {(peak() - before) / GB:.2f} GB over what torch takes",
        flush=True,
    )
    engine.destroy()


def peak() -> float:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    main()
