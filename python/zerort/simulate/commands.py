"""`zerort simulate`: its arguments, and what is printed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from zerort.errors import ConfigError
from zerort.forecast.table import size
from zerort.report.words import listed
from zerort.simulate.model import of_model
from zerort.simulate.page import write_page
from zerort.simulate.quantities import flops, scales, wire
from zerort.simulate.recorded import of_trace
from zerort.simulate.scales import FIXED, Cluster, Point, at
from zerort.simulate.subject import Dtype, Subject
from zerort.step.overlap import WISHES, Wish
from zerort.terminal import Answer, Commands, Parser, add_command, positive, shown, track

__all__ = ["add_simulate_command"]

_DTYPES: dict[str, Dtype] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def add_simulate_command(commands: Commands) -> None:
    """Adds it to a command line."""
    parser = add_command(
        commands,
        "simulate",
        _simulate,
        help="what a step would take on other ranks and wires, from a trace or a model",
        example='zerort simulate --trace trace-rank0.json --ranks 2..16384 --wire "alpha=20us,'
        'beta=25GB/s"',
    )
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--trace", metavar="FILE", help="a trace file of one rank of a run")
    of.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="the model that this callable makes, on the meta device; asks for --flops",
    )
    parser.add_argument(
        "--ranks",
        type=scales,
        required=True,
        metavar="N",
        help="such as 64, 2,8,64 or 2..16384, which doubles",
    )
    parser.add_argument(
        "--wire",
        type=wire,
        required=True,
        metavar="LINK",
        help="between ranks: alpha=20us,beta=25GB/s, and perhaps algorithm=ring (halving, tree, "
        "flat, broadcasts, best) and message=2us",
    )
    parser.add_argument("--hosts", type=positive, metavar="N", help="over which ranks are spread")
    parser.add_argument(
        "--inner", type=wire, metavar="LINK", help="within a host, as --wire is between them"
    )
    parser.add_argument("--stage", type=int, choices=range(4), help="(default: the trace's, or 2)")
    parser.add_argument(
        "--wire-format",
        choices=("fp32", "bf16", "fp16", "int8"),
        help="of all gradients on the wire (default: as they are in memory)",
    )
    parser.add_argument(
        "--publish",
        choices=WISHES,
        help="who waits for updated parameters, as in a configuration (default: the trace's, or "
        "auto)",
    )
    parser.add_argument(
        "-o", "--out", type=Path, metavar="HTML", help="a page to write, with curves over the ranks"
    )
    _add_model_arguments(parser)


def _add_model_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--flops", type=flops, metavar="RATE", help="of a rank, with --model, such as 400TFLOP/s"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="of a rank and micro-batch, with --model (default 4096)",
    )
    parser.add_argument(
        "--dtype", choices=sorted(_DTYPES), help="of the parameters, with --model (default bf16)"
    )
    parser.add_argument(
        "--micro-batches", type=positive, metavar="N", help="of a step, with --model (default 1)"
    )


def _simulate(args: argparse.Namespace) -> Answer:
    if args.inner is not None and args.hosts is None:
        raise ConfigError("--inner says how ranks of a host are connected: give --hosts too")
    subject = _subject(args)
    stage = subject.stage if args.stage is None else args.stage
    if stage != subject.stage:
        subject = replace(subject, measured=None)  # of another stage
    publish = args.publish or subject.publish
    cluster = Cluster(args.wire, args.inner, args.hosts, args.wire_format, publish)
    points = [at(subject, cluster, ranks, stage) for ranks in track(args.ranks, "simulating")]
    notes = list(_notes(subject, points, stage, publish))
    said = notes
    if args.out is not None:
        said = [*notes, f"wrote {write_page(args.out, subject, points, notes, args.trace)}"]
    document = _document(args, subject, stage, points, notes)
    return Answer({**document, "publish": publish}, shown(_table(points), *said))


def _subject(args: argparse.Namespace) -> Subject:
    if args.model is None:
        _refuse_model_arguments(args)
        return of_trace(args.trace)
    if args.flops is None:
        raise ConfigError(
            "--model says nothing of time: give --flops, what a rank computes in a second"
        )
    return of_model(
        args.model,
        _DTYPES[args.dtype or "bf16"],
        tokens=args.tokens or 4096,
        flops=args.flops,
        stage=2 if args.stage is None else args.stage,
        micro_batches=args.micro_batches or 1,
    )


def _refuse_model_arguments(args: argparse.Namespace) -> None:
    for name in ("flops", "tokens", "dtype", "micro_batches"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is for --model; a trace says it itself")


def _document(
    args: argparse.Namespace,
    subject: Subject,
    stage: int,
    points: Sequence[Point],
    notes: Sequence[str],
) -> dict[str, object]:
    return {
        "subject": subject.name,
        "parameters": subject.numel,
        "stage": stage,
        "forward_ms": subject.forward_ns / 1e6,
        "backward_ms": subject.backward_ns / 1e6,
        "micro_batches": subject.micro_batches,
        "wire": args.wire,
        "inner": args.inner,
        "hosts": args.hosts,
        "wire_format": args.wire_format,
        "page": args.out,
        "points": points,
        "measured": subject.measured
        and {"ranks": subject.measured[0], "step_ms": subject.measured[1]},
        "notes": notes,
    }


def _table(points: Sequence[Point]) -> Table:
    table = Table(
        title="A step in ms, and what fixed buckets add to it",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("ranks", "step", "exposed", "publish", "memory", "sent", "bucket"):
        table.add_column(name, justify="right")
    for fixed in FIXED:
        table.add_column(fixed.name.removesuffix(" elements"), justify="right")
    for point in points:
        table.add_row(
            str(point.ranks),
            *map(_ms, (point.step_ms, point.exposed_ms, point.publish_ms)),
            *map(size, (point.memory_nbytes, point.sent_nbytes, point.bucket_nbytes)),
            *(f"+{_ms(lost)}" if lost >= 0.05 else "" for lost in point.lost_ms.values()),
        )
    return table


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds < 1e5 else f"{milliseconds:.4g}"


def _notes(subject: Subject, points: Sequence[Point], stage: int, publish: Wish) -> Iterator[str]:
    compute = (subject.forward_ns + subject.backward_ns) * subject.micro_batches / 1e6
    yield (
        f"{subject.name}: {subject.numel:,} parameters at stage {stage}, "
        f"{_ms(compute)} ms of forward and backward a step"
    )
    yield from subject.notes
    if subject.measured is not None:
        ranks, step = subject.measured
        yield f"recorded: {_ms(step)} ms a step on {ranks} ranks, on the wire that it ran on"
    yield from _publishing(points, publish)
    for fixed in FIXED:
        worst = max(points, key=lambda point: point.lost_ms[fixed.name] / point.step_ms)
        lost = worst.lost_ms[fixed.name]
        if lost / worst.step_ms > 0.01:
            yield (
                f"buckets of {fixed.name} lose {_ms(lost)} ms a step "
                f"({lost / worst.step_ms:.0%}) on {worst.ranks:,} ranks against {_chosen(worst)}"
            )
    yield (
        "memory: states and what is in flight, no activations. Not known: other jobs on the wire, "
        "its topology, ranks that differ"
    )


def _publishing(points: Sequence[Point], publish: Wish) -> Iterator[str]:
    beside = [str(point.ranks) for point in points if point.overlapped]
    if beside:
        yield (
            f"publish: updated parameters arrive beside the next forward on {listed(beside)} ranks "
            f'("publish": "{publish}")'
        )
    elif any(point.publish_ms > 0.05 for point in points) and publish != "overlapped":
        yield (
            f'publish: a step waits for updated parameters ("publish": "{publish}"); --publish '
            "overlapped says what it takes where the next forward does"
        )


def _chosen(point: Point) -> str:
    under_way = "all" if point.window is None else str(point.window)
    return f"{point.buckets} of at most {size(point.bucket_nbytes)}, {under_way} under way"
