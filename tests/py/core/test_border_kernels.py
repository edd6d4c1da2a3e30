"""Kernels through the border against torch, and what keeps two of them out of the same memory."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import pytest
import torch

from zerort import _core
from zerort.errors import LayoutError

LENGTHS = [0, 1, 127, 1024, 5000]


def summed_by_torch(chunks: torch.Tensor, world: int, scale: float) -> torch.Tensor:
    wide = torch.float64 if chunks.dtype == torch.float64 else torch.float32
    first, *others = chunks.to(wide).view(world, -1)
    total = first.clone()
    for chunk in others:
        total += chunk
    return total * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_sum_is_that_of_torch_to_the_bit(dtype: torch.dtype, world: int, length: int) -> None:
    torch.manual_seed(length + world)
    chunks = torch.randn(world * length, dtype=torch.float64).to(dtype)
    accum = torch.randn(length, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    source, target = _core.Buffer(chunks), _core.Buffer(accum)

    for add in (True, False):
        before = accum.clone() if add else torch.zeros_like(accum)
        expected = before + summed_by_torch(chunks, world, 0.25)
        norm = _core.reduce(source, target, world=world, scale=0.25, add=add)
        assert torch.equal(accum, expected)
        assert math.isclose(norm, accum.double().square().sum().item(), rel_tol=1e-12)
        assert norm == _core.squared_norm(target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows_in_the_norm_and_is_found(dtype: torch.dtype, bad: float) -> None:
    values = torch.ones(3000, dtype=dtype)
    buffer = _core.Buffer(values)
    assert (_core.first_nonfinite(buffer), _core.squared_norm(buffer)) == (None, 3000.0)
    values[2500] = values[1700] = bad
    assert _core.first_nonfinite(buffer) == 1700
    assert not math.isfinite(_core.squared_norm(buffer))


def test_a_sum_that_overflows_shows_in_the_norm() -> None:
    largest = torch.full((2,), torch.finfo(torch.float32).max)
    accum = torch.zeros(1)
    norm = _core.reduce(_core.Buffer(largest), _core.Buffer(accum), world=2, scale=0.5, add=False)
    assert math.isinf(norm)
    assert _core.first_nonfinite(_core.Buffer(accum)) == 0


def test_the_largest_finite_numbers_have_a_finite_norm() -> None:
    for dtype in (torch.float32, torch.float64):
        values = _core.Buffer(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))
        assert math.isfinite(_core.squared_norm(values))


@pytest.mark.parametrize(
    ("chunks", "accum", "world", "why"),
    [
        (torch.zeros(7), torch.zeros(4), 2, "7 elements are not 2 chunks of 4"),
        (torch.zeros(4), torch.zeros(4), 0, "0 chunks"),
        (
            torch.zeros(8),
            torch.zeros(4, dtype=torch.float64),
            2,
            "f32 chunks and a f64 accumulator",
        ),
        (
            torch.zeros(8, dtype=torch.float64),
            torch.zeros(4),
            2,
            "f64 chunks and a f32 accumulator",
        ),
        (
            torch.zeros(8),
            torch.zeros(4, dtype=torch.bfloat16),
            2,
            "f32 chunks and a bf16 accumulator",
        ),
        (torch.zeros(8, dtype=torch.uint8), torch.zeros(4), 2, "u8 chunks"),
    ],
)
def test_buffers_that_do_not_fit_are_refused(
    chunks: torch.Tensor, accum: torch.Tensor, world: int, why: str
) -> None:
    accum.fill_(5.0)
    with pytest.raises(LayoutError, match=why):
        _core.reduce(_core.Buffer(chunks), _core.Buffer(accum), world=world, scale=1.0, add=False)
    assert torch.equal(accum, torch.full_like(accum, 5.0))


def test_bytes_have_no_norm() -> None:
    buffer = _core.Buffer(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(LayoutError, match="no norm"):
        _core.squared_norm(buffer)
    with pytest.raises(LayoutError, match="no infinity"):
        _core.first_nonfinite(buffer)


@pytest.mark.parametrize("start", [0, 4, 7])
def test_an_accumulator_that_overlaps_its_chunks_is_refused(start: int) -> None:
    memory = torch.ones(12)
    chunks, accum = _core.Buffer(memory[:8]), _core.Buffer(memory[start : start + 4])
    with pytest.raises(LayoutError, match="overlap"):
        _core.reduce(chunks, accum, world=2, scale=1.0, add=False)
    assert torch.equal(memory, torch.ones(12))


def test_an_accumulator_right_behind_its_chunks_is_fine() -> None:
    memory = torch.ones(12)
    _core.reduce(_core.Buffer(memory[:8]), _core.Buffer(memory[8:]), world=2, scale=1.0, add=False)
    assert memory[8:].tolist() == [2.0] * 4


def test_a_refused_kernel_holds_nothing_afterwards() -> None:
    memory = torch.ones(8)
    whole = _core.Buffer(memory)
    with pytest.raises(LayoutError):
        _core.reduce(whole, whole, world=1, scale=1.0, add=False)
    assert _core.reduce(whole, _core.Buffer(torch.zeros(8)), world=1, scale=1.0, add=False) == 8.0
    assert _core.reduce(_core.Buffer(torch.zeros(8)), whole, world=1, scale=1.0, add=False) == 0.0


def test_kernels_run_without_the_gil_and_never_write_the_same_memory_at_once() -> None:
    chunks, accum = _core.Buffer(torch.ones(1 << 22)), _core.Buffer(torch.zeros(1 << 22))
    met = threading.Event()
    deadline = time.monotonic() + 60

    def until_two_meet(kernel: Callable[[], object]) -> None:
        # With the GIL held through a kernel, none could ever meet another, and the deadline ends
        # the loop.
        while not met.is_set() and time.monotonic() < deadline:
            try:
                kernel()
            except LayoutError:
                met.set()

    def write() -> None:
        until_two_meet(lambda: _core.reduce(chunks, accum, world=1, scale=1.0, add=False))

    thread = threading.Thread(target=write)
    thread.start()
    until_two_meet(lambda: _core.squared_norm(accum))
    thread.join()
    assert met.is_set()
    assert _core.reduce(chunks, accum, world=1, scale=1.0, add=False) == float(1 << 22)


MIB = 1 << 20


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("length", [0, 1, MIB - 1, MIB, MIB + 4097, 9 * MIB + 77])
@pytest.mark.parametrize(("source", "target"), [(0, 0), (1, 0), (0, 1), (63, 17)])
def test_a_copy_is_what_was_copied_and_touches_nothing_beside(
    length: int, threads: int, source: int, target: int
) -> None:
    torch.manual_seed(length + threads)
    given = torch.randint(0, 256, (length + source,), dtype=torch.uint8)[source:]
    room = torch.full((length + target + 64,), 7, dtype=torch.uint8)
    into = room[target : target + length]
    _core.copy(_core.Buffer(given), _core.Buffer(into), threads=threads)
    assert torch.equal(into, given)
    assert room[:target].eq(7).all() and room[target + length :].eq(7).all()


def test_a_copy_is_refused_where_it_has_no_room() -> None:
    room = torch.zeros(8, dtype=torch.uint8)
    for source in (torch.zeros(7, dtype=torch.uint8), torch.zeros(8)):
        with pytest.raises(LayoutError, match="as many bytes are copied as there is room for"):
            _core.copy(_core.Buffer(source), _core.Buffer(room))
    with pytest.raises(LayoutError, match="do the two buffers overlap"):
        _core.copy(_core.Buffer(room[:5]), _core.Buffer(room[3:]))
