"""Buckets' memory, of which the module's parameters are views."""

from zerort.memory.flat import (
    DTYPES,
    FlatBucket,
    FlatModel,
    Memory,
    Place,
    Planned,
    laid_out_like,
    plannable,
)

__all__ = [
    "DTYPES",
    "FlatBucket",
    "FlatModel",
    "Memory",
    "Place",
    "Planned",
    "laid_out_like",
    "plannable",
]
