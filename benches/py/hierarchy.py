"""Hops inside hosts and between them against all ranks at once, over namespaces with a link each.

    python benches/py/hierarchy.py --hosts 2 --ranks 2 --gbit 1 --rounds 3

A step of linear layers at stage 2 is timed on every rank, and what leaves each host is counted at
its interface, beside what a host has to send: its L ranks each (H-1)/H * M/L to reduce and as much
to gather. It needs root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from hosts import Host, hosts, why_not

HERE = Path(__file__).resolve()
WAYS = ("auto", "flat")
PORT = 29711
PATIENCE = 120.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hierarchical reduction against a flat one.")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="of each host (default 2)")
    parser.add_argument("--gbit", type=float, default=1.0, help="of each link (default 1)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5, help="that are counted, of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


# One rank.


def leaving() -> int:
    """Bytes that this namespace has sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == Host.interface:
            return int(counts.split()[8])
    raise SystemExit(f"no interface {Host.interface} here")


def train(options: argparse.Namespace) -> None:
    """Prints a line of JSON: medians in seconds, bytes of this host a step."""
    import torch

    import zerort

    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = options.width
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(options.layers)))
    engine, *_ = zerort.initialize(
        model=model,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 2},
            # hosts that are namespaces could share memory, and nothing would cross the link
            "zerort": {"hierarchy": options.way, "publish": "step", "transport": "gloo"},
        },
    )
    x, took = torch.randn(1, width), []
    for step in range(options.steps + 2):
        if step == 2:  # connections are made, the order is learnt
            before = leaving()
        start, waited = time.perf_counter(), engine._parts.reduction.waited
        engine.backward(engine(x).square().mean())
        engine.step()
        took.append((time.perf_counter() - start, engine._parts.reduction.waited - waited))
    engine._parts.mesh.control.all_reduce(torch.zeros(1))  # all have sent what they had to
    sent = (leaving() - before) / options.steps
    step_s, exposed_s = (median(row[place] for row in took[2:]) for place in range(2))
    found = {
        "inner": engine._parts.mesh["inner"].ranks,
        "step_s": step_s,
        "exposed_s": exposed_s,
        "host_bytes": sent,
        "bytes": 4 * sum(bucket.numel for bucket in engine._parts.reduction.plan.buckets),
    }
    print(json.dumps(found), flush=True)
    engine.destroy()


# All of them.


def run(options: argparse.Namespace, way: str) -> list[dict[str, Any]]:
    """What each rank has found, by rank."""
    world = options.hosts * options.ranks
    command = [sys.executable, str(HERE), *sys.argv[1:], "--way", way]
    with hosts(options.hosts, int(options.gbit * 10**9)) as found:
        processes = [
            host.start(command, _environment(found[0], index * options.ranks + local, local, world))
            for index, host in enumerate(found)
            for local in range(options.ranks)
        ]
        try:
            return [_answer(process) for process in processes]
        finally:
            for process in processes:
                process.kill()


def _environment(first: Host, rank: int, local: int, world: int) -> dict[str, str]:
    path = [str(HERE.parents[2] / "python"), os.environ.get("PYTHONPATH", "")]
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        "MASTER_ADDR": first.address,
        "MASTER_PORT": str(PORT),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=PATIENCE)
    if process.returncode:
        raise SystemExit(f"a rank ended with {process.returncode}")
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def summary(options: argparse.Namespace, rounds: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Of one way: the slowest rank's times, the busiest host's bytes."""
    firsts = [ranks[:: options.ranks] for ranks in rounds]
    return {
        "inner": rounds[0][0]["inner"],
        "step_s": median(max(rank["step_s"] for rank in ranks) for ranks in rounds),
        "exposed_s": median(max(rank["exposed_s"] for rank in ranks) for ranks in rounds),
        "host_bytes": median(max(host["host_bytes"] for host in each) for each in firsts),
        "bytes": rounds[0][0]["bytes"],
    }


def main() -> None:
    options = arguments()
    if options.way is not None:
        train(options)
        return
    if (reason := why_not()) is not None:
        raise SystemExit(reason)
    runs: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):  # interleaved
        for way in WAYS:
            runs[way].append(run(options, way))
    found = {way: summary(options, runs[way]) for way in WAYS}
    count = options.hosts
    limit = 2 * (count - 1) / count * found["auto"]["bytes"]  # L ranks x 2 ways x (H-1)/H x M/L
    table = Table("hierarchy", "ranks of a host", "exposed s", "step s", "a host sends, MB a step")
    for way, one in found.items():
        times = (f"{one[key]:.3f}" for key in ("exposed_s", "step_s"))
        table.add_row(way, str(one["inner"]), *times, f"{one['host_bytes'] / 1e6:.2f}")
    console = Console()
    console.print(table)
    ratio = found["auto"]["exposed_s"] / found["flat"]["exposed_s"]
    console.print(f"exposed communication, auto over flat: {ratio:.2f}")
    console.print(f"2 (H-1)/H M: {limit / 1e6:.2f} MB a host and step")
    if options.json is not None:
        options.json.write_text(json.dumps({"limit_bytes": limit, **found}, indent=1))


if __name__ == "__main__":
    main()
