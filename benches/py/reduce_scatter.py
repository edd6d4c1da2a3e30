"""Reduce-scatter alone: the back end's own against zerort's, interleaved, in one job.

    python benches/py/reduce_scatter.py --mb 32 --rounds 15

zerort's is what a bucket goes through between Launch and Retire: the communicator moves it, the
wire format sums what arrived, scales it and takes its norm. On gloo that is an all-to-all and the
core's kernel. Both results are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ranks
from rounds import Spread
from zerort.device import device_for
from zerort.memory import Memory
from zerort.mesh import Piece, connect
from zerort.wire import FORMATS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Reduce-scatter: the back end's own against zerort's."
    )
    parser.add_argument(
        "--mb", type=int, default=32, help="bytes each rank sends in, in 2**20 (default 32)"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help="may be repeated (default: both)"
    )
    parser.add_argument("--ranks", type=int, default=ranks.default_world())
    parser.add_argument("--json", type=Path, help="write every figure there")
    return parser.parse_args()


def backend(gradient: Tensor) -> Callable[[], Tensor]:
    """torch.distributed's reduce-scatter, by whichever name this torch has."""
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    world = dist.get_world_size()
    out = gradient.new_empty(gradient.numel() // world)

    def reduce() -> Tensor:
        scatter(out, gradient)
        return out.div_(world)

    return reduce


def zerort(gradient: Tensor, name: str) -> Callable[[], Tensor]:
    """What the engine does with a bucket's gradient."""
    comm = connect(timedelta(minutes=5), gradient.device).shard
    device = device_for(gradient.device)
    shard, pieces = gradient.numel() // comm.world, comm.pieces(adds=FORMATS[name].adds)
    comm.scatter_memory([Piece(shard, gradient.dtype, adds=FORMATS[name].adds)])  # as a bucket's
    recv = Memory.zeros(shard * pieces, gradient.dtype, gradient.device)
    accum = Memory.zeros(shard, torch.float32, gradient.device)

    def reduce() -> Tensor:
        comm.reduce_scatter(recv.tensor, gradient).start().wait()
        scale = 1.0 / comm.world
        device.reduce(recv, accum, world=pieces, stride=shard, scale=scale, add=False)
        return accum.tensor

    return reduce


def seconds(reduce: Callable[[], Tensor], device: torch.device) -> float:
    """One call on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    reduce()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def compare(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call, a value per round. Raises `AssertionError` when the two do not agree."""
    dtype = DTYPES[name]
    unit = dist.get_world_size() * 128
    numel = (args.mb << 20) // dtype.itemsize // unit * unit
    torch.manual_seed(dist.get_rank())
    gradient = torch.randn(numel, device=device).to(dtype)
    calls = {"back end": backend(gradient), "zerort": zerort(gradient, name)}
    expected, got = (call().float().clone() for call in calls.values())
    torch.testing.assert_close(
        got, expected, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )
    times: dict[str, list[float]] = {who: [] for who in calls}
    for _ in range(args.rounds):
        for who, call in calls.items():
            times[who].append(seconds(call, device))
    return times


def main(device: torch.device, args: argparse.Namespace) -> None:
    ranks = f"{dist.get_world_size()} {dist.get_backend()} ranks"
    title = f"reduce-scatter of {args.mb} MB, {ranks}, {args.rounds} rounds"
    table = Table(
        "dtype", "back end ms", "zerort ms", "times faster", title=title, title_justify="left"
    )
    facts = {}
    for name in args.dtype or DTYPES:
        found = compare(name, args, device)
        faster = [
            theirs / ours for theirs, ours in zip(found["back end"], found["zerort"], strict=True)
        ]
        rows = {who: Spread.of([1000 * value for value in values]) for who, values in found.items()}
        facts[name] = {f"{who} ms": asdict(spread) for who, spread in rows.items()} | {
            "times faster": asdict(Spread.of(faster))
        }
        table.add_row(
            name, *(f"{spread:.1f}" for spread in rows.values()), f"{Spread.of(faster):.2f}"
        )
    if dist.get_rank() == 0:
        Console().print(table)
        if args.json:
            args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    chosen = arguments()
    ranks.run(chosen.ranks, main, chosen)
