"""Predicts steps between hosts from what was measured of the wire and of the computing, and times
them: how good is the model that `zerort tune` and `zerort simulate` rely on?

    python benches/py/predict.py                          all of it, some twelve minutes
    python benches/py/predict.py --rates 1000 --hosts 2 --stages 2 --models gpt
    python benches/py/predict.py --markdown table.md      the table for docs/performance.md
    python benches/py/predict.py --hosts 2 --rows rows.json   in two calls, of which the second
    python benches/py/predict.py --hosts 4 --rows rows.json   has the table of both
    python benches/py/predict.py --strict                 ends with 1 where the aim is missed

Hosts are network namespaces behind links of a given rate (`hosts.py`), one rank of one thread in
each; without root and iproute2 nothing runs, and the reason is said. A step is timed in rounds of a
few steps, and its forward, backward and update in the same rounds, so that what the machine does
meanwhile is in both. The wire is measured apart, before, between and behind them. The prediction
knows the plan, the wire and the computing, and nothing of what was waited for.

Between 4 hosts on a machine of fewer cores computing would wait for cores, not for the wire: there
a layer sleeps as long as it should compute, and in the model `paced` always.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from hosts import hosts, why_not

_LIMITS = (0.10, 0.20)
"""Of the errors' median and of the worst."""
_PORT = "29517"
_BUCKET = 1 << 20
"""Bytes: several buckets for each model."""


@dataclass(frozen=True)
class Row:
    """A step, in seconds."""

    hosts: int
    megabits: int
    model: str
    stage: int
    predicted: float
    measured: float
    exposed: tuple[float, float]
    """Predicted and measured, of the step."""
    overlapped: bool
    """Whether updated parameters arrive beside the next forward."""
    wire: str

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Row:
        """Out of JSON."""
        return cls(**{**fields, "exposed": tuple(fields["exposed"])})

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description="Predicted against measured steps between hosts behind slow links."
    )
    numbers = {"type": int, "nargs": "+"}
    parser.add_argument("--hosts", **numbers, default=[2, 4])
    parser.add_argument("--rates", **numbers, default=[200, 1000, 5000], help="Mbit a second")
    parser.add_argument("--stages", **numbers, default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=["gpt", "wide", "paced"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    parser.add_argument(
        "--rows", type=Path, help="JSON: rows of earlier calls are read, and all are written there"
    )
    parser.add_argument(
        "--strict", action="store_true", help="end with 1 where the median or the worst is missed"
    )
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# One rank.


def rank_main(args: argparse.Namespace) -> None:
    """Prints a row a line, on rank 0; all else goes to stderr."""
    # whoever started this rank has gone where its input ends
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    import torch
    import torch.distributed as dist

    import predicted_models

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in args.models:
        for stage in args.stages:
            build = predicted_models.MODELS[name]
            found = predicted_models.race(build, stage, _BUCKET, args.rounds)
            if dist.get_rank() == 0:
                row = Row(args.hosts[0], args.rates[0], name, stage, *found)
                print(json.dumps(asdict(row)), flush=True)
    dist.barrier()
    dist.destroy_process_group()


# All of them.


def rows_of(
    count: int, megabits: int, args: argparse.Namespace, heard: Callable[[Row], None]
) -> None:
    """Runs the ranks between `count` hosts; raises `RuntimeError` where one has failed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--rank"]
    command += ["--hosts", str(count), "--rates", str(megabits), "--rounds", str(args.rounds)]
    command += ["--stages", *map(str, args.stages), "--models", *args.models]
    with hosts(count, megabits * 1_000_000) as names:
        ranks = [
            host.start(
                command,
                {
                    "RANK": str(index),
                    "LOCAL_RANK": "0",
                    "WORLD_SIZE": str(count),
                    "MASTER_ADDR": names[0].address,
                    "MASTER_PORT": _PORT,
                    "OMP_NUM_THREADS": "1",
                    "TORCH_CPP_LOG_LEVEL": "ERROR",
                },
            )
            for index, host in enumerate(names)
        ]
        try:
            assert ranks[0].stdout is not None
            for line in ranks[0].stdout:
                if line.startswith("{"):
                    heard(Row.of(json.loads(line)))
            ended = [rank.wait(timeout=60) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    if any(ended):
        raise RuntimeError(f"ranks between {count} hosts at {megabits} Mbit ended with {ended}")


def summary(rows: Sequence[Row]) -> tuple[float, float]:
    """Median and worst error, without their signs."""
    errors = [abs(row.error) for row in rows]
    return median(errors), max(errors)


_COLUMNS = (
    "hosts",
    "Mbit",
    "model",
    "stage",
    "publish",
    "predicted, ms",
    "measured, ms",
    "error",
    "of it exposed, ms",
)


def cells(row: Row) -> list[str]:
    """As they are printed."""
    predicted, measured = (1000 * seconds for seconds in row.exposed)
    return [
        str(row.hosts),
        str(row.megabits),
        row.model,
        str(row.stage),
        "" if not row.stage else "beside" if row.overlapped else "in the step",
        f"{1000 * row.predicted:.0f}",
        f"{1000 * row.measured:.0f}",
        f"{100 * row.error:+.1f} %",
        f"{predicted:.0f} / {measured:.0f}",
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The table of a page."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|--:|--:|---|--:|---|--:|--:|--:|--:|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    middle, worst = summary(rows)
    lines += [
        "",
        f"Error: median {100 * middle:.1f} %, worst {100 * worst:.1f} %, {len(rows)} steps.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns the exit status: 1 where ranks have failed, and where the aim is missed if that is
    asked for; it is printed in any case.
    """
    args, console = arguments(), Console(width=110)
    if args.rank:
        rank_main(args)
        return 0
    reason = why_not()
    if reason is not None:
        console.print(f"skipped: {reason}")
        return 0
    rows = earlier(args)
    began, failed = time.perf_counter(), False

    def heard(row: Row) -> None:
        rows.append(row)
        if args.rows is not None:
            args.rows.write_text(json.dumps([asdict(each) for each in rows]))
        console.print("  ".join(cells(row)), f"  [{row.wire}]", markup=False, highlight=False)

    for count in args.hosts:
        for megabits in args.rates:
            try:
                rows_of(count, megabits, args, heard)
            except RuntimeError as error:  # the others are worth having
                failed = True
                console.print(str(error), style="red")
    if not rows:
        return 1
    table = Table(*_COLUMNS)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    middle, worst = summary(rows)
    console.print(
        f"error: median {100 * middle:.1f} % (aim {100 * _LIMITS[0]:.0f} %), worst "
        f"{100 * worst:.1f} % (aim {100 * _LIMITS[1]:.0f} %), {len(rows)} steps in "
        f"{time.perf_counter() - began:.0f} s"
    )
    if args.markdown is not None:
        args.markdown.write_text(markdown(rows))
    missed = middle > _LIMITS[0] or worst > _LIMITS[1]
    return int(failed or (args.strict and missed))


def earlier(args: argparse.Namespace) -> list[Row]:
    """Rows of other calls that this one does not take again."""
    if args.rows is None or not args.rows.exists():
        return []
    found = [Row.of(fields) for fields in json.loads(args.rows.read_text())]
    again = {
        (hosts, rate, model, stage)
        for hosts in args.hosts
        for rate in args.rates
        for model in args.models
        for stage in args.stages
    }
    return [r for r in found if (r.hosts, r.megabits, r.model, r.stage) not in again]


if __name__ == "__main__":
    sys.exit(main())
