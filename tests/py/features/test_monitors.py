"""Monitors: what rank 0 writes at each boundary, and which losses count."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ranks
from catching import assert_told, caught
from logged import log_lines
from monitored import (
    BOTH,
    CSV,
    FROZEN,
    LOSS,
    LR,
    SCALE,
    Noted,
    Scaled,
    engine_over,
    micro,
    monitored,
    needs_tensorboard,
    scalars,
    values,
    window,
)
from training import at_stage, keep
from zerort.errors import StepError
from zerort.features.monitors.reporting import Monitored

pytestmark = needs_tensorboard

NAMED = {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


# ---- What is written, on one rank and on two, with a checkpoint in the middle.

VARIANTS = [(0, 1), (0, 3), (2, 1), (2, 3), (3, 3)]


def train_and_resume(
    rank: int, world: int, folder: str, variants: Sequence[tuple[int, int]]
) -> list[Any]:
    """Each rank works in a folder of its own, so that what it writes is found there. Returns the
    losses of the windows, for each variant.
    """
    found = []
    for stage, gas in variants:
        name = f"{stage}-{gas}"
        os.makedirs(os.path.join(folder, name, str(rank)))
        os.chdir(os.path.join(folder, name, str(rank)))
        draw = torch.Generator().manual_seed(rank)
        config = {"gradient_accumulation_steps": gas, **BOTH, **at_stage(stage)}
        engine = engine_over(config, **NAMED)
        assert engine.monitor.enabled
        losses = [window(engine, draw) for _ in range(3)]
        engine.save_checkpoint(os.path.join(folder, name, "saved"))
        engine.destroy()
        engine = engine_over(config, **NAMED)
        engine.load_checkpoint(os.path.join(folder, name, "saved"))
        losses += [window(engine, draw) for _ in range(2)]
        engine.monitor.write_events([("Validation loss", torch.tensor(rank + 0.5), 7)])
        keep(engine)
        found.append(losses)
    return found


@pytest.fixture(scope="module", params=[1, 2])
def trained(request: Any, tmp_path_factory: Any) -> tuple[Path, int, Any]:
    folder = tmp_path_factory.mktemp("monitored")
    return folder, request.param, ranks.run(request.param, train_and_resume, str(folder), VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_rank_0_writes_each_boundary_and_a_resumed_run_goes_on(
    trained: tuple[Path, int, Any], variant: tuple[int, int]
) -> None:
    folder, world, found = trained
    stage, gas = variant
    here = folder / f"{stage}-{gas}"
    losses = found[0][VARIANTS.index(variant)]
    samples = [2 * gas * world * (i + 1) for i in range(5)]
    means = [sum(each) / gas for each in losses]
    assert len(losses) == 5 and all(len(each) == gas for each in losses)
    wanted = {
        LOSS: means,
        LR: [0.5**power for power in range(2, 7)],  # after the scheduler
    }
    for name, expected in wanted.items():
        for read in (values, scalars):
            steps, got = zip(*read(here / "0" / "job", name), strict=True)
            assert list(steps) == samples, read
            assert list(got) == pytest.approx(expected, rel=1e-6), read
    assert (here / "0" / "job" / "Validation_loss.csv").read_text() == (
        "step,Validation loss\n7,0.5\n"
    )
    assert not (here / "0" / "job" / "Train_Samples_loss_scale.csv").exists()


def test_other_ranks_write_nothing(trained: tuple[Path, int, Any]) -> None:
    folder, world, _ = trained
    for rank in range(1, world):
        for stage, gas in VARIANTS:
            assert list((folder / f"{stage}-{gas}" / str(rank)).iterdir()) == []


# ---- The loss scale, and steps that are skipped.


def test_a_skipped_step_is_written_with_the_scale_after_it(tmp_path: Path) -> None:
    config = {
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "a"},
        "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "auto_cast": True},
    }
    engine = engine_over(config)
    window(engine)
    engine.backward(engine(torch.full((2, 4), float("inf"))).float().sum())
    engine.step()
    assert engine.skipped_steps == 1
    window(engine)
    keep(engine)
    assert values(tmp_path / "a", SCALE) == [(2, 16.0), (4, 8.0), (6, 8.0)]
    assert [step for step, _ in values(tmp_path / "a", LR)] == [2, 4, 6]
    losses = values(tmp_path / "a", LOSS)
    assert [step for step, _ in losses] == [2, 4, 6] and losses[1][1] not in (losses[0][1], 0.0)


def with_a_folder_of_its_own(rank: int, world: int, folder: str) -> None:
    """As scripts do that name a folder by the time, or turn monitors on where rank is 0."""
    os.chdir(folder)
    name = f"at {rank} seconds"
    section = {"enabled": rank == 0, "output_path": name, "job_name": "job"}
    engine = engine_over({"csv_monitor": section, "tensorboard": {**section, "enabled": True}})
    window(engine)
    keep(engine)


def test_ranks_need_not_name_the_same_folder(tmp_path: Path) -> None:
    ranks.run(2, with_a_folder_of_its_own, str(tmp_path))
    assert [step for step, _ in values(tmp_path / "at 0 seconds" / "job", LR)] == [4]
    assert [path.name for path in tmp_path.iterdir()] == ["at 0 seconds"]


# ---- Which losses count.


def test_the_losses_of_a_failed_window_are_in_no_mean(monkeypatch: Any) -> None:
    noted = Noted()
    engine = monitored(monkeypatch, noted, config=FROZEN, model=Scaled())
    micro(engine, 1.0)
    micro(engine, 3.0)
    micro(engine, 100.0)

    def interfere(grad: Tensor) -> None:
        raise RuntimeError("not this one")

    loss = engine(50.0)
    loss.register_hook(interfere)
    with pytest.raises(RuntimeError, match="not this one"):
        engine.backward(loss)
    engine.step()  # the window has ended with its failure
    micro(engine, 5.0)
    micro(engine, 7.0)
    keep(engine)
    assert noted.of(LOSS) == pytest.approx([2.0, 6.0], rel=1e-3)


def test_the_losses_that_zero_grad_drops_are_in_no_mean(monkeypatch: Any) -> None:
    noted = Noted()
    engine = monitored(monkeypatch, noted, config=FROZEN, model=Scaled())
    micro(engine, 100.0)
    engine.zero_grad()
    micro(engine, 3.0)
    keep(engine)
    assert noted.of(LOSS) == pytest.approx([3.0], rel=1e-3)


def fail_on_the_other_rank(rank: int, world: int, folder: str) -> Any:
    os.chdir(folder)
    engine = engine_over({**CSV, **FROZEN}, Scaled())
    micro(engine, 100.0)
    loss = engine(100.0)
    if rank == 1:
        loss.register_hook(lambda grad: 1 / 0)
    told = caught(lambda: (engine.backward(loss), engine.step()))
    if rank == 1:
        engine.step()
    micro(engine, 1.0)
    micro(engine, 2.0)
    keep(engine)
    return told


def test_a_window_that_fails_on_another_rank_leaves_no_loss_behind(tmp_path: Path) -> None:
    told, _ = ranks.run(2, fail_on_the_other_rank, str(tmp_path))
    assert_told(told, StepError, "rank 1")
    assert values(tmp_path / "job", LOSS) == [(8, pytest.approx(1.5, rel=1e-3))]


def run_out_first(rank: int, world: int, folder: str) -> None:
    os.chdir(folder)
    engine = engine_over(CSV, Scaled())
    with engine.join():
        for value in [1.0] if rank == 0 else [1.0, 2.0, 3.0]:
            micro(engine, value)
    keep(engine)


def test_rank_0_reports_steps_for_which_it_has_no_data_left(tmp_path: Path) -> None:
    ranks.run(2, run_out_first, str(tmp_path))
    assert [step for step, _ in values(tmp_path / "job", LR)] == [4, 6, 8]
    assert values(tmp_path / "job", LOSS) == [(4, 1.0)]


class Reads(TorchDispatchMode):
    """Counts what is read from a device, for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += fn is torch.ops.aten._local_scalar_dense.default
        return fn(*args, **(kwargs or {}))


def test_a_step_is_read_from_the_device_once_more_and_none_where_monitors_are_off(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)

    def reads(config: Any) -> int:
        engine = engine_over({"gradient_accumulation_steps": 3, **config}, Scaled())
        for _ in range(3):
            micro(engine, 1.0)
        with Reads() as reading:
            for _ in range(3):
                micro(engine, 1.0)
        keep(engine)
        return reading.count

    assert reads(BOTH) == reads({}) + 1


def test_a_loss_is_copied_and_its_graph_goes(monkeypatch: Any) -> None:
    noted = Noted()
    engine = monitored(monkeypatch, noted, config=FROZEN, model=Scaled())
    loss = engine(4.0)
    in_graph = Noted()
    loss.grad_fn.metadata["held"] = in_graph
    held = weakref.ref(in_graph)
    engine.backward(loss, retain_graph=True)
    engine.step()
    loss.detach().zero_()
    del loss, in_graph
    gc.collect()
    assert held() is None
    micro(engine, 4.0)
    keep(engine)
    assert noted.of(LOSS) == pytest.approx([4.0], rel=1e-3)


def test_a_loss_that_the_engine_is_never_handed_is_not_seen_but_the_rate_is(
    monkeypatch: Any,
) -> None:
    noted = Noted()
    engine = monitored(monkeypatch, noted, model=Scaled())
    engine(1.0).backward()
    engine.step()
    keep(engine)
    assert [event[0] for event in noted.events] == [LR] and noted.of(LR) == [0.5]


def directly(engine: Any, loss: float) -> None:
    engine.scale(engine(loss)).backward()


def two_in_a_row(engine: Any, loss: float) -> None:
    for each in (loss - 1.0, loss + 1.0):
        engine.scale(engine(each), scale_wrt_gas=False).backward()


def two_in_one(engine: Any, loss: float) -> None:
    first = engine.scale(engine(loss / 4))
    (first + engine.scale(engine(loss * 3 / 4))).backward()


def one_of_two(engine: Any, loss: float) -> None:
    given = engine(loss)
    for _ in range(2):
        scaled = engine.scale(given)
    scaled.backward()


def beside_one_that_has_no_backward(engine: Any, loss: float) -> None:
    engine.scale(engine(1000.0))
    directly(engine, loss)


def of_the_module_itself(engine: Any, loss: float) -> None:
    engine.scale(engine.module(loss)).backward()


def twice_over_one_graph(engine: Any, loss: float) -> None:
    scaled = engine.scale(engine(loss))
    scaled.backward(retain_graph=True)
    scaled.backward()


def within_no_sync_first(engine: Any, loss: float) -> None:
    with engine.no_sync():
        directly(engine, loss)
    directly(engine, loss)


WAYS = [
    directly,
    two_in_a_row,
    two_in_one,
    one_of_two,
    beside_one_that_has_no_backward,
    of_the_module_itself,
    twice_over_one_graph,
    within_no_sync_first,
]


@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_loss_that_was_scaled_counts_where_its_backward_ran(
    monkeypatch: Any, way: Any, gas: int
) -> None:
    noted, half = Noted(), {"fp16": {"enabled": True, "loss_scale": 4.0}}
    config = {**FROZEN, **half, "gradient_accumulation_steps": gas}
    engine = monitored(monkeypatch, noted, config=config, model=Scaled())
    for base in (8.0, 16.0):
        for index in range(gas):
            way(engine, base + 4 * index)
            engine.step()
    keep(engine)
    assert noted.of(LOSS) == [8.0 + 2 * (gas - 1), 16.0 + 2 * (gas - 1)]


def test_scaled_losses_of_a_failed_or_a_dropped_window_are_in_no_mean(monkeypatch: Any) -> None:
    noted = Noted()
    engine = monitored(monkeypatch, noted, config=FROZEN, model=Scaled())
    directly(engine, 100.0)
    engine.step()
    loss = engine(50.0)
    loss.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.scale(loss).backward()
    with pytest.raises(StepError, match="backward"):
        engine.step()
    directly(engine, 100.0)
    engine.zero_grad()
    for value in (5.0, 7.0):
        directly(engine, value)
        engine.step()
    keep(engine)
    assert noted.of(LOSS) == pytest.approx([6.0], rel=1e-3)


# ---- What other features read.


def test_readings_of_other_features_are_written_and_one_that_raises_is_said_once(
    monkeypatch: Any,
) -> None:
    noted, lines = Noted(), log_lines()
    engine = monitored(monkeypatch, noted, model=Scaled())
    shown: list[Any] = [("Train/Samples/elapsed_time_ms_step", 1.5)]
    other = engine._events.features[-1]
    monkeypatch.setattr(type(other), "readings", lambda self: shown)
    micro(engine, 1.0)
    assert ("Train/Samples/elapsed_time_ms_step", 1.5, 2) in noted.events

    def refuse(self: Any) -> Any:
        raise RuntimeError("no reading")

    monkeypatch.setattr(type(other), "readings", refuse)
    micro(engine, 1.0)
    micro(engine, 1.0)
    assert engine.global_steps == 3
    assert len([line for line in lines if "raised RuntimeError: no reading" in line]) == 1
    monkeypatch.undo()
    micro(engine, 1.0)
    keep(engine)
    assert [event.step for event in noted.events if event.name == LR] == [2, 8]


def test_elapsed_times_are_written_with_wall_clock_breakdown(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = engine_over({**CSV, "wall_clock_breakdown": True, "gradient_accumulation_steps": 3})
    for _ in range(2):
        window(engine)
    keep(engine)
    elapsed = "Train/Samples/elapsed_time_ms_"
    took = {
        name: values(tmp_path / "job", elapsed + name)
        for name in ("forward", "backward", "backward_inner", "backward_allreduce", "step")
    }
    for found in took.values():
        assert [step for step, _ in found] == [6, 12] and all(each >= 0 for _, each in found)
    assert all(each > 0 for _, each in took["forward"] + took["backward"] + took["step"])
    assert len(list((tmp_path / "job").iterdir())) == 2 + len(took)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_eigenvalues_are_written_where_they_were_computed(monkeypatch: Any) -> None:
    noted = Noted()
    section = {
        "enabled": True,
        "layer_name": "layers",
        "layer_num": 2,
        "gas_boundary_resolution": 2,
        "max_iter": 3,
    }
    config = {"eigenvalue": section, "gradient_accumulation_steps": 3}
    engine = monitored(monkeypatch, noted, config=config, model=Layers())
    losses = [window(engine) for _ in range(4)]
    keep(engine)
    for block in range(2):
        name = f"Train/Eigenvalues/ModelBlockParam_{block}"
        assert [event.step for event in noted.events if event.name == name] == [12, 24]
    assert noted.of(LOSS) == pytest.approx([sum(each) / 3 for each in losses])


# ---- The door.


def test_without_a_monitor_events_are_taken_and_nothing_happens(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = engine_over({"tensorboard": {"output_path": "x"}, "csv_monitor": {"enabled": False}})
    assert not engine.monitor.enabled
    engine.monitor.write_events([("a", object(), None)])
    window(engine)
    keep(engine)
    assert list(tmp_path.iterdir()) == []
    assert engine._events.find(Monitored) is None


def test_numbers_and_tensors_are_written_and_what_is_none_is_named_once(monkeypatch: Any) -> None:
    noted, lines = Noted(), log_lines()
    engine = monitored(monkeypatch, noted)
    given: list[Any] = [
        ("int", 1, 3),
        ("tensor", torch.tensor(2.5, requires_grad=True), 3),
        ("half", torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor(3)),
        ("text", "much", 3),
        ("text", "more", 4),
        ("many", torch.ones(2), 3),
        ("short",),
    ]
    engine.monitor.write_events(event for event in given)
    keep(engine)
    assert noted.events == [("int", 1.0, 3), ("tensor", 2.5, 3), ("half", 0.5, 3)]
    told = [line for line in lines if "expected (name, number, samples)" in line]
    assert len(told) == 3


# ---- Weights.


def test_monitors_change_no_weight(tmp_path: Path, monkeypatch: Any) -> None:
    """A twin without them, to the bit."""
    monkeypatch.chdir(tmp_path)

    def weights(config: Any) -> Tensor:
        torch.manual_seed(0)
        engine = engine_over({**config, **at_stage(2), "gradient_accumulation_steps": 3})
        for _ in range(3):
            window(engine)
        keep(engine)
        return engine.module.weight.detach().clone()

    assert torch.equal(weights(BOTH), weights({}))
