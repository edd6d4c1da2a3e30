"""What a narrow wire costs in quality: the demo's model on the demo's text, and the bits per byte
that it needs for text it has not seen, by wire and seed.

    python benches/py/quality.py                            600 steps, three seeds
    python benches/py/quality.py --seeds 1 --steps 100      a look

A seed gives weights; every run of it sees the same batches. What int8 loses against fp32 on average
over the seeds, at stages 0 and 1 as they are by default, is to stay within `--within` bits per
byte, else the command fails. This is no timing: it may run beside something else.

So short a run is chaotic: it ends elsewhere when anything at all is rounded otherwise. How far
stands beside it, as runs in fp32 whose first weights are moved by a millionth: what a wire differs
by within that says nothing about the wire, and more seeds say more. At the demo's own learning
rate, 3e-3, such runs end 0.06 bits per byte apart, so that the rate is a third of it here. All are
compared with the mean of the runs in fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
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
    exact: bool = False
    """Whether it is fp32, with which others are compared."""
    moved: float = 0.0
    """By how much of themselves weights are moved before the first step."""


WIRES = (
    Wire("fp32", 1, {"wire": "fp32"}, exact=True),
    Wire("fp32, moved by a millionth", 1, {"wire": "fp32"}, exact=True, moved=1e-6),
    Wire("fp32, moved by two", 1, {"wire": "fp32"}, exact=True, moved=2e-6),
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
    parser.add_argument("--lr", type=float, default=1e-3, help="at its peak (default 1e-3)")
    parser.add_argument("--only", action="append", help="these wires by name, and fp32")
    parser.add_argument("--ranks", type=int, default=ranks.default_world())
    parser.add_argument(
        "--within", type=float, default=0.01, help="bits per byte that int8 may lose (default 0.01)"
    )
    return parser.parse_args()


def configuration(wire: Wire, steps: int, lr: float) -> dict[str, Any]:
    """The demo's, by this wire, without its trace and checkpoints."""
    config: dict[str, Any] = json.loads(EXAMPLE.read_text())
    config["optimizer"]["params"]["lr"] = lr
    config["scheduler"]["params"] |= {
        "total_num_steps": steps,
        "warmup_num_steps": max(1, min(50, steps // 10)),
    }
    zero = {"stage": wire.stage}
    return config | {"zero_optimization": zero, "zerort": wire.runtime, "log_level": "error"}


def trained(wire: Wire, seed: int, args: argparse.Namespace, corpus: Corpus) -> float:
    """Bits per byte of held-out text behind a run."""
    torch.manual_seed(seed)
    model = GPT(Shape())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + wire.moved)
    engine, *_ = zerort.initialize(model=model, config=configuration(wire, args.steps, args.lr))
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
    wires = [wire for wire in WIRES if wire.exact or not args.only or wire.name in args.only]
    found: dict[Wire, list[float]] = {wire: [] for wire in wires}
    for seed in range(args.seeds):
        for wire in wires:
            found[wire].append(trained(wire, seed, args, corpus))
            if first:
                CONSOLE.print(f"seed {seed}, {wire.name}: {found[wire][-1]:.4f}", markup=False)
    if not first:
        return
    base = [mean(runs) for runs in zip(*(found[wire] for wire in wires if wire.exact), strict=True)]
    CONSOLE.print(table(found, base, args))
    means = {wire.name: mean(differences(found[wire], base)) for wire in wires if wire.judged}
    if any(lost > args.within for lost in means.values()):
        sys.exit(f"further from fp32 than {args.within} bits per byte: {means}")


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
        shown.add_row(
            wire.name, *(f"{v:.4f}" for v in values), f"{mean(apart):+.4f}", f"{max(apart):+.4f}"
        )
    return shown


if __name__ == "__main__":
    chosen = arguments()
    ranks.run(chosen.ranks, main, chosen)
