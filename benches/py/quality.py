"""What a narrow wire costs in quality: the demo's model on the demo's text, and the bits per byte
that it needs for text it has not seen, by wire and seed.

    python benches/py/quality.py                            600 steps, three seeds
    python benches/py/quality.py --seeds 1 --steps 100      a look

A seed gives weights; every run of it sees the same batches. What int8 loses against fp32 at stages
0 and 1 as they are by default is to stay within `--within` bits per byte, else the command fails.
This is no timing: it may run beside something else.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import ranks
import zerort
from workloads import GPT, Shape, next_token_loss

from corpus import Corpus  # isort: skip  (workloads has put the examples' folder on the path)

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_text.json"
WINDOWS = 192
CONSOLE = Console(width=120)


@dataclass(frozen=True, eq=False)
class Wire:
    """How gradients are sent in a run."""

    name: str
    stage: int
    runtime: dict[str, Any]
    judged: bool = False
    """Whether it has to come near fp32."""


WIRES = (
    Wire("fp32", 1, {"wire": "fp32"}),
    Wire("bf16", 1, {"wire": "bf16"}),
    Wire("int8, error feedback", 1, {"wire": "int8"}, judged=True),
    Wire("int8, error feedback, stage 0", 0, {"wire": "int8"}, judged=True),
    Wire("int8, rounded at random", 1, {"wire": "int8", "wire_error_feedback": False}),
    Wire("int8, rounded at random, stage 2", 2, {"wire": "int8", "wire_error_feedback": False}),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Validation bits per byte by wire format.")
    parser.add_argument("--steps", type=int, default=600, help="of each run (default 600)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each wire (default 3)")
    parser.add_argument("--ranks", type=int, default=ranks.default_world())
    parser.add_argument(
        "--within", type=float, default=0.01, help="bits per byte that int8 may lose (default 0.01)"
    )
    return parser.parse_args()


def configuration(wire: Wire, steps: int) -> dict[str, Any]:
    """The demo's, by this wire, without its trace and checkpoints."""
    config: dict[str, Any] = json.loads(EXAMPLE.read_text())
    config["scheduler"]["params"] |= {
        "total_num_steps": steps,
        "warmup_num_steps": max(1, min(50, steps // 10)),
    }
    return config | {"zero_optimization": {"stage": wire.stage}, "zerort": wire.runtime}


def trained(wire: Wire, seed: int, args: argparse.Namespace, corpus: Corpus) -> float:
    """Bits per byte of held-out text behind a run."""
    torch.manual_seed(seed)
    engine, *_ = zerort.initialize(model=GPT(Shape()), config=configuration(wire, args.steps))
    rank, world = dist.get_rank(), dist.get_world_size()
    size, context = engine.train_micro_batch_size_per_gpu(), engine.module.shape.context
    for index in range(args.steps * engine.gradient_accumulation_steps()):
        batch = corpus.batch(index, rank, world, size=size, context=context)
        inputs, targets = (part.to(engine.device) for part in batch)
        engine.backward(next_token_loss(engine(inputs), targets))
        engine.step()
    found = bits_per_byte(engine, corpus)
    engine.destroy()
    return found


@torch.no_grad()
def bits_per_byte(engine: zerort.Engine, corpus: Corpus) -> float:
    engine.eval()
    inputs, targets = corpus.held_out(WINDOWS, engine.module.shape.context)
    losses = [
        next_token_loss(engine(some.to(engine.device)), wanted.to(engine.device))
        for some, wanted in zip(inputs.split(8), targets.split(8), strict=True)
    ]
    return float(torch.stack(losses).mean()) / math.log(2)


def main(device: torch.device, args: argparse.Namespace) -> None:
    corpus, first = Corpus.load(None), dist.get_rank() == 0
    found: dict[Wire, list[float]] = {wire: [] for wire in WIRES}
    for seed in range(args.seeds):
        for wire in WIRES:
            found[wire].append(trained(wire, seed, args, corpus))
            if first:
                CONSOLE.print(f"seed {seed}, {wire.name}: {found[wire][-1]:.4f}", markup=False)
    if not first:
        return
    base = found[WIRES[0]]
    CONSOLE.print(table(found, base, args))
    lost = {
        wire.name: most
        for wire in WIRES
        if wire.judged and (most := max(differences(found[wire], base))) > args.within
    }
    if lost:
        sys.exit(f"further from fp32 than {args.within} bits per byte: {lost}")


def differences(values: list[float], base: list[float]) -> list[float]:
    return [value - other for value, other in zip(values, base, strict=True)]


def table(found: dict[Wire, list[float]], base: list[float], args: argparse.Namespace) -> Table:
    shown = Table(
        title=f"bits per byte of held-out text after {args.steps} steps, {args.ranks} ranks"
    )
    shown.add_column("wire")
    for seed in range(args.seeds):
        shown.add_column(f"seed {seed}", justify="right")
    shown.add_column("mean - fp32", justify="right")
    shown.add_column("worst - fp32", justify="right")
    for wire, values in found.items():
        apart = differences(values, base)
        mean = sum(apart) / len(apart)
        shown.add_row(
            wire.name, *(f"{v:.4f}" for v in values), f"{mean:+.4f}", f"{max(apart):+.4f}"
        )
    return shown


if __name__ == "__main__":
    chosen = arguments()
    ranks.run(chosen.ranks, main, chosen)
