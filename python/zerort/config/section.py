"""What sections of the configuration are made of: their base class, and the types of their values.

Files say some numbers in ways of their own (5e8 for a count, "5e8" in quotes, Infinity for never);
these types read them.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "LARGEST",
    "SMALLEST",
    "Count",
    "Dtype",
    "DtypeName",
    "Factor",
    "Many",
    "Names",
    "Section",
    "Size",
    "dtype_name",
    "lower",
    "never",
    "number",
    "upper",
    "whole",
    "zero_or_normal",
]

DtypeName = Literal["fp32", "fp16", "bf16"]

_DTYPE_SPELLINGS = {
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
}


def whole(value: Any) -> Any:
    """A whole number written as a float is an integer."""
    # JSON has no integer 5e8, and DeepSpeed's own examples write bucket sizes so.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def lower(value: Any) -> Any:
    """Letters in lower case."""
    return value.lower() if isinstance(value, str) else value


def upper(value: Any) -> Any:
    """Letters in upper case."""
    return value.upper() if isinstance(value, str) else value


def dtype_name(value: Any) -> Any:
    """An element type in any of its spellings."""
    name = value.lower().removeprefix("torch.") if isinstance(value, str) else value
    return _DTYPE_SPELLINGS.get(name, name) if isinstance(name, str) else name


def number(value: Any) -> Any:
    """A number in quotes is a number."""
    # DeepSpeed's own models of these sections read "2" and "5e8" as numbers.
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return whole(value)
    return whole(float(value))


def listed(value: Any) -> Any:
    """One name is a list of one."""
    return [value] if isinstance(value, str) else value


def never(value: Any) -> Any:
    """Infinity means never, None."""
    # Accelerate writes Infinity into every configuration.
    return None if value == math.inf else whole(value)


def zero_or_normal(value: float) -> float:
    """0, or what gradients can be divided by."""
    if 0 < value < SMALLEST:
        raise ValueError(f"expected 0 or a number of at least {SMALLEST:g}, got {value:g}")
    return value


_NUMBER = re.compile(r"[+-]?\d{1,30}(\.\d{0,30})?([eE][+-]?\d{1,3})?")
SMALLEST, LARGEST = 1e-30, 2.0**127
"""What gradients in fp32 can be multiplied with, and divided by, and stay what they are."""

Count = Annotated[int, BeforeValidator(whole), Field(ge=1, le=2**31 - 1)]
Size = Annotated[int, BeforeValidator(whole), Field(ge=1, le=2**53)]
"""Elements, bytes or steps: files say 1e12 where they mean very many."""
Many = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""Elements; files say 1e14, or sys.maxsize, where they mean all."""
Names = Annotated[list[str], BeforeValidator(listed)]
Factor = Annotated[float, Field(ge=SMALLEST, le=LARGEST)]
Dtype = Annotated[DtypeName, BeforeValidator(dtype_name)]


class Section(BaseModel):
    """Strict, frozen and closed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
