"""`zerort ckpt`: what it answers about checkpoints. Reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from rich.markup import escape
from rich.text import Text
from torch import Tensor

from zerort.checkpoint.export import get_fp32_state_dict
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import Manifest
from zerort.checkpoint.parsing import parse
from zerort.checkpoint.tags import latest, listed, read_manifest
from zerort.checkpoint.verify import problems
from zerort.errors import CheckpointError
from zerort.terminal import Answer, grid, progress, shown, track

__all__ = ["diff", "ls", "show", "verify"]


def verify(folder: Path, tag: str | None) -> Answer:
    """Verifies one tag, or all of a folder; status 1 when something is wrong."""
    tags = [tag] if tag is not None else [entry.tag for entry in listed(Disk(), folder)]
    if not tags:
        raise CheckpointError(f"{folder} holds no checkpoint")
    found = {name: problems(folder, name) for name in track(tags, "verifying")}
    lines: list[Text | str] = []
    for name, wrong in found.items():
        word = ("damaged", "red") if wrong else ("ok", "green")
        lines += [Text.assemble(f"{name}: ", word), *(f"  {problem}" for problem in wrong)]
    document = [{"tag": name, "problems": wrong} for name, wrong in found.items()]
    return Answer({"checkpoints": document}, shown(*lines), 1 if any(found.values()) else 0)


def ls(folder: Path) -> Answer:
    """The checkpoints of a folder, the newest first; what `latest` names has a star."""
    disk = Disk()
    named = latest(disk, folder)
    table = grid("tag", "step", "ranks", "stage", "size", "saved", "zerort")
    rows: list[dict[str, Any]] = []
    for entry in listed(disk, folder):
        is_latest = entry.tag == named
        star = " *" if is_latest else ""
        rows.append({"tag": entry.tag, "latest": is_latest, "readable": entry.manifest is not None})
        if entry.manifest is None:
            table.add_row(escape(entry.tag) + star, "[red]unreadable[/red]")
            continue
        found = entry.manifest
        rows[-1] |= _about(found)
        counts = (str(found.counters.global_steps), str(found.world), str(found.stage))
        table.add_row(
            escape(entry.tag) + star,
            *counts,
            decimal(_size(found)),
            found.saved,
            escape(found.zerort),
        )
    return Answer({"checkpoints": rows}, shown(table))


def show(folder: Path, tag: str | None) -> Answer:
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
    rows = list(_tensors(found))
    table = grid("tensor", "shape", "dtype", "optimizer state", "")
    for row in rows:
        state = ", ".join(row["optimizer_state"])
        note = "" if row["note"] == "trained" else row["note"]
        table.add_row(escape(row["name"]), _shape(row["shape"]), row["dtype"], state, note)
    document = {"tag": name, **_about(found), "buckets": len(found.buckets), "tensors": rows}
    lines = [f"{key:>10}  {value}" for key, value in facts.items()]
    return Answer(document, shown(*lines, table))


def _about(found: Manifest) -> dict[str, Any]:
    return {
        "step": found.counters.global_steps,
        "samples": found.counters.global_samples,
        "ranks": found.world,
        "stage": found.stage,
        "optimizer": None if found.optimizer is None else found.optimizer.name,
        "nbytes": _size(found),
        "saved": found.saved,
        "zerort": found.zerort,
        "torch": found.torch,
    }


def _optimizer(manifest: Manifest) -> str:
    found = manifest.optimizer
    return "none" if found is None else f"{found.name}, {len(found.groups)} groups"


def _size(manifest: Manifest) -> int:
    return sum(entry.bytes for entry in manifest.files)


def _tensors(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for entry in manifest.params:
        kept = (
            [*entry.state.tensors, *entry.state.whole, *entry.state.values] if entry.state else []
        )
        note = "frozen" if entry.frozen else "trained"
        note = note if entry.stored else "frozen, left out"
        yield _tensor(entry.name, entry.shape, entry.dtype, note, kept)
    for tensor in manifest.tensors:
        kind, _, name = tensor.name.partition(".")
        if kind in ("param", "buffer"):
            note = "not trained" if kind == "param" else "buffer"
            yield _tensor(name, tensor.shape, tensor.dtype, note)


def _tensor(
    name: str, shape: tuple[int, ...], dtype: str, note: str, state: Sequence[str] = ()
) -> dict[str, Any]:
    return {"name": name, "shape": shape, "dtype": dtype, "note": note, "optimizer_state": state}


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def diff(one: Path, other: Path) -> Answer:
    """Compares the weights of two checkpoints (DIR/TAG), verified; status 1 when they differ."""
    with progress("reading"):
        weights = [get_fp32_state_dict(path.parent, path.name) for path in (one, other)]
        found = list(_differences(*weights))
    document = {"tensors": len(weights[0].keys() | weights[1].keys()), "different": found}
    if not found:
        return Answer(document, shown(f"{len(weights[0])} tensors, all equal to the bit"))
    table = grid("tensor", "difference", "largest", "norm, relative")
    for row in found:
        table.add_row(escape(row["name"]), *_cells(row))
    return Answer(document, shown(table), 1)


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    if "elements" in row:
        counts = f"{row['different']} of {row['elements']} elements"
        return counts, f"{row['largest']:.3g}", f"{row['relative']:.3g}"
    if "only_in" in row:
        return f"only in the {row['only_in']}", "", ""
    return " and ".join(map(_shape, row["shapes"])), "", ""


def _differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            yield {"name": name, "only_in": "second" if name in theirs else "first"}
        elif ours[name].shape != theirs[name].shape:
            yield {"name": name, "shapes": [tuple(ours[name].shape), tuple(theirs[name].shape)]}
        elif not torch.equal(ours[name], theirs[name]):
            wide = torch.complex128 if ours[name].is_complex() else torch.float64
            a, b = ours[name].to(wide), theirs[name].to(wide)
            yield {
                "name": name,
                "different": int((a != b).sum()),
                "elements": a.numel(),
                "largest": float((a - b).abs().max()),
                "relative": float((a - b).norm() / a.norm().clamp_min(1e-300)),
            }
