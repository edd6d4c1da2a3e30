"""What devices do at most, by the name that torch gives them: a row a device.

Figures are the makers' own, for dense matrices and at the full clock. A slice of a device, or one
that is not here, has none: the caller gives it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

__all__ = ["PEAKS", "Peak", "peak_of"]


@dataclass(frozen=True)
class Peak:
    """10^12 floating-point operations a second of one device, as torch sees devices."""

    name: str
    """A pattern of the whole name."""
    half: float
    """fp16 and bf16, sums in fp32."""
    tf32: float | None
    """fp32 in matrix units that round to TF32; None where there are none."""
    single: float
    """fp32 as it is."""
    source: str
    bf16: bool = True
    """Whether its matrix units take bf16."""


PEAKS = (
    Peak("NVIDIA B200", 2250, 1125, 75, "NVIDIA, DGX B200 datasheet, an eighth of it"),
    Peak(r"NVIDIA (H200|GH200 \d+GB)", 989.4, 494.7, 66.9, "NVIDIA, H200 and GH200 datasheets"),
    Peak("NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9, "NVIDIA, H100 architecture, SXM5"),
    Peak("NVIDIA H100 PCIe", 756, 378, 51, "NVIDIA, H100 datasheet, PCIe"),
    Peak("NVIDIA H(100|200) NVL", 835.5, 417.5, 60, "NVIDIA, H100 NVL and H200 NVL datasheets"),
    Peak(r"NVIDIA A100[- ](SXM4-|PCIE-)?\d+GB( PCIe)?", 312, 156, 19.5, "NVIDIA, A100 datasheet"),
    Peak("NVIDIA A40", 149.7, 74.8, 37.4, "NVIDIA, A40 datasheet"),
    Peak("NVIDIA A10", 125, 62.5, 31.2, "NVIDIA, A10 datasheet"),
    Peak("NVIDIA L40S", 362.05, 183, 91.6, "NVIDIA, L40S datasheet"),
    Peak("NVIDIA L4", 121, 60, 30.3, "NVIDIA, L4 datasheet"),
    Peak("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6, "NVIDIA, Ada architecture"),
    Peak("NVIDIA GeForce RTX 3090", 71, 35.6, 35.6, "NVIDIA, GA102 architecture"),
    Peak(r"Tesla V100-SXM2-\d+GB", 125, None, 15.7, "NVIDIA, V100 datasheet, NVLink", bf16=False),
    Peak(r"Tesla V100-PCIE-\d+GB", 112, None, 14, "NVIDIA, V100 datasheet, PCIe", bf16=False),
    Peak("Tesla T4", 65, None, 8.1, "NVIDIA, T4 datasheet", bf16=False),
    Peak("AMD Instinct MI300X", 1307.4, 653.7, 163.4, "AMD, Instinct MI300X datasheet"),
    Peak("AMD Instinct MI250X", 191.5, None, 23.9, "AMD, MI250X datasheet, one of its two dies"),
)


def peak_of(name: str, dtype: torch.dtype, *, tf32: bool) -> float | None:
    """Flops a second of the device `name` in `dtype`; `tf32` says that fp32 may be rounded to it.

    None for a device, or a dtype on it, that is not known.
    """
    row = next((row for row in PEAKS if re.fullmatch(row.name, name)), None)
    if row is None or (dtype is torch.bfloat16 and not row.bf16):
        return None
    if dtype is torch.float32:
        return 1e12 * (row.tf32 if tf32 and row.tf32 is not None else row.single)
    return 1e12 * row.half if dtype in (torch.float16, torch.bfloat16) else None
