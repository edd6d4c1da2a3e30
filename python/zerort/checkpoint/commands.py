"""`zerort ckpt`: its commands and their arguments. What they do is in `report`, `deepspeed` and
`formats`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zerort.checkpoint import report
from zerort.checkpoint.deepspeed.convert import ImportOptions, import_checkpoint
from zerort.checkpoint.formats import FORMATS, ExportOptions, export_checkpoint
from zerort.checkpoint.zero_to_fp32 import byte_count
from zerort.terminal import Answer, Commands, add_command, positive, shown

__all__ = ["add_checkpoint_commands"]


def add_checkpoint_commands(commands: Commands) -> None:
    """Adds them to a command line."""
    ls = add_command(
        commands,
        "ls",
        lambda args: report.ls(args.folder),
        help="the checkpoints of a folder, the newest first",
        example="zerort ckpt ls runs/a",
    )
    ls.add_argument("folder", type=Path, metavar="DIR", help="a folder of checkpoints")

    show = add_command(
        commands,
        "show",
        lambda args: report.show(args.folder, args.tag),
        help="where a checkpoint comes from, and its tensors",
        example="zerort ckpt show runs/a global_step1000",
    )
    show.add_argument("folder", type=Path, metavar="DIR", help="a folder of checkpoints")
    show.add_argument(
        "tag", nargs="?", metavar="TAG", help="one of them (default: the one that `latest` names)"
    )

    verify = add_command(
        commands,
        "verify",
        lambda args: report.verify(args.folder, args.tag),
        help="compares every byte with its hash; status 1 for a damaged checkpoint",
        example="zerort ckpt verify runs/a",
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="a folder of checkpoints")
    verify.add_argument("tag", nargs="?", metavar="TAG", help="one of them (default: all)")

    diff = add_command(
        commands,
        "diff",
        lambda args: report.diff(args.one, args.other),
        help="compares the weights of two checkpoints; status 1 where they differ",
        example="zerort ckpt diff runs/a/global_step1000 runs/a/global_step2000",
    )
    diff.add_argument("one", type=Path, metavar="DIR/TAG", help="a checkpoint")
    diff.add_argument("other", type=Path, metavar="DIR/TAG", help="another")

    _add_import(commands)
    _add_export(commands)


def _add_import(commands: Commands) -> None:
    parser = add_command(
        commands,
        "import",
        _import,
        help="a checkpoint of DeepSpeed's (ZeRO 0 to 3 or universal, 0.16 to 0.19) as zerort's",
        example="zerort ckpt import ds_runs global_step1000 runs/a",
    )
    parser.add_argument("folder", type=Path, metavar="DS_DIR", help="DeepSpeed's folder")
    parser.add_argument(
        "tag", nargs="?", metavar="TAG", help="one of it (default: the one that `latest` names)"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write into")
    parser.add_argument(
        "--optimizer", metavar="CLASS", help="the optimizer's class, where the files do not say it"
    )
    parser.add_argument(
        "--scheduler", metavar="CLASS", help="the scheduler's class, where the files do not say it"
    )
    parser.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="names of the parameters in the optimizer's order, one a line (stage 0)",
    )
    parser.add_argument(
        "--skip-objects",
        action="store_true",
        help="leave out what of client_state holds objects; they are not run",
    )


def _import(args: argparse.Namespace) -> Answer:
    names = None if args.names is None else args.names.read_text("utf-8").split()
    options = ImportOptions(args.optimizer, args.scheduler, names, args.skip_objects)
    done = import_checkpoint(args.folder, args.tag, args.out, options)
    lines = [
        f"{done.path}: {done.parameters} trained parameters, {done.frozen} others, "
        f"{done.buffers} buffers",
        *(f"  {note}" for note in done.notes),
    ]
    return Answer(done, shown(*lines))


def _add_export(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export",
        _export,
        help="a checkpoint in another program's format",
        example="zerort ckpt export runs/a out --to safetensors",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of checkpoints")
    parser.add_argument(
        "tag", nargs="?", metavar="TAG", help="one of them (default: the one that `latest` names)"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder to write")
    parser.add_argument("--to", required=True, choices=sorted(FORMATS), help="the format")
    parser.add_argument(
        "--ranks",
        type=positive,
        default=1,
        metavar="N",
        help="ranks of the run at stage 3 that DeepSpeed will load it in (default 1)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=byte_count,
        default=5 * 10**9,
        metavar="SIZE",
        help="largest file of safetensors (default 5GB)",
    )


def _export(args: argparse.Namespace) -> Answer:
    options = ExportOptions(args.ranks, args.max_shard_size)
    made = export_checkpoint(args.folder, args.tag, args.out, args.to, options)
    return Answer({"path": made, "format": args.to}, shown(f"{made}: {args.to}"))
