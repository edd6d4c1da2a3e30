"""Tensors as the safetensors format lays them out: 8 bytes of length, a JSON header, then the data
in one piece.

What it guarantees: a tensor's data is written from where it lies, without a copy on CPU, and the
data of a file starts on 64 bytes; a header is read with limits and nothing in it is believed before
it has been checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zerort.errors import CheckpointError

__all__ = [
    "CODES",
    "DTYPES",
    "Placed",
    "Stored",
    "as_bytes",
    "header",
    "place",
    "read_header",
    "size_of",
]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
"""The format's dtype codes, as far as the running torch has the dtypes."""

if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu

CODES = {dtype: code for code, dtype in DTYPES.items()}

HEADER_LIMIT = 100_000_000
"""Bytes of a header; the format's own limit."""
_ALIGN = 64


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: the elements of `pieces`, one after another, are its own."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Sequence[Tensor]
    runs: tuple[tuple[int, int], ...] | None = None
    """For a part of a shard: (start, length) in the shard of each stretch that is stored."""

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Stored:
        """A whole tensor. Raises `CheckpointError` naming one that the format cannot hold."""
        if tensor.layout != torch.strided or tensor.dtype not in CODES:
            advice = ": keep torch.view_as_real(...) of it" if tensor.is_complex() else ""
            raise CheckpointError(
                f"{name} is a {tensor.layout} tensor of {tensor.dtype}, which safetensors has no "
                f"form for{advice}"
            )
        return cls(name, tensor.dtype, tuple(tensor.shape), [tensor])


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in its file: bytes `start` to `end` from the file's beginning."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    end: int


def size_of(code: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPES[code].itemsize


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements in order, as bytes: the tensor's own memory where contiguous and on CPU."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def place(tensors: Sequence[Stored]) -> tuple[bytes, list[tuple[Stored, Placed]]]:
    """The beginning of a file, up to its data, and the tensors in their order, each with where it
    lies.
    """
    # The widest dtypes first, as the format's own writer has it, so that all are aligned.
    order = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    offsets, end = [], 0
    for tensor in order:
        start, end = end, end + size_of(CODES[tensor.dtype], tensor.shape)
        offsets.append((start, end))
    listed = {
        tensor.name: {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": list(span),
        }
        for tensor, span in zip(order, offsets, strict=True)
    }
    head = header(listed)
    placed = [
        (
            tensor,
            Placed(
                tensor.name, CODES[tensor.dtype], tensor.shape, len(head) + start, len(head) + end
            ),
        )
        for tensor, (start, end) in zip(order, offsets, strict=True)
    ]
    return head, placed


def header(listed: dict[str, Any]) -> bytes:
    """Length and header, padded with spaces, as the format allows, so that the data starts on 64
    bytes.
    """
    text = json.dumps({"__metadata__": {"format": "pt"}, **listed}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def header_bytes(first: bytes, file_bytes: int) -> int:
    """Length of the beginning up to the data, from the first 8 bytes. Raises `CheckpointError`."""
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > min(HEADER_LIMIT, file_bytes - 8):
        raise CheckpointError(
            f"a header of {length} bytes in a file of {file_bytes}: not a safetensors file"
        )
    return 8 + length


def read_header(head: bytes, file_bytes: int) -> list[Placed]:
    """All tensors of a file by their position, from its beginning up to the data, which they must
    tile.

    Raises `CheckpointError` for whatever the format forbids.
    """
    try:
        listed = json.loads(head[8:])
    except (ValueError, RecursionError) as error:
        raise CheckpointError("the header is no JSON, or nested too deep") from error
    if not isinstance(listed, dict):
        raise CheckpointError("the header is no JSON object")
    listed.pop("__metadata__", None)
    found = sorted(
        (_placed(name, entry, len(head)) for name, entry in listed.items()),
        key=lambda t: (t.start, t.end),
    )
    end = len(head)
    for tensor in found:
        if tensor.start != end:
            raise CheckpointError(
                f"tensor {tensor.name!r} starts at byte {tensor.start}, not at {end}: gap or "
                "overlap"
            )
        end = tensor.end
    if end != file_bytes:
        raise CheckpointError(f"the tensors end at byte {end} of {file_bytes}")
    return found


def _placed(name: str, entry: Any, data: int) -> Placed:
    try:
        code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = (
            all(type(n) is int and n >= 0 for n in (*shape, start, end))
            and size_of(code, shape) == end - start
        )
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"tensor {name!r} is described as {str(entry)[:80]}") from error
    if not good:
        raise CheckpointError(
            f"tensor {name!r}: {code} {shape} does not fill bytes {start} to {end}"
        )
    return Placed(name, code, tuple(shape), data + start, data + end)
