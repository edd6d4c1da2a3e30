"""`zerort config FILE [--numel N | --model MODULE:FACTORY]`: its arguments and what it answers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import nn

from zerort.config import Config, describe, load_part
from zerort.config.reading import read
from zerort.errors import ConfigError
from zerort.forecast.figures import Forecast, forecast
from zerort.forecast.job import Job
from zerort.forecast.models import made_by, of_size
from zerort.forecast.owners import Owners, unevenness
from zerort.forecast.table import show
from zerort.forecast.updates import asks_for_matrices
from zerort.memory import Kind
from zerort.terminal import Answer, Commands, add_command, elements, grid, progress, ranks, shown

__all__ = ["Forecasts", "add_config_command", "at_every_stage"]

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


def add_config_command(commands: Commands) -> None:
    """Adds it to a command line."""
    parser = add_command(
        commands,
        "config",
        _config,
        help="what each key of a configuration does, and what a rank will hold and send",
        example="zerort config ds.json --numel 7B --world 8",
    )
    parser.add_argument("file", metavar="FILE", help="a configuration in JSON")
    of = parser.add_mutually_exclusive_group()
    of.add_argument(
        "--numel",
        type=elements,
        metavar="N",
        help="also print what a rank holds and sends for N parameters, such as 7e9 or 7B",
    )
    of.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="the same for the model that this callable makes, on the meta device",
    )
    parser.add_argument(
        "--largest",
        type=elements,
        metavar="N",
        help="parameters of its largest layer, with --numel",
    )
    parser.add_argument(
        "--world",
        type=ranks,
        default=os.environ.get("WORLD_SIZE", "1"),
        metavar="N",
        help="ranks (default: WORLD_SIZE, or 1)",
    )
    parser.add_argument(
        "--hosts",
        type=ranks,
        default=1,
        metavar="N",
        help="hosts that the ranks are spread over, in their order (default: 1)",
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


def _config(args: argparse.Namespace) -> Answer:
    rows = describe(args.file)
    table = grid("key", "value", "effect", title=args.file)
    for row in rows:
        table.add_row(*map(Text, row))  # a value may hold brackets, which are markup in a string
    names = ("key", "value", "effect")
    keys = [dict(zip(names, row, strict=True)) for row in rows]
    document = {"file": args.file, "keys": keys}
    if any(effect.startswith("error") for _, _, effect in rows):
        return Answer(document, shown(table), 1)
    if args.numel is None and args.model is None:
        return Answer(document, shown(table))
    with progress("planning"):
        found = _forecasts(args)

    def both(console: Console) -> None:
        console.print(table)
        found.show(console)

    return Answer(document | found.document, both)


@dataclass(frozen=True)
class Forecasts:
    """For the stage of the file and the others beside it."""

    title: str
    numel: int
    """Parameters of the model."""
    columns: Sequence[Forecast]
    chosen: int
    """The file's stage."""
    notes: Sequence[str]
    refused: Mapping[int, str]
    """Why there is none, by stage."""

    def show(self, console: Console) -> None:
        """Prints the table and the notes below it."""
        show(self.title, self.columns, self.chosen, console)
        for note in [*self.notes, *(f"stage {at}: {why}" for at, why in self.refused.items())]:
            console.print(f"  {note}", markup=False, highlight=False)

    @property
    def document(self) -> dict[str, Any]:
        """The same for `--json`."""
        return {
            "stage": self.chosen,
            "forecasts": [_described(one) for one in self.columns],
            "refused_stages": self.refused,
        }


def _described(one: Forecast) -> dict[str, Any]:
    """Of one rank, in bytes."""
    places = (("device_bytes", False), ("host_bytes", True))
    held = {
        place: {
            "together": one.taken(on_host=on_host),
            **{kind.name.lower(): one.taken(kind, on_host=on_host) for kind in Kind},
        }
        for place, on_host in places
    }
    return {
        "stage": one.stage,
        "buckets": len(one.plan.buckets),
        "bucket_cap_bytes": one.cap.nbytes,
        "bucket_cap_elements": one.cap.elements,
        "bucket_cap_reason": one.cap.reason,
        "buckets_in_flight": one.plan.window,
        "units": len(one.plan.units),
        "largest_unit_elements": max((unit.numel for unit in one.plan.units), default=0),
        **held,
        "page_locked_bytes": one.locked,
        "copies": one.seating.copies,
        "hosts_of_a_copy": one.seating.hosts,
        "ranks_of_a_host": one.seating.ranks,
        "sent_bytes_per_step": one.sent,
        "sent_between_hosts_per_step": one.between_hosts,
        "sent_between_copies_per_step": one.between_copies,
        "copied_to_host_bytes_per_step": one.to_host,
        "copied_to_device_bytes_per_step": one.to_device,
        "fullest_rank_over_mean": unevenness(one.by_rank),
        "whole_parameters": None if one.owners is None else _owning(one.owners),
    }


def _owning(owners: Owners) -> dict[str, Any]:
    return {
        "owned_buckets": owners.owned,
        "exchanged_buckets": owners.exchanged,
        "padding": owners.padding,
        "ranks": owners.ranks,
        "elements_most_over_mean": unevenness(owners.elements),
        "work_most_over_mean": unevenness(owners.costs),
    }


def _forecasts(args: argparse.Namespace) -> Forecasts:
    """Raises `ConfigError`, `PlanError`."""
    if args.largest is not None and args.numel is None:
        raise ConfigError("--largest is for --numel; a --model says it itself")
    data = read(args.file).data
    job = Job(args.world, args.device == "accelerator", args.trained_only, args.hosts)
    own = load_part(data, SECTIONS)
    if args.model is None:
        model = of_size(args.numel, args.largest, own, world=job.world)
    else:
        model = made_by(args.model)
    found = at_every_stage(data, model, job, _micro_batches(own, job.world))
    notes = ["* the file's stage.", *found.notes]
    if args.model is None:
        notes.append("Of a model of this size only: layers that fill a bucket each.")
    return replace(found, notes=notes)


def at_every_stage(
    data: Mapping[str, Any], model: nn.Module, job: Job, micro_batches: int
) -> Forecasts:
    """Of `model`, on the meta device, which is cast. Raises `ConfigError`, `PlanError`."""
    own = load_part(data, SECTIONS)
    columns, refused = [], {}
    for stage, settings in _stages(data, own):
        try:
            if not isinstance(settings, Config):
                raise ConfigError(settings)
            columns.append(forecast(settings, model, job, micro_batches))
        except ConfigError as error:
            if settings is own:
                raise
            refused[stage] = str(error).splitlines()[-1].strip()
    numel = sum(p.numel() for p in model.parameters())
    title = _title(own, job, numel, micro_batches)
    notes = list(_notes(own, job, columns))
    if not any(p.dim() > 1 for p in model.parameters()) and asks_for_matrices(own):
        notes.append("Without matrices, which the optimizer looks at whole: a --model has them.")
    return Forecasts(title, numel, columns, own.zero_optimization.stage, notes, refused)


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
            yield stage, str(error)


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


def _notes(settings: Config, job: Job, columns: Sequence[Forecast]) -> Iterator[str]:
    yield "Not counted: activations, .grad until it leaves, what a step needs for its own length."
    state, shards = settings.offloads
    if not job.on_accelerator and (state.on_host or shards.on_host):
        yield "Offloading asks for nothing on the CPU."
    yield from _default_caps(columns)
    if any(one.plan.units for one in columns):
        yield "Gathered: what may be whole at once, beside a rank's part (stage 3)."


def _default_caps(columns: Sequence[Forecast]) -> Iterator[str]:
    """Why buckets are as long as they are, where the file does not say it."""
    stages: dict[str, list[str]] = {}
    for one in columns:
        if one.cap.reason is not None:
            stages.setdefault(one.cap.reason, []).append(str(one.stage))
    for reason, found in stages.items():
        at = f"stage{'s' if len(found) > 1 else ''} {', '.join(found)}"
        yield f"Buckets at {at}: {reason}, as zerort.bucket_bytes is not given."
