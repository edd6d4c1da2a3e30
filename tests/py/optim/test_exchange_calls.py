"""What reaches the owners of exchanged parameters beside gradients: writes by hand, `zerort.utils`,
an optimizer's own calls, in every precision; and what ranks see of one another's failures.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_whole import Trust
from torch import Tensor, nn
from whole import MUON, PADDINGS, engine_of, flat, tokens, train

import ranks
import zerort
from catching import assert_told, caught
from logged import log_lines
from reference import Moment
from training import keep
from zerort.errors import CommError, StepError
from zerort.mesh.gloo import GlooComm
from zerort.run.exchange import Route
from zerort.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
)

needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is torch 2.9's"
)
pytestmark = needs_muon
LOW = {"enabled": True, "bf16_master_weights_and_grads": True}
QUANTIZE = {
    "enabled": True,
    "quantize_bits": {"start_bits": 8, "target_bits": 4},
    "quantize_schedule": {"quantize_period": 1, "schedule_offset": 0},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}, "gradient_clipping": 0.3},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}, "gradient_clipping": 0.3},
    "bf16 masters": {"bf16": LOW},
    "bf16 states": {"bf16": {**LOW, "bf16_optimizer_states": True}},
    "quantized": {"bf16": {"enabled": True}, "quantize_training": QUANTIZE},
}


def write(engine: Any, rank: int, stage: int) -> None:
    """A row of one matrix, and all of another."""
    tall, square = engine.module.tall.weight, engine.module.square.weight
    with zerort.zero.GatheredParameters([tall, square], modifier_rank=1), torch.no_grad():
        if rank == 1 or stage < 3:
            tall.data[3].fill_(0.25)
            square.clamp_(-0.1, 0.1)


def ended(rank: int, stage: int, way: str, precision: str) -> Tensor:
    """Weights and masters some steps after a write; in fp16 one of them overflows on one rank."""
    engine = engine_of(stage, None, 2, way, **PRECISIONS[precision])
    train(engine, rank, 2)
    write(engine, rank, stage)
    if precision == "fp16":
        for micro in range(2):
            bad = float("inf") if rank == micro == 0 else 1.0
            engine.backward(engine(tokens(Moment(rank, 9, micro))) * bad)
            engine.step()
        assert engine.overflow
    params = list(engine.module.parameters())
    train(engine, rank, 2, 3)
    found = [flat(engine), *map(safe_get_full_fp32_param, params)]
    keep(engine)
    return torch.cat([value.float().reshape(-1) for value in found if value is not None])


def both_ways(rank: int, world: int, stage: int, precision: str) -> bool:
    return torch.equal(
        ended(rank, stage, "owned", precision), ended(rank, stage, "exchanged", precision)
    )


QUICK = [(1, "fp16"), (2, "bf16"), (3, "bf16"), (3, "fp32"), (2, "quantized")]
RARE = [(s, p) for p in PRECISIONS for s in (1, 2, 3) if (s, p) not in (*QUICK, (3, "quantized"))]


@pytest.mark.parametrize(
    ("stage", "precision"), [*QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in RARE)]
)
def test_masters_on_other_ranks_follow_what_was_written(stage: int, precision: str) -> None:
    assert ranks.shared(2, both_ways, stage, precision) == [True, True]


# ---- zerort.utils


def used(rank: int, world: int, stage: int, way: str) -> list[Tensor]:
    engine = engine_of(stage, None, 1, way, bf16={"enabled": True})
    train(engine, rank)
    tall, wide, key = engine.module.tall.weight, engine.module.wide.weight, "momentum_buffer"

    def read() -> list[Any]:
        return [safe_get_full_fp32_param(tall), safe_get_full_optimizer_state(tall, key)]

    master, momentum = read()
    safe_set_full_fp32_param(tall, master * 1.5)
    safe_set_full_optimizer_state(tall, momentum * 2, key)
    found = [master, momentum, *read(), flat(engine)]
    engine.backward(engine(tokens(Moment(rank, 5, 0))))
    gradient = safe_get_full_grad(wide)
    assert gradient is not None
    safe_set_full_grad(wide, gradient * 3)
    engine.step()
    found += [gradient, flat(engine)]
    owned = safe_get_local(wide)
    safe_set_local_fp32_param(wide, torch.full_like(owned, 0.125))
    write(engine, rank, stage)  # which brings all parameters to the owners
    found += [safe_get_full_fp32_param(wide)]
    keep(engine)
    return [value for value in found if value is not None]


def safe_get_local(parameter: Any) -> Tensor:
    found = zerort.utils.safe_get_local_fp32_param(parameter)
    assert found is not None
    return found


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_utils_read_and_write_where_the_owner_has_it(stage: int) -> None:
    expected = ranks.shared(2, used, 1, "owned")
    for ours, theirs in zip(ranks.shared(2, used, stage, "exchanged"), expected, strict=True):
        assert [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [True] * 8
    assert (expected[0][7] == 0.125).all()


class Free(Trust):
    """Evaluated at other weights than it trains at."""

    @torch.no_grad()
    def train(self) -> None:
        self._turn(-1.0)

    @torch.no_grad()
    def eval(self) -> None:
        self._turn(1.0)

    def _turn(self, by: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if "mean" in self.state[parameter]:
                    parameter.add_(self.state[parameter]["mean"], alpha=by)


def turned(rank: int, world: int, stage: int, way: str) -> Tensor:
    engine = engine_of(stage, Free, 1, way)
    train(engine, rank, 1)
    engine.optimizer.eval()
    found = [flat(engine)]
    engine.optimizer.train()
    found.append(flat(engine))
    train(engine, rank, 1, 1)
    keep(engine)
    return torch.cat([*found, flat(engine)])


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizers_own_calls_reach_all_ranks(stage: int) -> None:
    expected = ranks.shared(2, turned, 1, "owned")
    for ours, theirs in zip(ranks.shared(2, turned, stage, "exchanged"), expected, strict=True):
        assert torch.equal(ours, theirs)


# ---- ranks that own nothing, and that fail


class One(nn.Module):
    """One matrix, of a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.hidden, self.head = nn.Linear(40, 30), nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x))).square().mean()


def lonely(rank: int, world: int) -> tuple[list[Tensor], list[str]]:
    found, said = [], []
    for stage, way in ((0, "owned"), (1, "exchanged"), (3, "exchanged")):
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": MUON,
            "zerort": {"whole_padding": PADDINGS[way], "reduce_at": "micro_batch"},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        lines = log_lines()
        engine = zerort.initialize(model=One(), config=config)[0]
        said += [line for line in lines if "whole parameters" in line]
        for step in range(2):
            generator = torch.Generator().manual_seed(10 * step + rank)
            engine.backward(engine(torch.randn(2, 40, generator=generator)))
            engine.step()
        found.append(flat(engine))
        keep(engine)
    return found, said


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_own_nothing_take_part_and_are_counted(world: int) -> None:
    found = ranks.shared(world, lonely)
    for weights, _ in found:
        assert all(torch.equal(end, found[0][0][0]) for end in weights)
    [line, _] = found[0][1]
    assert "the shards of 0 of 1 buckets hold them uncut" in line
    assert f"; 1 of {world} ranks update them" in line


def dies(rank: int, world: int, at: int) -> list[Exception | None]:
    """Rank 1 goes in its `at`-th all-to-all of a step."""
    engine = engine_of(2, way="exchanged")
    train(engine, rank, 1)
    inner, calls = GlooComm.all_to_all, list[int]()

    def counting(self: Any, *args: Any) -> Any:
        calls.append(1)
        if rank == 1 and len(calls) == at:
            os._exit(3)
        return inner(self, *args)

    GlooComm.all_to_all = counting  # type: ignore[method-assign]
    return [caught(partial(train, engine, rank, 1, step)) for step in (1, 2)]


@pytest.mark.parametrize(("at", "what"), [(1, "exchanged gradients"), (2, "exchanged parameters")])
def test_a_rank_that_dies_within_is_named_and_nothing_goes_on(at: int, what: str) -> None:
    survivor, gone = ranks.attempt(2, dies, at)
    assert gone == ranks.Died(3)
    assert isinstance(survivor, ranks.Returned), survivor
    first, second = survivor.value
    assert_told(first, CommError, "rank 0", what, "rank 1 (process")
    assert_told(second, CommError, "restart the job from a checkpoint", what)


def raises(rank: int, world: int) -> list[Any]:
    engine = engine_of(1, way="exchanged")

    def fail(*_: Any) -> None:
        raise ValueError("my own")

    hook = engine.optimizer.register_step_post_hook(fail)
    if rank == 0:
        hook.remove()
    first = caught(lambda: train(engine, rank, 1))
    end = flat(engine)
    hook.remove()
    second = caught(lambda: train(engine, rank, 1, 1))
    keep(engine)
    return [first, second, end]


def test_an_optimizer_that_raises_on_one_rank_keeps_none_waiting() -> None:
    [(none, refused, end), (own, _, other)] = ranks.shared(2, raises)
    assert none is None and torch.equal(end, other)
    assert_told(own, ValueError, "my own")
    assert_told(refused, StepError, "rank 1: its optimizer raised ValueError: my own")


def lacks_memory(rank: int, world: int) -> list[Any]:
    """Rank 1 has none for what is on its way: once."""
    engine = engine_of(2, way="exchanged")
    train(engine, rank, 1)
    before, inner = flat(engine), Route.open

    def short(self: Route) -> tuple[Tensor, Tensor]:
        if rank == 1:
            raise MemoryError("there is none")
        return inner(self)

    Route.open = short  # type: ignore[method-assign]
    try:
        error = caught(lambda: train(engine, rank, 1, 1))
    finally:
        Route.open = inner  # type: ignore[method-assign]
    same = torch.equal(flat(engine), before)
    train(engine, rank, 1, 2)
    keep(engine)
    return [error, same, torch.equal(flat(engine), before)]


def test_a_rank_without_memory_for_it_refuses_the_step_for_all() -> None:
    for error, same, after in ranks.shared(2, lacks_memory):
        assert_told(error, StepError, "rank 1: MemoryError: there is none")
        assert same and not after


# ---- checkpoints as files


def saves(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    engine = engine_of(2, way="exchanged", bf16={"enabled": True})
    train(engine, rank)
    write(engine, rank, 2)
    engine.save_checkpoint(folder, tag="end")
    names = [name for name, _ in engine.module.named_parameters()]
    masters = [safe_get_full_fp32_param(p) for p in engine.module.parameters()]
    keep(engine)
    return {n: m for n, m in zip(names, masters, strict=True) if m is not None}


def test_fp32_weights_of_a_checkpoint_are_the_owners_masters(tmp_path: Path) -> None:
    expected = ranks.shared(2, saves, str(tmp_path))[0]
    found = zerort.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
        str(tmp_path), tag="end"
    )
    for name, master in expected.items():
        assert torch.equal(found[name], master), name
