"""What a narrow wire costs in quality: the demo's model on the demo's text, and the bits per byte
that it needs for text it has not seen, by wire and seed.

    python benches/py/quality.py                            600 steps, three seeds
    python benches/py/quality.py --seeds 1 --steps 100      a look

A seed gives first weights; every run of it sees the same batches. What int8 loses against fp32 on
average over the seeds, at stages 0 and 1 as they are by default, is to stay within `--within` bits
per byte, else the command fails. This is no timing: it may run beside something else.

A run that begins with random weights is chaotic: it finds its first patterns sooner or later when
anything at all is rounded otherwise, and ends up to 0.06 bits per byte away. So the runs of a seed
begin with weights that `--before` steps in fp32 have trained, the same for all. How far runs differ
all the same stands beside it, as runs in fp32 whose first weights are a thousandth larger: what a
wire differs by within that says nothing about the wire, and more seeds say more. All are compared
with the mean of the runs in fp32.
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
    """By how much of themselves weights grow before the first step."""


WIRES = (
    Wire("fp32", 1, {"wire": "fp32"}, exact=True),
    Wire("fp32, a thousandth larger", 1, {"wire": "fp32"}, exact=True, moved=1e-3),
    Wire("fp32, two thousandths", 1, {"wire": "fp32"}, exact=True, moved=2e-3),
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
    parser.add_argument("--before", type=int, default=200, help="steps in fp32 (default 200)")
    parser.add_argument("--only", action="append", help="these wires by name, and fp32")
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
    zero = {"stage": wire.stage}
    return config | {"zero_optimization": zero, "zerort": wire.runtime, "log_level": "error"}


Weights = dict[str, torch.Tensor]


def begun(seed: int, args: argparse.Namespace, corpus: Corpus) -> Weights:
    """Weights that a few steps have trained in fp32."""
    torch.manual_seed(seed)
    engine = engine_for(WIRES[0], GPT(Shape()).state_dict(), args.before)
    run(engine, corpus, range(args.before))
    found = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.destroy()
    return found


def trained(wire: Wire, weights: Weights, args: argparse.Namespace, corpus: Corpus) -> float:
    """Bits per byte of held-out text behind a run from these weights on."""
    moved = {name: value * (1 + wire.moved) for name, value in weights.items()}
    engine = engine_for(wire, moved, args.steps)
    run(engine, corpus, range(args.before, args.before + args.steps))
    found = bits_per_byte(engine, corpus)
    engine.destroy()
    return found


def engine_for(wire: Wire, weights: Weights, steps: int) -> zerort.Engine:
    model = GPT(Shape())
    model.load_state_dict(weights)
    engine, *_ = zerort.initialize(model=model, config=configuration(wire, steps))
    return engine


def run(engine: zerort.Engine, corpus: Corpus, steps: range) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    size, context = engine.train_micro_batch_size_per_gpu(), engine.module.shape.context
    each = engine.gradient_accumulation_steps()
    for index in range(steps.start * each, steps.stop * each):
        batch = corpus.batch(index, rank, world, size=size, context=context)
        inputs, targets = (part.to(engine.device) for part in batch)
        engine.backward(next_token_loss(engine(inputs), targets))
        engine.step()


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
        weights = begun(seed, args, corpus)
        for wire in wires:
            found[wire].append(trained(wire, weights, args, corpus))
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
