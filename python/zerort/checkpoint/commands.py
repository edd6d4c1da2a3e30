"""`zerort ckpt`: its commands and their arguments. What they do is in `report`, `deepspeed` and
`formats`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from zerort.checkpoint import report
from zerort.checkpoint.deepspeed.convert import ImportOptions, import_checkpoint
from zerort.checkpoint.formats import FORMATS, ExportOptions, export_checkpoint
from zerort.checkpoint.zero_to_fp32 import byte_count

__all__ = ["add_commands"]

_Commands = argparse._SubParsersAction


def add_commands(commands: _Commands[argparse.ArgumentParser]) -> None:
    """Adds them to a command line."""
    verify = commands.add_parser(
        "verify", help="compares every byte with its hash; status 1 for a damaged checkpoint"
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="a folder of checkpoints")
    verify.add_argument("tag", nargs="?", metavar="TAG", help="one of them (default: all)")
    verify.set_defaults(run=lambda args, console: report.verify(args.folder, args.tag, console))

    ls = commands.add_parser("ls", help="the checkpoints of a folder, the newest first")
    ls.add_argument("folder", type=Path, metavar="DIR", help="a folder of checkpoints")
    ls.set_defaults(run=lambda args, console: report.ls(args.folder, console))

    show = commands.add_parser("show", help="where a checkpoint comes from, and its tensors")
    show.add_argument("folder", type=Path, metavar="DIR", help="a folder of checkpoints")
    show.add_argument(
        "tag", nargs="?", metavar="TAG", help="one of them (default: the one that `latest` names)"
    )
    show.set_defaults(run=lambda args, console: report.show(args.folder, args.tag, console))

    diff = commands.add_parser(
        "diff", help="compares the weights of two checkpoints; status 1 where they differ"
    )
    diff.add_argument("one", type=Path, metavar="DIR/TAG", help="a checkpoint")
    diff.add_argument("other", type=Path, metavar="DIR/TAG", help="another")
    diff.set_defaults(run=lambda args, console: report.diff(args.one, args.other, console))

    _add_import(commands)
    _add_export(commands)


def _add_import(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "import",
        help="a checkpoint of DeepSpeed's (ZeRO 0 to 3 or universal, 0.16 to 0.19) as zerort's",
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
    parser.set_defaults(run=_import)


def _import(args: argparse.Namespace, console: Console) -> int:
    names = None if args.names is None else args.names.read_text("utf-8").split()
    options = ImportOptions(args.optimizer, args.scheduler, names, args.skip_objects)
    done = import_checkpoint(args.folder, args.tag, args.out, options)
    lines = [
        f"{done.path}: {done.parameters} trained parameters, {done.frozen} others, "
        f"{done.buffers} buffers",
        *(f"  {note}" for note in done.notes),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _add_export(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("export", help="a checkpoint in another program's format")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of checkpoints")
    parser.add_argument(
        "tag", nargs="?", metavar="TAG", help="one of them (default: the one that `latest` names)"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder to write")
    parser.add_argument("--to", required=True, choices=sorted(FORMATS), help="the format")
    parser.add_argument(
        "--ranks",
        type=int,
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
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace, console: Console) -> int:
    options = ExportOptions(args.ranks, args.max_shard_size)
    made = export_checkpoint(args.folder, args.tag, args.out, args.to, options)
    console.print(f"{made}: {args.to}", markup=False, highlight=False, soft_wrap=True)
    return 0
