"""AMP: a level trains as what it stands for, to the bit, with batch norms in fp32 where the module
is cast; the loss scale moves by Apex's rules, once for all ranks, and comes back from a checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ranks
import zerort
from cases import momentum, regress
from logged import log_lines
from models import WIDTH, Terms
from reference import MICRO_BATCH, Case, Moment
from terms import engine_over_terms, step_with, weights
from training import (
    Config,
    assert_near,
    at_stage,
    config_of,
    engine_for,
    keep,
    take_step,
    train_all,
)
from training import weights as all_weights
from zerort.errors import StepError
from zerort.step import precision

every_stage = pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
HUGE = 60000.0  # a gradient that overflows fp16 as soon as it is scaled
SHORT = 2
"""Clean steps after which the scale grows in these tests."""


def amp(level: str, **keys: Any) -> Config:
    return {"amp": {"enabled": True, "opt_level": level, **keys}}


TWINS: dict[str, tuple[Config, Config]] = {
    "O0": (amp("O0"), {}),
    "O1": (amp("O1"), {"torch_autocast": {"enabled": True, "dtype": "fp16"}}),
    "O2": (
        amp("O2", loss_scale=256),
        {"fp16": {"enabled": True, "auto_cast": True, "loss_scale": 256}},
    ),
    "O2 with its own scale": (
        amp("O2", max_loss_scale=1024),
        {"fp16": {"enabled": True, "auto_cast": True, "initial_scale_power": 10}},
    ),
    "O4": (amp("O4"), {"torch_autocast": {"enabled": True, "dtype": "bf16"}}),
    "O5": (amp("O5"), {"bf16": {"enabled": True}}),
}
"""A level, and what it is without batch norms."""


@ranks.once(maxsize=None)
def digests(world: int, gas: int) -> list[list[str]]:
    variants = [
        {**config, **at_stage(stage)}
        for pair in TWINS.values()
        for config in pair
        for stage in STAGES
    ]
    return ranks.shared(world, train_all, "mlp", gas, variants)


STAGES = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("world", "gas"),
    [(2, 3), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((1, 3), (2, 1)))],
)
@pytest.mark.parametrize("name", TWINS)
def test_a_level_trains_as_what_it_stands_for_to_the_bit(name: str, world: int, gas: int) -> None:
    first = 2 * len(STAGES) * list(TWINS).index(name)
    for found in digests(world, gas):
        level, twin = (found[first + half * len(STAGES) :][: len(STAGES)] for half in (0, 1))
        assert level == twin


# ---- batch norms


class Normed(nn.Sequential):
    """Two layers with a batch norm between them; remembers what it was given and has returned."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.BatchNorm1d(2 * WIDTH),
            nn.Tanh(),
            nn.Linear(2 * WIDTH, WIDTH),
        )
        self.seen: tuple[torch.dtype, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        self.seen = x.dtype, y.dtype
        return y


NORMED = Case(Normed, regress, optimizer=momentum)
NORMS = {f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}


def _train_normed(rank: int, world: int, gas: int, configs: list[Config]) -> list[Any]:
    found = []
    for config in configs:
        engine = engine_for(NORMED, config_of(NORMED, gas, config))
        for step in range(NORMED.steps):
            take_step(engine, NORMED, rank, step, gas)
        output = engine(torch.zeros(2, WIDTH))
        buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
        found.append(({**all_weights(engine), **buffers}, engine.module.seen, output.dtype))
        keep(engine)
    return found


def _by_hand(gas: int, world: int, scale: float) -> nn.Module:
    """What O2 says, in plain torch: fp16 layers over fp32 masters, and a batch norm in fp32."""
    module = NORMED.seeded_model()
    masters = {p: p.detach().clone() for p in module.parameters()}
    for layer in (module[0], module[3]):
        layer.half()
    optimizer = momentum(list(masters.values()))
    for step in range(NORMED.steps):
        sums = {p: torch.zeros_like(master) for p, master in masters.items()}
        for rank in range(world):
            for micro in range(gas):
                inputs, targets = Moment(rank, step, micro).randn(2, MICRO_BATCH, WIDTH)
                loss = (module(inputs.half()).float() - targets).square().mean()
                (loss / gas * scale).backward()
                for p in masters:
                    sums[p] += p.grad.float() / world / scale
                    p.grad = None
        for p, master in masters.items():
            master.grad = sums[p]
        optimizer.step()
        for p, master in masters.items():
            p.data.copy_(master)
    return module


@ranks.once(maxsize=None)
def normed(gas: int) -> list[list[Any]]:
    configs = [{**amp("O2", loss_scale=64), **at_stage(stage)} for stage in STAGES]
    return ranks.shared(2, _train_normed, gas, configs)


@every_stage
@pytest.mark.parametrize("gas", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_o2_keeps_batch_norms_in_fp32_and_trains_like_it_by_hand(stage: int, gas: int) -> None:
    twin = dict(_by_hand(gas, 2, 64.0).named_parameters())
    for found in normed(gas):
        tensors, seen, output = found[stage]
        assert seen == (torch.float16, torch.float16) and output == torch.float32
        for name, tensor in tensors.items():
            wide = torch.float32 if name in NORMS else torch.float16
            assert tensor.dtype == (torch.int64 if name.endswith("tracked") else wide)
        for name, truth in twin.items():
            # a gradient on an fp16 wire is rounded once more, which momentum carries on
            assert_near(tensors[name].float(), truth.float(), name, tolerance=1e-3)


def test_batch_norms_are_cast_where_that_is_asked_for() -> None:
    ((found,),) = ranks.shared(1, _train_normed, 1, [amp("O2", keep_batchnorm_fp32=False)])
    floats = [tensor for tensor in found[0].values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float16}


def _born(rank: int, world: int) -> dict[str, torch.dtype]:
    """Of a model that is made in parts, whose norm has values that fp16 has not."""
    config = config_of(NORMED, 1, {**amp("O2"), **at_stage(3)})
    with zerort.zero.Init(config_dict_or_path=config):
        module = Normed()
    with zerort.zero.GatheredParameters([module[1].weight], modifier_rank=0):
        module[1].weight.data.fill_(1 + 2.0**-20)
    engine, *_ = zerort.initialize(
        model=module, optimizer=momentum(module.parameters()), config=config
    )
    after = all_weights(engine)
    assert after["1.weight"].max() == 1 + 2.0**-20
    return {name: tensor.dtype for name, tensor in after.items()}


def test_a_batch_norm_that_is_born_sharded_stays_in_fp32() -> None:
    expected = {
        name: torch.float32 if name in NORMS else torch.float16
        for name, _ in Normed().named_parameters()
    }
    assert ranks.shared(2, _born) == [expected] * 2


# ---- the loss scale


def _scales(rank: int, world: int, gas: int) -> list[list[Any]]:
    """By stage: an overflow on rank 1 in the first window, then clean ones."""
    precision._APEX_WINDOW = SHORT
    found = []
    for stage in STAGES:
        model = Terms()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
        config = {**amp("O2", max_loss_scale=2.0**9), **at_stage(stage)}
        engine = engine_over_terms(
            config, gas, model=model, optimizer=optimizer, lr_scheduler=rates
        )
        seen: list[Any] = []
        for window in range(6):
            for micro in range(gas):
                overflows = (rank, window, micro) == (1, 0, 0)
                after = step_with(engine, HUGE if overflows else 1.0, 1.0)
            seen.append((engine.loss_scale, after[0], engine.skipped_steps))
        found.append([*seen, rates.last_epoch, round(engine.get_global_grad_norm(), 2)])
        keep(engine)
    return found


@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_overflow_on_one_rank_halves_once_on_all_and_growth_ends_at_the_maximum(
    gas: int, world: int
) -> None:
    if world == 1:
        expected: list[Any] = [(512.0, -1.0 - step, 0) for step in range(6)]
        steps = 6
    else:
        expected = [(256.0, 0.0, 1), (256.0, -1.0, 1), (512.0, -2.0, 1)]
        expected += [(512.0, -3.0 - step, 1) for step in range(3)]
        steps = 5
    every = [[*expected, steps, round(8**0.5, 2)]] * len(STAGES)
    assert ranks.shared(world, _scales, gas) == [every] * world


def _overflow_at_the_minimum(rank: int, world: int) -> list[tuple[float, int]]:
    engine = engine_over_terms(amp("O1", max_loss_scale=4.0, min_loss_scale=2.0))
    found = []
    for coefficient in (float("inf"), float("inf"), float("nan"), 1.0):
        step_with(engine, coefficient if rank == 1 else 1.0, 1.0)
        found.append((engine.loss_scale, engine.skipped_steps))
    assert weights(engine) == (-1.0, -1.0)
    return found


def test_an_overflow_at_the_minimum_is_no_error() -> None:
    expected = [(2.0, 1), (2.0, 2), (2.0, 3), (2.0, 3)]
    assert ranks.shared(2, _overflow_at_the_minimum) == [expected] * 2


def _resumed(rank: int, world: int, folder: str, gas: int) -> list[Any]:
    """By stage: a run, and one that was saved within its window of clean steps and loaded."""
    precision._APEX_WINDOW = SHORT
    found = []
    for stage in STAGES:
        config = config_of(NORMED, gas, {**amp("O2", max_loss_scale=64.0), **at_stage(stage)})
        engine = engine_for(NORMED, config)
        engine._parts.precision.loss_scale.update(True)
        ends = []
        for step in range(4):
            take_step(engine, NORMED, rank, step, gas)
            ends.append(engine.loss_scale)
            if step == 0:
                engine.save_checkpoint(folder, tag=f"stage{stage}")
        again = engine_for(NORMED, config)
        again.load_checkpoint(folder, tag=f"stage{stage}")
        ends_again = [again.loss_scale]
        for step in range(1, 4):
            take_step(again, NORMED, rank, step, gas)
            ends_again.append(again.loss_scale)
        same = all(
            torch.equal(a, b)
            for a, b in zip(all_weights(engine).values(), all_weights(again).values(), strict=True)
        )
        found.append((ends, ends_again, same))
        keep(engine)
        keep(again)
    return found


@pytest.mark.parametrize("gas", [1, 3])
def test_a_resumed_run_goes_on_with_scale_and_count(tmp_path: Path, gas: int) -> None:
    scales = [32.0, 64.0, 64.0, 64.0]
    for found in ranks.shared(2, _resumed, str(tmp_path), gas):
        assert found == [(scales, scales, True)] * len(STAGES)


def _go_back_directly(rank: int, world: int) -> tuple[float, ...]:
    engine = engine_over_terms(amp("O2", loss_scale=16))
    with pytest.raises(StepError, match=r"engine\.scale\(loss\)"):
        engine(1.0, 2.0).backward()
    engine.scale(engine(1.0, 2.0)).backward()
    engine.step()
    return weights(engine)


def test_scale_and_a_direct_backward_are_as_with_fp16() -> None:
    assert ranks.shared(2, _go_back_directly) == [(-1.0, -2.0)] * 2


# ---- Apex


def _lines_beside(rank: int, world: int, folder: str, config: Config) -> list[str]:
    sys.path.insert(0, folder)
    lines = log_lines()
    keep(engine_over_terms(config))
    assert "apex" not in sys.modules
    return [line for line in lines if "apex" in line]


@pytest.mark.parametrize("files", [[], ["apex.py"], ["apex/__init__.py"]])
def test_without_apex_amp_one_line_says_that_it_is_not_used(
    tmp_path: Path, files: list[str]
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("raise ImportError('another package')")
    first, second = ranks.shared(2, _lines_beside, str(tmp_path), amp("O1"))
    assert second == [] and len(first) == 1
    assert "O1 is done by torch's own means" in first[0] and "installed" not in first[0]


@pytest.mark.parametrize(("config", "count"), [(amp("O2"), 1), ({"fp16": {"enabled": True}}, 0)])
def test_apex_is_found_and_not_imported(tmp_path: Path, config: Config, count: int) -> None:
    (tmp_path / "apex" / "amp").mkdir(parents=True)
    for part in ("apex", "apex/amp"):
        (tmp_path / part / "__init__.py").write_text("raise RuntimeError('imported')")
    (lines,) = ranks.shared(1, _lines_beside, str(tmp_path), config)
    assert len(lines) == count and all(
        "apex.amp, though installed, is not" in line for line in lines
    )
