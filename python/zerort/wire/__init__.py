"""How a bucket's gradients are encoded on the wire, and how what arrives is added up.

A *format* says what encoding costs: how many bytes a shard takes, and whether a network may add
what is encoded. For each bucket, and each time that it is reduced on its way, it makes an
*encoder*, which sees every gradient once a pass and may keep state from step to step. Sums run in
rank order with at least fp32 accumulation wherever this package does the adding, and an infinity or
NaN arrives as one. Formats do not communicate, and force no host synchronisation on an accelerator.

To add one: a file here, and a row at the end of `FORMATS`, whose order is the number that plans
know a format by.
"""

from __future__ import annotations

import torch

from zerort.wire.contract import Buffers, Encoder, Extent, Kept, Terms, WireFormat
from zerort.wire.dense import Dense
from zerort.wire.int8 import Int8
from zerort.wire.kept import WireState, restore, state_of

__all__ = [
    "FORMATS",
    "Buffers",
    "Dense",
    "Encoder",
    "Extent",
    "Kept",
    "Terms",
    "WireFormat",
    "WireState",
    "format_of",
    "number_of",
    "restore",
    "state_of",
]

FORMATS: dict[str, WireFormat] = {
    "fp32": Dense(torch.float32),
    "bf16": Dense(torch.bfloat16),
    "fp16": Dense(torch.float16),
    "fp64": Dense(torch.float64),
    "int8": Int8(),
}


def number_of(name: str) -> int:
    """The number that plans know a format by."""
    return list(FORMATS).index(name)


def format_of(number: int) -> WireFormat:
    """The format of a number."""
    return list(FORMATS.values())[number]
