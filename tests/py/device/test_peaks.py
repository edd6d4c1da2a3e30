"""What devices do at most: found by the whole name, in the dtype that is asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from zerort.device.accelerator import Accelerator
from zerort.device.cpu import Cpu
from zerort.device.peaks import PEAKS, peak_of

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "expected"),
    [
        (H100, torch.bfloat16, False, 989.4e12),
        (H100, torch.float16, False, 989.4e12),
        (H100, torch.float32, False, 66.9e12),
        (H100, torch.float32, True, 494.7e12),
        (H100, torch.float64, True, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, False, None),
        ("NVIDIA GH200 480GB", torch.bfloat16, False, 989.4e12),
        ("NVIDIA GH200 480GB MIG 1g.12gb", torch.bfloat16, False, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", torch.bfloat16, False, None),
        ("Tesla V100-SXM2-16GB", torch.float16, False, 125e12),
        ("AMD Instinct MI250", torch.float16, False, None),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756e12),
        ("NVIDIA H200", torch.bfloat16, False, 989.4e12),
        ("NVIDIA A100-SXM4-40GB", torch.bfloat16, False, 312e12),
        ("NVIDIA A100 80GB PCIe", torch.float32, True, 156e12),
        ("Tesla T4", torch.bfloat16, False, None),
        ("Tesla T4", torch.float32, True, 8.1e12),
        ("Somebody's device", torch.bfloat16, False, None),
    ],
)
def test_a_peak_is_that_of_the_device_and_the_dtype(
    name: str, dtype: torch.dtype, tf32: bool, expected: float | None
) -> None:
    assert peak_of(name, dtype, tf32=tf32) == (
        None if expected is None else pytest.approx(expected)
    )


def test_every_row_names_its_source_and_fp32_is_never_faster_than_tf32() -> None:
    assert all(row.source and row.single <= (row.tf32 or row.half) for row in PEAKS)


def test_an_accelerator_asks_for_its_own_name_and_for_torchs_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = torch.device("cuda", 0)
    module = SimpleNamespace(get_device_name=lambda device: H100 if device == place else "?")
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    device = Accelerator(place)
    assert device.name() == H100
    assert device.peak(torch.float32) == pytest.approx(66.9e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert device.peak(torch.float32) == pytest.approx(494.7e12)
    assert Cpu().peak(torch.float32) is None
