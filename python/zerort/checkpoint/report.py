"""`zerort ckpt`: tables about checkpoints on a terminal. Reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from zerort.checkpoint.export import get_fp32_state_dict
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import Manifest
from zerort.checkpoint.parsing import parse
from zerort.checkpoint.tags import latest, listed, read_manifest
from zerort.checkpoint.verify import problems
from zerort.errors import CheckpointError

__all__ = ["diff", "ls", "show", "verify"]


def verify(folder: Path, tag: str | None, console: Console) -> int:
    """Verifies one tag, or all of a folder; returns 1 when something is wrong."""
    tags = [tag] if tag is not None else [entry.tag for entry in listed(Disk(), folder)]
    if not tags:
        raise CheckpointError(f"{folder} holds no checkpoint")
    bad = 0
    for name in tags:
        found = problems(folder, name)
        bad += bool(found)
        console.print(
            f"{escape(name)}: {'[red]damaged[/red]' if found else '[green]ok[/green]'}",
            highlight=False,
        )
        for problem in found:
            console.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True)
    return 1 if bad else 0


def ls(folder: Path, console: Console) -> int:
    """The checkpoints of a folder, the newest first; what `latest` names has a star."""
    disk = Disk()
    named = latest(disk, folder)
    table = Table("tag", "step", "ranks", "stage", "size", "saved", "zerort")
    for entry in listed(disk, folder):
        star = " *" if entry.tag == named else ""
        if entry.manifest is None:
            table.add_row(escape(entry.tag) + star, "[red]unreadable[/red]")
            continue
        found = entry.manifest
        counts = (str(found.counters.global_steps), str(found.world), str(found.stage))
        table.add_row(
            escape(entry.tag) + star,
            *counts,
            decimal(_size(found)),
            found.saved,
            escape(found.zerort),
        )
    console.print(table)
    return 0


def show(folder: Path, tag: str | None, console: Console) -> int:
    """One checkpoint: where it comes from, and its tensors."""
    disk = Disk()
    name = tag or latest(disk, folder)
    if name is None:
        raise CheckpointError(f"{folder} has no file `latest`: name a tag")
    found = parse(read_manifest(disk, folder, name))
    facts = {
        "step": f"{found.counters.global_steps}, of {found.counters.global_samples} samples",
        "saved": f"{found.saved} by zerort {found.zerort} with torch {found.torch}",
        "ranks": f"{found.world}, stage {found.stage}",
        "optimizer": _optimizer(found),
        "size": f"{decimal(_size(found))} in {len(found.files)} files",
        "buckets": str(len(found.buckets)),
    }
    for key, value in facts.items():
        console.print(f"{key:>10}  {value}", markup=False, highlight=False)
    console.print(_tensors(found))
    return 0


def _optimizer(manifest: Manifest) -> str:
    found = manifest.optimizer
    return "none" if found is None else f"{found.name}, {len(found.groups)} groups"


def _size(manifest: Manifest) -> int:
    return sum(entry.bytes for entry in manifest.files)


def _tensors(manifest: Manifest) -> Table:
    table = Table("tensor", "shape", "dtype", "optimizer state", "")
    for entry in manifest.params:
        kept = (
            [*entry.state.tensors, *entry.state.whole, *entry.state.values] if entry.state else []
        )
        note = "frozen" if entry.frozen else ""
        note = note if entry.stored else "frozen, left out"
        table.add_row(escape(entry.name), _shape(entry.shape), entry.dtype, ", ".join(kept), note)
    for tensor in manifest.tensors:
        kind, _, name = tensor.name.partition(".")
        if kind in ("param", "buffer"):
            note = "not trained" if kind == "param" else "buffer"
            table.add_row(escape(name), _shape(tensor.shape), tensor.dtype, "", note)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def diff(one: Path, other: Path, console: Console) -> int:
    """Compares the weights of two checkpoints (DIR/TAG), verified; returns 1 when they differ."""
    weights = [get_fp32_state_dict(path.parent, path.name) for path in (one, other)]
    table = Table("tensor", "difference", "largest", "norm, relative")
    for row in _differences(*weights):
        table.add_row(*map(escape, row))
    if not table.row_count:
        console.print(f"{len(weights[0])} tensors, all equal to the bit", highlight=False)
        return 0
    console.print(table)
    return 1


def _differences(
    ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> Iterator[tuple[str, str, str, str]]:
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            yield name, f"only in the {'second' if name in theirs else 'first'}", "", ""
        elif ours[name].shape != theirs[name].shape:
            yield (
                name,
                f"{_shape(tuple(ours[name].shape))} and {_shape(tuple(theirs[name].shape))}",
                "",
                "",
            )
        elif not torch.equal(ours[name], theirs[name]):
            wide = torch.complex128 if ours[name].is_complex() else torch.float64
            a, b = ours[name].to(wide), theirs[name].to(wide)
            count = int((a != b).sum())
            relative = float((a - b).norm() / a.norm().clamp_min(1e-300))
            yield (
                name,
                f"{count} of {a.numel()} elements",
                f"{float((a - b).abs().max()):.3g}",
                f"{relative:.3g}",
            )
