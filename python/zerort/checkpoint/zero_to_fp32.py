#!/usr/bin/env python
"""Rebuilds the fp32 weights of a checkpoint into one state dict. Stands alone: needs torch, numpy
and safetensors.

    python zero_to_fp32.py CHECKPOINT_DIR OUTPUT [-t TAG] [--max_shard_size 5GB]
                           [--safe_serialization]

CHECKPOINT_DIR is a folder of checkpoints, or one checkpoint of it. OUTPUT is a folder, which gets
`pytorch_model.bin` or, with --safe_serialization, `model.safetensors`; weights of more than
--max_shard_size are split into several files with an index. A copy of this script lies in every
checkpoint, so that it can be read without the program that wrote it.

Where the module xxhash can be imported every file is verified first, and otherwise a line says that
it is not.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import xxhash
except ImportError:
    xxhash = None  # type: ignore[assignment]

BLOCK = 1 << 20
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
DTYPES = {"F64": torch.float64, "F32": torch.float32}


def main() -> int:
    """Runs the command line; returns the exit status."""
    args = parse_arguments()
    folder = find_checkpoint(Path(args.checkpoint_dir), args.tag)
    manifest = read_manifest(folder)
    verify(folder, manifest)
    weights = read_weights(folder, manifest, exclude_frozen=args.exclude_frozen_parameters)
    write_weights(weights, Path(args.output), args.max_shard_size, safe=args.safe_serialization)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Rebuilds the fp32 weights of a checkpoint into one state dict."
    )
    parser.add_argument("checkpoint_dir", help="a folder of checkpoints, or one checkpoint")
    parser.add_argument("output", help="the folder to write into")
    parser.add_argument(
        "-t", "--tag", help="which checkpoint; by default the one that the file `latest` names"
    )
    parser.add_argument(
        "--max_shard_size", type=byte_count, default="5GB", help="largest file, such as 5GB"
    )
    parser.add_argument(
        "--safe_serialization",
        action="store_true",
        help="write safetensors instead of torch's format",
    )
    parser.add_argument(
        "--exclude_frozen_parameters", action="store_true", help="leave frozen parameters out"
    )
    return parser.parse_args()


def byte_count(text: str) -> int:
    """Bytes of a size such as `500MB`."""
    match = re.fullmatch(r"(\d+)([KMGT]?B)", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB, got {text!r}")
    return int(match[1]) * UNITS[match[2]]


def find_checkpoint(folder: Path, tag: str | None) -> Path:
    """The folder of one checkpoint."""
    if tag is None and (folder / "manifest.json").exists():
        return folder
    if tag is None:
        if not (folder / "latest").exists():
            sys.exit(f"{folder} is no checkpoint and has no file `latest`: name a tag with -t")
        tag = (folder / "latest").read_text().strip()
    if not (folder / tag / "manifest.json").exists():
        sys.exit(f"{folder / tag} holds no checkpoint")
    return folder / tag


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the checkpoint says about itself."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    if manifest["format"] != 1:
        sys.exit(f"{folder} has format {manifest['format']}, this script reads format 1")
    return dict(manifest["manifest"])


def verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Compares every file with its hash, and the manifest with its own."""
    if xxhash is None:
        print("not verified: the module xxhash is not installed", file=sys.stderr)
        return
    head, _, rest = (folder / "manifest.json").read_bytes().partition(b"\n")
    if xxhash.xxh3_128_hexdigest(rest[: -len(b"\n}\n")]) not in head.decode("ascii", "replace"):
        sys.exit(f"{folder / 'manifest.json'} is damaged")
    for entry in manifest["files"]:
        blocks = ""
        with (folder / entry["name"]).open("rb") as file:
            while block := file.read(BLOCK):
                blocks += xxhash.xxh3_128_hexdigest(block)
        if blocks != entry["blocks"]:
            sys.exit(f"{folder / entry['name']} is damaged: use another checkpoint")


def read_weights(
    folder: Path, manifest: dict[str, Any], *, exclude_frozen: bool = False
) -> dict[str, Tensor]:
    """All weights by name: fp32 (fp64 where trained so), buffers in floating point as fp32, the
    others as they are.
    """
    weights: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = {
            entry["name"]: stack.enter_context(safe_open(folder / entry["name"], "pt"))
            for entry in manifest["files"]
            if entry["name"].endswith(".safetensors")
        }
        for entry in manifest["tensors"]:
            kind, _, name = entry["name"].partition(".")
            if kind in ("buffer", "param") and not (exclude_frozen and name in manifest["frozen"]):
                tensor = files[entry["file"]].get_tensor(entry["name"])
                weights[name] = tensor.float() if tensor.is_floating_point() else tensor
        for number, bucket in enumerate(manifest["buckets"]):
            show(f"bucket {number + 1} of {len(manifest['buckets'])}")
            flat = read_bucket(files, manifest, number)
            for param, offset in zip(bucket["params"], bucket["offsets"], strict=True):
                saved = manifest["params"][param]
                if saved["stored"] and not (exclude_frozen and saved["frozen"]):
                    view = torch.as_strided(flat, saved["shape"], saved["strides"], offset)
                    weights[saved["name"]] = view.clone(memory_format=torch.contiguous_format)
    show(
        f"{len(weights)} tensors, {sum(tensor.numel() for tensor in weights.values()):,} elements\n"
    )
    aliases = manifest["aliases"].items()
    return weights | {alias: weights[name] for alias, name in aliases if name in weights}


def read_bucket(files: dict[str, Any], manifest: dict[str, Any], number: int) -> Tensor:
    """A bucket's masters, put together from the shards of all ranks. What is not stored is zero."""
    bucket = manifest["buckets"][number]
    flat = torch.zeros(0)
    for entry in manifest["tensors"]:
        if entry["name"] != f"bucket.{number}.master":
            continue
        if not flat.numel():
            flat = torch.zeros(bucket["numel"], dtype=DTYPES[entry["dtype"]])
        rank = int(re.fullmatch(r"rank_(\d+)\.safetensors", entry["file"])[1])  # type: ignore[index]
        shard = files[entry["file"]].get_tensor(entry["name"])
        done = 0
        for start, length in entry["runs"]:
            at = rank * bucket["shard_numel"] + start
            flat[at : at + length] = shard[done : done + length]
            done += length
    return flat


def write_weights(weights: dict[str, Tensor], folder: Path, limit: int, *, safe: bool) -> None:
    """Writes one file, or several and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", ".safetensors") if safe else ("pytorch_model", ".bin")
    parts = list(split(once(weights) if safe else weights, limit))
    names = [stem + suffix]
    if len(parts) > 1:
        names = [
            f"{stem}-{index + 1:05d}-of-{len(parts):05d}{suffix}" for index in range(len(parts))
        ]
        where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        total = sum(tensor.nbytes for part in parts for tensor in part.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name, part in zip(names, parts, strict=True):
        show(f"writing {folder / name}\n")
        if safe:
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)


def once(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without second names of the same tensor, which safetensors does not allow."""
    kept: dict[int, str] = {}
    return {
        name: tensor
        for name, tensor in weights.items()
        if kept.setdefault(id(tensor), name) == name
    }


def split(weights: dict[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """The weights in order, in parts of at most `limit` bytes; a larger tensor is a part of its
    own.
    """
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights.items():
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def show(line: str) -> None:
    """Progress, on one line of a terminal."""
    end = "" if sys.stderr.isatty() or line.endswith("\n") else "\n"
    print(f"\r\033[K{line}" if sys.stderr.isatty() else line, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
