"""Numbers as people read them: three magnitudes up or down, two decimals."""

from __future__ import annotations

__all__ = [
    "duration_to_string",
    "flops_to_string",
    "macs_to_string",
    "number_to_string",
    "params_to_string",
]

_PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6}


def number_to_string(number: float, precision: int = 2) -> str:
    """`1.23 M`; a space and no letter between 1 and 1000."""
    return _scaled(number, precision)


def macs_to_string(macs: float, precision: int = 2) -> str:
    """`1.23 MMACs`."""
    return _scaled(macs, precision) + "MACs"


def flops_to_string(flops: float, precision: int = 2) -> str:
    """`1.23 MFLOPS`."""
    return _scaled(flops, precision) + "FLOPS"


def params_to_string(params: float, precision: int = 2) -> str:
    """`1.23 M`, with B for billions."""
    return _scaled(params, precision).replace("G", "B").strip()


def duration_to_string(seconds: float, precision: int = 2) -> str:
    """`1.23 ms`."""
    return _scaled(seconds, precision) + "s"


def _scaled(number: float, precision: int) -> str:
    prefix = next((name for name, size in _PREFIXES.items() if abs(number) >= size), "u")
    if number == 0:
        prefix = ""
    return f"{round(number / _PREFIXES[prefix], precision):g} {prefix}"
