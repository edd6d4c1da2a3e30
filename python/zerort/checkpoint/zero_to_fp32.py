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
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import xxhash
except ImportError:
    xxhash = None  # type: ignore[assignment]

BLOCK = 1 << 20
LATEST_LIMIT = 256
MANIFEST_LIMIT = 64 << 20
TAG = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
HALF = (torch.float16, torch.bfloat16)
"""What becomes fp32. Anything else, such as the codes of a quantized weight, stays as it is."""


class Refused(Exception):
    """The checkpoint is not what it should be."""


def main() -> int:
    """Runs the command line; returns the exit status."""
    args = parse_arguments()
    try:
        folder = find_checkpoint(Path(args.checkpoint_dir), args.tag)
        weights = read_checkpoint(folder, exclude_frozen=args.exclude_frozen_parameters)
        write_weights(weights, Path(args.output), args.max_shard_size, safe=args.safe_serialization)
    except (Refused, OSError) as error:
        show(f"{error}\n")
        return 1
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
    """The folder of one checkpoint. Raises `Refused` and `OSError`."""
    if tag is None and (folder / "manifest.json").is_file():
        return folder
    if tag is None:
        tag = read_latest(folder)
    if not re.fullmatch(TAG, tag):
        raise Refused(f"{tag!r} cannot be the tag of a checkpoint")
    found = folder / tag
    if found.is_symlink():
        raise Refused(f"{found} is a symbolic link, which is not followed")
    if not (found / "manifest.json").exists():
        raise Refused(f"{found} holds no checkpoint")
    return found


def read_latest(folder: Path) -> str:
    """The tag that the file `latest` names: its first line, of which the second is the hash."""
    path = folder / "latest"
    if not os.path.lexists(path):
        raise Refused(f"{folder} is no checkpoint and has no file `latest`: name a tag with -t")
    tag, _, rest = read_small(path, LATEST_LIMIT).partition(b"\n")
    if rest != hashlib.sha256(tag).hexdigest().encode() + b"\n":
        raise Refused(f"{path} is damaged: name a tag with -t")
    return tag.decode("ascii", "replace")


def open_plain(path: Path) -> int:
    """A regular file, for reading: no link is followed, and a pipe is not waited for."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    if path.is_symlink():
        raise Refused(f"{path} is a symbolic link: a checkpoint holds plain files only")
    file = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise Refused(f"{path} is no plain file")
    return file


def read_small(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes."""
    with open(open_plain(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Refused(f"{path} has more than the {limit} bytes allowed")
    return data


def read_checkpoint(folder: Path, *, exclude_frozen: bool) -> dict[str, Tensor]:
    """All weights, verified as far as that can be done. Raises `Refused` and `OSError`."""
    data = read_small(folder / "manifest.json", MANIFEST_LIMIT)
    try:
        manifest = read_manifest(folder, data)
        verify(folder, manifest)
        return read_weights(folder, manifest, exclude_frozen=exclude_frozen)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    except (RuntimeError, MemoryError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    raise Refused(f"{folder} is damaged, or no checkpoint: {reason}")


def read_manifest(folder: Path, data: bytes) -> dict[str, Any]:
    """What the checkpoint says about itself, compared with its own hash."""
    head, _, rest = data.partition(b"\n")
    if xxhash is None:
        print("not verified: the module xxhash is not installed", file=sys.stderr)
    elif xxhash.xxh3_128_hexdigest(rest[: -len(b"\n}\n")]) not in head.decode("ascii", "replace"):
        raise Refused(f"{folder / 'manifest.json'} is damaged")
    manifest = json.loads(data)
    if manifest["format"] not in (1, 2):
        raise Refused(
            f"{folder} has format {manifest['format']}, this script reads formats 1 and 2"
        )
    return with_indexes(folder, dict(manifest["manifest"]))


def with_indexes(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """With what stands beside each rank's file, which format 1 has in the manifest."""
    files = {entry["name"]: entry for entry in manifest["files"]}
    for name, entry in files.items():
        if entry.get("blocks") is None:
            check_name(folder, name)
            beside = name.removesuffix(".safetensors") + ".json"
            data = read_small(folder / beside, MANIFEST_LIMIT)
            blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
            if (
                xxhash
                and "".join(map(xxhash.xxh3_128_hexdigest, blocks)) != files[beside]["blocks"]
            ):
                raise Refused(f"{folder / beside} is damaged: use another checkpoint")
            index = json.loads(data)
            entry["blocks"] = index["blocks"]
            manifest["tensors"] = [*manifest["tensors"], *index["tensors"]]
    return manifest


def check_name(folder: Path, name: str) -> None:
    """Raises `Refused` for a name that is no checkpoint's file."""
    known = name == "zero_to_fp32.py" or re.fullmatch(r"rank_\d{1,7}\.(safetensors|json)", name)
    if not known:
        raise Refused(f"{folder} lists the file {name!r}, which is no checkpoint's")


def verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Compares every file's name and length with the manifest, and its blocks with their hashes."""
    for entry in manifest["files"]:
        name = entry["name"]
        check_name(folder, name)
        with open(open_plain(folder / name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["bytes"]:
                raise Refused(
                    f"{folder / name} has {size} bytes, and {entry['bytes']} were written"
                )
            blocks = iter(lambda: file.read(BLOCK), b"")
            if xxhash and "".join(map(xxhash.xxh3_128_hexdigest, blocks)) != entry["blocks"]:
                raise Refused(f"{folder / name} is damaged: use another checkpoint")


def read_weights(
    folder: Path, manifest: dict[str, Any], *, exclude_frozen: bool = False
) -> dict[str, Tensor]:
    """All weights by name: the masters, and what has none, where it is of 16 bits as fp32."""
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
                weights[name] = tensor.float() if tensor.dtype in HALF else tensor
        for number, bucket in enumerate(manifest["buckets"]):
            show(f"bucket {number + 1} of {len(manifest['buckets'])}")
            flat = read_bucket(files, manifest, number)
            for param, offset in zip(bucket["params"], bucket["offsets"], strict=True):
                saved = manifest["params"][param]
                if saved["stored"] and not (exclude_frozen and saved["frozen"]):
                    view = torch.as_strided(flat, saved["shape"], saved["strides"], offset)
                    view = view.clone(memory_format=torch.contiguous_format)
                    weights[saved["name"]] = view.float() if view.dtype in HALF else view
    show(
        f"{len(weights)} tensors, {sum(tensor.numel() for tensor in weights.values()):,} elements\n"
    )
    aliases = manifest["aliases"].items()
    return weights | {alias: weights[name] for alias, name in aliases if name in weights}


def read_bucket(files: dict[str, Any], manifest: dict[str, Any], number: int) -> Tensor:
    """A bucket's masters, or the values of what had none, out of the shards of all ranks. What is
    not stored is zero.
    """
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
        unfinished = folder / f"{name}.part"
        unfinished.unlink(missing_ok=True)
        if safe:
            save_file(part, unfinished, metadata={"format": "pt"})
        else:
            torch.save(part, unfinished)
        unfinished.replace(folder / name)


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
