"""`zerort config FILE --numel N | --model MODULE:FACTORY`: its arguments and what is printed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from zerort.config import Config, load_part
from zerort.config.reading import read
from zerort.errors import ConfigError
from zerort.forecast.figures import Forecast, Job, forecast
from zerort.forecast.models import made_by, of_size
from zerort.forecast.table import show

__all__ = ["add_arguments", "is_asked", "print_forecast"]

SECTIONS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "communication_data_type",
    "data_types",
    "fp16",
    "bf16",
    "torch_autocast",
    "amp",
    "optimizer",
    "zero_optimization",
    "zerort",
)
"""Of a configuration, which decide what is printed."""

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them to a command line."""
    of = parser.add_mutually_exclusive_group()
    of.add_argument(
        "--numel",
        type=_numel,
        metavar="N",
        help="also print what a rank holds and sends for N parameters, such as 7e9 or 7B",
    )
    of.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="the same for the model that this callable makes, on the meta device",
    )
    parser.add_argument(
        "--largest", type=_numel, metavar="N", help="parameters of its largest layer, with --numel"
    )
    parser.add_argument(
        "--world",
        type=_world,
        default=os.environ.get("WORLD_SIZE", "1"),
        metavar="N",
        help="ranks (default: WORLD_SIZE, or 1)",
    )
    parser.add_argument(
        "--device",
        choices=("accelerator", "cpu"),
        default="accelerator",
        help="where the ranks train (default: an accelerator each)",
    )
    parser.add_argument(
        "--trained-only",
        action="store_true",
        help="the optimizer is given parameters that require grad alone, as Trainers do",
    )


def _numel(text: str) -> int:
    scale = _SUFFIXES.get(text[-1:].upper(), 1)
    try:
        numel = int(float(text[:-1] if scale > 1 else text) * scale)
    except (ValueError, OverflowError):
        numel = 0
    if not 0 < numel <= 2**53:
        raise argparse.ArgumentTypeError(f"expected a number such as 350M, 7e9 or 7B, got {text!r}")
    return numel


def _world(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**24):
        raise argparse.ArgumentTypeError(f"expected a number of ranks, got {text!r}")
    return int(text)


def is_asked(args: argparse.Namespace) -> bool:
    """Whether a model is given."""
    return args.numel is not None or args.model is not None


def print_forecast(args: argparse.Namespace, console: Console) -> None:
    """For the stage of the file and the others beside it. Raises `ConfigError`, `PlanError`."""
    if args.largest is not None and args.numel is None:
        raise ConfigError("--largest is for --numel; a --model says it itself")
    data = read(args.file).data
    job = Job(args.world, args.device == "accelerator", args.trained_only)
    own = load_part(data, SECTIONS)
    model = of_size(args.numel, args.largest, own) if args.model is None else made_by(args.model)
    micro_batches = _micro_batches(own, job.world)
    columns, notes = [], []
    for stage, settings in _stages(data, own):
        if isinstance(settings, Config):
            columns.append(forecast(settings, model, job, micro_batches))
        else:
            notes.append(f"stage {stage}: {settings}")
    numel = sum(p.numel() for p in model.parameters())
    show(
        _title(own, job, numel, micro_batches),
        columns,
        own.zero_optimization.stage,
        console,
    )
    for note in [*_notes(own, job, args, columns), *notes]:
        console.print(f"  {note}", markup=False, highlight=False)


def _stages(data: Mapping[str, Any], own: Config) -> Iterator[tuple[int, Config | str]]:
    """The configuration at each stage; a reason where it is refused there."""
    for stage in range(4):
        if stage == own.zero_optimization.stage:
            yield stage, own
            continue
        given = data.get("zero_optimization")
        zero = {**(given if isinstance(given, Mapping) else {}), "stage": stage}
        try:
            yield stage, load_part({**data, "zero_optimization": zero}, SECTIONS)
        except ConfigError as error:
            yield stage, str(error).splitlines()[-1].strip()


def _micro_batches(settings: Config, world: int) -> int:
    try:
        return settings.resolve_batch(world).accumulation
    except ConfigError:  # sizes that an integration fills in, or that are for another world
        return settings.gradient_accumulation_steps or 1


def _title(settings: Config, job: Job, numel: int, micro_batches: int) -> str:
    ranks = f"{job.world} rank{'s' if job.world > 1 else ''}"
    batches = f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''} a step"
    precision: str = settings.compute_dtype
    if settings.low_masters:
        precision += " with masters of the same"
    optimizer = "AdamW, as none is given" if settings.optimizer is None else settings.optimizer.type
    return f"{numel:,} parameters, {ranks}, {precision}, {optimizer}, {batches}"


def _notes(
    settings: Config, job: Job, args: argparse.Namespace, columns: list[Forecast]
) -> Iterator[str]:
    yield "* the file's stage. Not counted: activations, .grad until it leaves, what a step needs"
    yield "  for its own length."
    if args.model is None:
        yield "Of a model of this size only: layers that fill a bucket each."
    state, shards = settings.offloads
    if not job.on_accelerator and (state.on_host or shards.on_host):
        yield "Offloading asks for nothing on the CPU."
    if any(one.plan.units for one in columns):
        yield "Gathered: what may be whole at once, beside a rank's part (stage 3)."
