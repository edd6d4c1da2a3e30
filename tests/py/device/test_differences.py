"""Where two pieces of memory differ, on either kind of device."""

from __future__ import annotations

import pytest
import torch

from zerort.device import LINE
from zerort.device.accelerator import Accelerator
from zerort.device.cpu import Cpu

DEVICES = pytest.mark.parametrize("device", [Cpu(), Accelerator(torch.device("cpu", 0))])


def first_difference(device, one, other) -> int:
    """Behind the last where there is none."""
    place = device.first_difference(one, other)
    return one.nbytes // LINE if place is None else int(place)


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


@DEVICES
@DTYPES
def test_the_first_line_that_differs_is_found_wherever_it_is(device, dtype) -> None:
    numel = 5 * LINE // dtype.itemsize
    one = torch.arange(numel).to(dtype)
    for element in range(numel):
        other = one.clone()
        other[element:] += 1
        line = element * dtype.itemsize // LINE
        assert first_difference(device, one, other) == line, element
        assert first_difference(device, other, one) == line


@DEVICES
@DTYPES
def test_bits_are_compared_and_not_what_they_mean(device, dtype) -> None:
    one = torch.zeros(2 * LINE // dtype.itemsize, dtype=dtype)
    one[3] = torch.nan
    assert first_difference(device, one, one.clone()) == 2
    other = one.clone()
    other[-1] = -0.0
    assert first_difference(device, one, other) == 1


@DEVICES
def test_what_is_empty_is_alike(device) -> None:
    assert first_difference(device, torch.empty(0), torch.empty(0)) == 0
