"""`zerort estimate`: what a rank needs of memory at each stage, before there is a configuration.

The figures are those of `zerort config --model`, of a configuration that the arguments spell.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from zerort.config import load_part
from zerort.errors import ConfigError
from zerort.forecast.commands import SECTIONS, at_every_stage
from zerort.forecast.job import Job
from zerort.forecast.models import made_by, of_size
from zerort.terminal import Answer, Commands, add_command, elements, positive, progress, ranks

__all__ = ["add_estimate_command"]

_HOMES = {
    "none": (),
    "optimizer": ("offload_optimizer",),
    "all": ("offload_optimizer", "offload_param"),
}


def add_estimate_command(commands: Commands) -> None:
    """Adds it to a command line."""
    parser = add_command(
        commands,
        "estimate",
        _estimate,
        help="memory of a rank at each stage, for a model or a number of parameters",
        example="zerort estimate --params 7e9 --layers 32 --stage 3 --ranks 64 --dtype bf16",
    )
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--params", type=elements, metavar="N", help="parameters, such as 7e9 or 7B")
    of.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="the model that this callable makes, on the meta device",
    )
    parser.add_argument(
        "--layers", type=positive, metavar="N", help="layers alike that --params is spread over"
    )
    parser.add_argument(
        "--largest", type=elements, metavar="N", help="parameters of the largest layer (--params)"
    )
    parser.add_argument("--stage", type=int, choices=range(4), help="the stage that gets a star")
    parser.add_argument("--ranks", type=ranks, default=1, metavar="N", help="ranks (default 1)")
    parser.add_argument(
        "--micro-batches", type=positive, default=1, metavar="N", help="of a step (default 1)"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="bf16",
        help="of the parameters (default bf16, whose masters are fp32)",
    )
    parser.add_argument(
        "--optimizer", default="AdamW", metavar="TYPE", help="as in a configuration (default AdamW)"
    )
    parser.add_argument(
        "--offload",
        choices=sorted(_HOMES),
        default="none",
        help="what is at home on the host: the optimizer's part, or parameters too (stage 3)",
    )
    parser.add_argument(
        "--device",
        choices=("accelerator", "cpu"),
        default="accelerator",
        help="where the ranks train (default: an accelerator each)",
    )


def _estimate(args: argparse.Namespace) -> Answer:
    if args.model is not None and (args.layers is not None or args.largest is not None):
        raise ConfigError("--layers and --largest are for --params; a --model says them itself")
    data = _spelt(args)
    settings = load_part(data, SECTIONS)
    with progress("planning"):
        if args.model is None:
            model = of_size(
                args.params, args.largest, settings, world=args.ranks, layers=args.layers
            )
        else:
            model = made_by(args.model)
        job = Job(args.ranks, args.device == "accelerator")
        found = at_every_stage(data, model, job, args.micro_batches)
    notes = list(found.notes)
    if args.params is not None and args.layers is None and args.largest is None:
        notes.append("Of layers that fill a bucket each; --layers or --largest says what stage 3")
        notes.append("  gathers at once.")
    found = replace(found, chosen=-1 if args.stage is None else args.stage, notes=notes)
    about = {"parameters": found.numel, "ranks": args.ranks, "dtype": args.dtype}
    return Answer({**about, **found.document, "stage": args.stage}, found.show)


def _spelt(args: argparse.Namespace) -> dict[str, Any]:
    zero: dict[str, Any] = {key: {"device": "cpu"} for key in _HOMES[args.offload]}
    stage = 3 if args.stage is None else args.stage
    data: dict[str, Any] = {
        "zero_optimization": {"stage": stage, **zero},
        "optimizer": {"type": args.optimizer, "params": {}},
    }
    return data if args.dtype == "fp32" else {args.dtype: {"enabled": True}, **data}
