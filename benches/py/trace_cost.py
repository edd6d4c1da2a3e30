"""What a trace costs: the example's model on two ranks, with and without one, in interleaved
rounds.

    python benches/py/trace_cost.py
    python benches/py/trace_cost.py --rounds 41 --buckets 65536      many small buckets

Both engines train the same batches; losses that differ in a single bit make the command fail.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

import ranks
import zerort
from contenders import Step
from rounds import Race, Spread
from workloads import GPT, Batch, Shape, Workload, next_token_loss

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_text.json"
OFF, ON = "without", "with"
WARM_UP = 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step time with a trace over step time without one."
    )
    parser.add_argument("--rounds", type=int, default=31, help="timed turns of each (default 31)")
    parser.add_argument(
        "--steps", type=int, default=10, help="optimizer steps in a turn (default 10)"
    )
    parser.add_argument(
        "--buckets", type=int, help="upper bound of a bucket in bytes (default: the example's)"
    )
    parser.add_argument(
        "--seconds", type=float, default=180, help="begin no round after so long (default 180)"
    )
    parser.add_argument("--ranks", type=int, default=ranks.default_world())
    return parser.parse_args()


def configuration(buckets: int | None) -> dict[str, Any]:
    """The example's, without its trace."""
    config: dict[str, Any] = json.loads(EXAMPLE.read_text())
    config["zerort"] = {"bucket_bytes": buckets} if buckets else {}
    return config


def workload(config: dict[str, Any]) -> Workload:
    """The example's model on random bytes; a batch holds all micro-batches of a step."""
    size, parts = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]

    def draw(generator: torch.Generator) -> Batch:
        rows = torch.randint(256, (parts, size, Shape().context + 1), generator=generator)
        return rows[..., :-1], rows[..., 1:]

    return Workload(
        "example", lambda: GPT(Shape()), draw, next_token_loss, lambda model: (), size, 0.0, 0.0
    )


def contender(
    problem: Workload, config: dict[str, Any], device: torch.device, trace: str | None
) -> Step:
    """One optimizer step, of all its micro-batches."""
    settings = {**config, "zerort": {**config["zerort"], "trace": {"path": trace}}}
    engine, *_ = zerort.initialize(model=problem.model(device), config=settings)

    def step(batch: Batch) -> torch.Tensor:
        for inputs, targets in zip(*batch, strict=True):
            loss = problem.loss(engine(inputs), targets)
            engine.backward(loss)
            engine.step()
        return loss.detach()

    return step


def over(end: float, device: torch.device) -> bool:
    """Whether rank 0's clock is past `end`, for all ranks alike."""
    late = torch.tensor([float(time.monotonic() > end)], device=device)
    dist.broadcast(late, 0)
    return bool(late.item())


def main(device: torch.device, args: argparse.Namespace, folder: str) -> None:
    config = configuration(args.buckets)
    problem = workload(config)
    build = partial(contender, problem, config, device)
    race = Race(problem, {OFF: build(None), ON: build(f"{folder}/trace-{{rank}}.json")}, device)
    race.warm_up(WARM_UP)
    begun, rounds = time.monotonic(), 0
    while rounds < args.rounds and not over(begun + args.seconds, device):
        race.round(args.steps)
        rounds += 1
    if not rounds:
        sys.exit(f"no round begun within {args.seconds:g} s: give --seconds more")
    off, on = race.runs[OFF], race.runs[ON]
    if off.losses != on.losses:
        sys.exit("the losses with a trace are not those without one")
    if dist.get_rank() == 0:
        ratios = on.against(off)
        milliseconds = Spread.of([1000 * seconds for seconds in off.wall])
        Console(width=120).print(
            f"step without a trace {milliseconds:.2f} ms; with / without: wall "
            f"{ratios['wall']:.3f}, CPU {ratios['cpu']:.3f} (median, low .. high of {rounds} "
            f"rounds of {args.steps} steps)"
        )


if __name__ == "__main__":
    chosen = arguments()
    with tempfile.TemporaryDirectory() as traces:
        ranks.run(chosen.ranks, main, chosen, traces)
