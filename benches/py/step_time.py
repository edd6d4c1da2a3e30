"""Step time of zerort and its peers, in one job: the same processes, the same batches, interleaved
rounds.

    python benches/py/step_time.py                          all workloads, all contenders
    python benches/py/step_time.py --workload gpt --only "zerort stage 2" --rounds 9
    python benches/py/step_time.py --json step_time.json
    python benches/py/step_time.py --hosts 2 --megabits 1000 --steps 12 --workload gpt \\
        --only "zerort stage 2, publish step" --only "zerort stage 2, publish overlapped"
    python benches/py/step_time.py --hosts 2 --workload gpt --only "zerort stage 2" \\
        --bucket-bytes 1MiB,8MiB,25MiB
    python benches/py/step_time.py --only "zerort stage 2, gloo" --only "zerort stage 2, shared"

Two gloo ranks of one thread each on CPU, one NCCL rank per GPU where there are any. DeepSpeed takes
part when it is installed. A contender whose losses are not DDP's is marked, and the command fails:
it did other work. With `--hosts` the ranks are network namespaces behind links of a given rate,
which needs root and iproute2; what names no transport goes over gloo there, and the least that a
step can take is printed below the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ranks
from contenders import (
    BASELINE,
    BY_NAME,
    CONTENDERS,
    ELEMENTWISE,
    between_hosts,
    compares,
    in_buckets,
)
from limits import limit_of
from rounds import Race, Runs, Spread
from workloads import WORKLOADS, Workload

WARM_UP = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step time of zerort and its peers in interleaved rounds."
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="timed turns of each contender (default 7)"
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps in a turn (default 4)"
    )
    parser.add_argument(
        "--workload", choices=WORKLOADS, action="append", help="may be repeated (default: all)"
    )
    parser.add_argument(
        "--only",
        choices={**CONTENDERS, **BY_NAME},
        action="append",
        help="beside DDP; may be repeated (default: all but the last of these)",
    )
    parser.add_argument(
        "--bucket-bytes",
        type=sizes,
        default={},
        metavar="SIZES",
        help="such as 1MiB,8MiB: zerort's contenders also in buckets of these sizes",
    )
    parser.add_argument("--hosts", type=int, help="one rank in each, behind a slow link")
    parser.add_argument("--megabits", type=int, default=1000, help="a second, of each host's link")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=ranks.default_world())
    parser.add_argument("--json", type=Path, help="write every figure there")
    return parser.parse_args()


def sizes(text: str) -> dict[str, int]:
    """Bytes by what each is called."""
    units = {"MiB": 1 << 20, "KiB": 1 << 10, "B": 1}
    found = {}
    for size in text.split(","):
        unit = next((unit for unit in units if size.endswith(unit)), "")
        number = size.removesuffix(unit).strip()
        if not unit or not number.isdecimal() or int(number) == 0:
            raise argparse.ArgumentTypeError(f"{size!r}: expected sizes such as 1MiB,8MiB")
        found[size.strip()] = int(number) * units[unit]
    return found


def race(
    workload: Workload, names: list[str], args: argparse.Namespace, device: torch.device
) -> dict[str, Runs]:
    """Runs all rounds of one workload."""
    if args.hosts:
        between_hosts()
    able = [name for name in names if not (workload.muon and name in ELEMENTWISE)]
    every = CONTENDERS | BY_NAME | in_buckets(able, args.bucket_bytes)
    able += [name for name in every if name not in CONTENDERS | BY_NAME]
    contest = Race(workload, {name: every[name](workload, device) for name in able}, device)
    contest.warm_up(WARM_UP)
    gc.collect()
    turns = range(args.rounds)
    if dist.get_rank() == 0:
        turns = track(
            turns, description=workload.name, console=Console(stderr=True), transient=True
        )
    for _ in turns:
        contest.round(args.steps)
    return contest.runs


def table(workload: Workload, runs: dict[str, Runs], title: str) -> Table:
    """Median [min .. max] over the rounds, of times and of ratios to DDP."""
    base = runs[BASELINE]
    shown = Table(title=title, title_justify="left")
    for heading in ("contender", "step ms", "step / DDP", "CPU / DDP", "loss vs DDP"):
        shown.add_column(heading, justify="left" if heading == "contender" else "right")
    for name, run in runs.items():
        ratios = run.against(base)
        wall = Spread.of([1000 * seconds for seconds in run.wall])
        shown.add_row(
            name,
            f"{wall:.1f}",
            f"{ratios['wall']:.2f}",
            f"{ratios['cpu']:.2f}",
            _verdict(name, run, base, workload),
        )
    return shown


def _verdict(name: str, run: Runs, base: Runs, workload: Workload) -> str:
    deviation = run.deviation(base)
    if not compares(name):
        return f"{deviation:.1e} by design"
    return (
        f"{deviation:.1e}"
        if deviation <= workload.tolerance
        else f"[red]{deviation:.1e}: other work[/]"
    )


def strays(workload: Workload, runs: dict[str, Runs]) -> list[str]:
    """Contenders whose losses are not DDP's."""
    base = runs[BASELINE]
    return [
        name
        for name, run in runs.items()
        if compares(name) and not run.deviation(base) <= workload.tolerance
    ]


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": dist.get_backend(),
        "ranks": dist.get_world_size(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
    }


def main(device: torch.device, args: argparse.Namespace) -> None:
    wanted = args.only or CONTENDERS
    names = [name for name in CONTENDERS | BY_NAME if name == BASELINE or name in wanted]
    facts: dict[str, Any] = {
        "machine": machine(device),
        "rounds": args.rounds,
        "steps": args.steps,
        "workloads": {},
    }
    differing = []
    for workload in (WORKLOADS[name] for name in args.workload or WORKLOADS):
        runs = race(workload, names, args, device)
        gc.collect()
        best = limit_of(workload, device) if args.hosts else None
        differing += [f"{name} on {workload.name}" for name in strays(workload, runs)]
        facts["workloads"][workload.name] = {
            name: run.figures(runs[BASELINE]) for name, run in runs.items()
        }
        if dist.get_rank() == 0:
            Console(width=120).print(
                table(
                    workload, runs, f"{workload.name}, {args.rounds} rounds of {args.steps} steps"
                )
            )
            if best is not None:
                print(best)
    if dist.get_rank() == 0 and args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    if differing:
        sys.exit(f"losses differ from DDP's: {', '.join(differing)}")


if __name__ == "__main__":
    chosen = arguments()
    if chosen.rank:
        ranks.enter(main, chosen)
    elif chosen.hosts:
        ranks.between_hosts(
            chosen.hosts, chosen.megabits, [sys.executable, *sys.argv, "--rank"], print
        )
    else:
        ranks.run(chosen.ranks, main, chosen)
