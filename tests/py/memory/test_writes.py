"""Writes into parameters between steps, in low precision: whatever made them, the masters take them
over, and keep what they know of the elements that were not written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ranks
import zerort
from models import Terms
from terms import at_each_stage, engine_over_terms, step_with, weights
from training import keep
from zerort import _core
from zerort.device.accelerator import Accelerator
from zerort.device.cpu import Cpu
from zerort.errors import LayoutError
from zerort.memory import Memory

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "loss_scale": 1.0}}
TINY = 2.0**-12
"""A learning rate whose steps are no bf16 numbers near 1."""


def through_data(parameter: nn.Parameter, value: float) -> None:
    parameter.data.clamp_(value, value)


def through_detach(parameter: nn.Parameter, value: float) -> None:
    parameter.detach().fill_(value)


def without_grad(parameter: nn.Parameter, value: float) -> None:
    with torch.no_grad():
        parameter.fill_(value)


def past_versions(parameter: nn.Parameter, value: float) -> None:
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
        parameter.fill_(value)


def through_an_alias(parameter: nn.Parameter, value: float) -> None:
    torch.from_dlpack(parameter.detach()).fill_(value)


WAYS: list[Callable[[nn.Parameter, float], None]] = [
    through_data,
    through_detach,
    without_grad,
    past_versions,
    through_an_alias,
]


def write_each_way(rank: int, world: int) -> None:
    for precision in (BF16, FP16):
        for write in WAYS:
            engine = engine_over_terms(precision)
            step_with(engine, 64.0, 64.0)
            write(engine.module.a, 3.0)
            assert step_with(engine, 1.0, 1.0) == (2.0, -65.0), write.__name__
            keep(engine)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_write_reaches_the_masters_whatever_made_it(stage: int) -> None:
    ranks.shared(2, at_each_stage, stage, write_each_way)


def clip_after_each_step(rank: int, world: int) -> None:
    """A critic whose weights are clipped: what the masters hold is never outside."""
    engine = engine_over_terms(BF16)
    for _ in range(3):
        step_with(engine, 2.0, -2.0)
        for parameter in engine.module.parameters():
            parameter.data.clamp_(-0.5, 0.5)
    assert weights(engine) == (-0.5, 0.5)
    assert step_with(engine, 0.25, 0.25) == (-0.75, 0.25)


def write_few_elements(rank: int, world: int) -> None:
    """8 steps of TINY are seen by the masters only; a write into one element costs the others
    none.
    """
    model = Terms()
    sgd = torch.optim.SGD(model.parameters(), lr=TINY)
    engine = engine_over_terms(BF16, model=model, optimizer=sgd)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    for _ in range(8):
        engine.backward(engine(1.0, 1.0))
        engine.step()
    model.a.data[0] = 3.0
    for _ in range(8):
        engine.backward(engine(1.0, 1.0))
        engine.step()
    moved = 1.0 - 16 * TINY
    assert model.b.tolist() == [moved] * 4
    assert model.a.tolist() == [3.0, moved, moved, moved]


def save_what_was_written(rank: int, world: int) -> None:
    engine = engine_over_terms(BF16)
    step_with(engine, 1.0, 1.0)
    engine.module.a.data.fill_(3.0)
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    if world > 1:
        dist.broadcast_object_list(folder)
    engine.save_checkpoint(folder[0], "now")
    saved = zerort.checkpoint.get_fp32_state_dict(folder[0], "now")
    assert saved["a"].tolist() == [3.0] * 4
    assert saved["b"].tolist() == [-1.0] * 4


def note_what_a_feature_writes(rank: int, world: int) -> None:
    """Values that a feature has put over the published ones leave the masters alone, but for what
    is written after it.
    """
    engine = engine_over_terms(BF16)
    flat = engine._parts.boundary.flat
    step_with(engine, 1.0, 1.0)
    for parameter in engine.module.parameters():
        parameter.data.fill_(9.0)
    for bucket in flat.buckets:
        bucket.note_writes()
    engine.module.b.data.fill_(5.0)
    flat.take_writes()
    assert step_with(engine, 1.0, 1.0) == (-2.0, 4.0)
    assert step_with(engine, 1.0, 1.0) == (-3.0, 3.0)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(
    "scenario",
    [
        clip_after_each_step,
        write_few_elements,
        save_what_was_written,
        note_what_a_feature_writes,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_masters_know_what_was_written(scenario: Callable[[int, int], None], stage: int) -> None:
    ranks.shared(2, at_each_stage, stage, scenario)


# ---- the kernel, and the same in torch for devices


TAKES = [Cpu().take_writes, Accelerator(torch.device("cpu", 0)).take_writes]


def masters() -> Tensor:
    """Every kind of number, and values on both sides of a rounding."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (3000,), dtype=torch.int32, generator=generator)
    kinds = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65519.9, 65520.0])
    return torch.cat([anything.view(torch.float32), torch.randn(3000, generator=generator), kinds])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("take", TAKES, ids=["core", "torch"])
def test_what_torch_casts_is_no_write(
    take: Callable[[Memory, Memory], None], dtype: torch.dtype
) -> None:
    before = masters()
    master = before.clone()
    take(Memory.of(before.to(dtype)), Memory.of(master))
    assert torch.equal(master.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("take", TAKES, ids=["core", "torch"])
def test_each_other_number_is_one(
    take: Callable[[Memory, Memory], None], dtype: torch.dtype
) -> None:
    before = masters()
    values = before.to(dtype)
    written = torch.arange(len(values)) % 7 == 0
    values[written] = 1234.0
    master = before.clone()
    take(Memory.of(values), Memory.of(master))
    assert torch.equal(master[written], values[written].float())
    assert torch.equal(master[~written].view(torch.int32), before[~written].view(torch.int32))


def test_masters_are_fp32_one_for_each_value() -> None:
    def buffer(numel: int, dtype: torch.dtype) -> _core.Buffer:
        return _core.Buffer(torch.zeros(numel, dtype=dtype))

    with pytest.raises(LayoutError, match="4 values have no 5 masters"):
        _core.take_writes(buffer(4, torch.bfloat16), buffer(5, torch.float32))
    for values, master in [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]:
        with pytest.raises(LayoutError, match="bf16 and fp16 have an fp32 master"):
            _core.take_writes(buffer(4, values), buffer(4, master))
    assert _core.take_writes(buffer(0, torch.float16), buffer(0, torch.float32)) == 0
