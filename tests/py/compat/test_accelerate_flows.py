"""What people do with an Accelerator beside one plain training: fp16 that overflows, a second
model, a second training, a file full of "auto", a plugin that asks for offloading.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import doors
import ranks

pytestmark = [
    pytest.mark.slow,
    doors.needs("accelerate"),
    pytest.mark.parametrize("stage", range(4)),
]

LR, SCALE = 0.01, 2.0**8
Numbers = dict[str, Any]


def accelerator(**plugin: Any) -> Any:
    """A new one; the process group stays."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    AcceleratorState._reset_state(reset_partial_state=False)
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(**plugin))


def file(stage: int, precision: str = "fp32", **zero: Any) -> dict[str, Any]:
    section = {"stage": stage, "stage3_param_persistence_threshold": 20, **zero}
    return doors.settings(stage, precision, zero_optimization=section)


def loader(steps: int = 4) -> torch.utils.data.DataLoader[Any]:
    data = doors.rows(steps * doors.BATCH * dist.get_world_size())
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), doors.BATCH)


def prepared(one: Any) -> tuple[Any, Any, Any, Any]:
    model = doors.net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)  # as DeepSpeedCPUAdam is
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    return one.prepare(model, optimizer, loader(), schedule)  # type: ignore[no-any-return]


def trained(
    one: Any,
    model: Any,
    optimizer: Any,
    batches: Any,
    schedule: Any,
    rates: list[float] | None = None,
) -> list[float]:
    """The losses of one pass over the batches; into `rates`, what the schedule says after each."""
    losses = []
    for inputs, targets in batches:
        outputs = model(inputs.to(next(model.parameters()).dtype)).float()
        loss = nn.functional.mse_loss(outputs, targets)
        one.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if rates is not None:
            rates += schedule.get_last_lr()
    return losses


def by_hand(rates: list[float], decay: float) -> list[float]:
    """The losses under DistributedDataParallel and AdamW, each step with a rate of its own."""
    model = nn.parallel.DistributedDataParallel(doors.net())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=decay)
    data = doors.rows(len(rates) * doors.BATCH * dist.get_world_size())
    losses = []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        inputs, targets = doors.micro_batch(data, step)
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(model: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: value.float().clone() for name, value in model.module.state_dict().items()}


def memory(model: nn.Module) -> int:
    """Bytes that this rank's parameters have memory for."""
    with torch._C.DisableTorchFunctionSubclass():
        return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())


# ---- the flows, on one rank


def plain(stage: int) -> Numbers:
    one = accelerator(hf_ds_config=file(stage))
    things = prepared(one)
    losses = trained(one, *things)
    weights = whole(things[0])
    one.free_memory()
    return {"losses": losses, "weights": weights}


def fp16(stage: int) -> Numbers:
    """Good steps, one whose gradients do not fit into half precision, good steps."""
    settings = file(stage, "fp16")
    settings["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    one = accelerator(hf_ds_config=settings)
    model, optimizer, batches, schedule = prepared(one)
    found: Numbers = {"precision": one.mixed_precision}
    found["losses"] = trained(one, model, optimizer, batches, schedule)
    before = whole(model)

    def step(factor: float) -> list[Any]:
        inputs, targets = next(iter(batches))
        loss = nn.functional.mse_loss(model(inputs.half()).float(), targets) * factor
        one.backward(loss)
        at = schedule.scheduler.last_epoch
        optimizer.step()
        schedule.step()
        return [
            optimizer.step_was_skipped,
            optimizer.optimizer.cur_scale,
            schedule.scheduler.last_epoch - at,
            all(torch.equal(value, before[name]) for name, value in whole(model).items()),
        ]

    found["overflow"], found["again"], found["good"] = step(1e6), step(1e6), step(1.0)
    found["skipped"] = model.skipped_steps
    one.free_memory()
    return found


def second_model(stage: int) -> Numbers:
    """Beside one that trains, one that only answers: as it is, and prepared as an engine."""
    settings = file(stage)
    settings["train_micro_batch_size_per_gpu"] = doors.BATCH
    one = accelerator(hf_ds_config=settings)
    model, optimizer, batches, schedule = prepared(one)
    inputs = doors.rows(doors.BATCH)[0]
    asked, expected = doors.net().eval(), doors.net()(inputs).detach()
    evaluated = one.prepare_model(asked, evaluation_mode=True)
    engine = one.prepare(doors.net().eval())
    found: Numbers = {}
    with torch.no_grad():
        found["answers"] = [torch.equal(each(inputs), expected) for each in (evaluated, engine)]
    found["losses"] = trained(one, model, optimizer, batches, schedule)
    with torch.no_grad():
        found["later"] = [torch.equal(each(inputs), expected) for each in (evaluated, engine)]
    found["memory"] = memory(engine.module), memory(asked)
    one.free_memory()
    return found


def twice(stage: int) -> Numbers:
    """`free_memory`, then all over again with the same Accelerator."""
    one = accelerator(hf_ds_config=file(stage))
    things = prepared(one)
    first = trained(one, *things)
    freed = one.free_memory(*things)
    things = prepared(one)
    found = {"freed": freed, "first": first, "second": trained(one, *things)}
    found["weights"] = whole(things[0])
    one.free_memory()
    return found


def auto(stage: int) -> Numbers:
    """Nothing in the file but "auto"; optimizer and schedule are dummies."""
    from accelerate.utils import DummyOptim, DummyScheduler

    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size")
    zero = dict.fromkeys((*sizes, "stage3_param_persistence_threshold"), "auto")
    settings = file(stage, **zero)
    rates = dict.fromkeys(("lr", "weight_decay"), "auto")
    ends = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
    settings["optimizer"] = {"type": "AdamW", "params": rates}
    settings["scheduler"] = {"type": "WarmupDecayLR", "params": dict.fromkeys(ends, "auto")}
    one = accelerator(hf_ds_config=settings)
    model: Any = doors.net()
    model.config = type("Config", (), {"hidden_size": 16})()
    dummy = DummyOptim(model.parameters(), lr=LR, weight_decay=0.02)
    schedule = DummyScheduler(dummy, total_num_steps=8, warmup_num_steps=2)
    things = one.prepare(model, dummy, loader(), schedule)
    group, seen = things[1].param_groups[0], [things[1].param_groups[0]["lr"]]
    losses = trained(one, *things, rates=seen)
    bucket = things[0].config["zero_optimization"]["reduce_bucket_size"]
    one.free_memory()
    kind = type(things[1].optimizer).__name__
    return {
        "losses": losses,
        "rates": seen,
        "by_hand": by_hand(seen[:-1], decay=0.02),
        "made": [kind, group["weight_decay"], bucket],
    }


def offloaded(stage: int) -> Numbers:
    """A plugin that asks for what a CPU has anyway."""
    one = accelerator(
        zero_stage=stage,
        offload_optimizer_device="cpu" if stage else "none",
        offload_param_device="cpu" if stage == 3 else "none",
        gradient_clipping=1.0,
    )
    things = prepared(one)
    losses = trained(one, *things)
    weights, section = whole(things[0]), things[0].config["zero_optimization"]
    one.free_memory()
    return {
        "losses": losses,
        "weights": weights,
        "asked": [section[key]["device"] for key in ("offload_optimizer", "offload_param")],
    }


FLOWS: tuple[Callable[[int], Numbers], ...] = (plain, fp16, second_model, twice, auto, offloaded)


def on_a_rank(rank: int, world: int, stage: int) -> dict[str, Numbers]:
    doors.enter(rank, world)
    return {flow.__name__: flow(stage) for flow in FLOWS}


@ranks.once(None)
def flows(stage: int) -> list[dict[str, Numbers]]:
    return ranks.run(2, on_a_rank, stage, timeout=150)


@pytest.fixture
def found(stage: int) -> list[dict[str, Numbers]]:
    return flows(stage)


# ---- what is true of them


def test_fp16_skips_an_overflow_and_lowers_its_scale(found: list[dict[str, Numbers]]) -> None:
    for one in found:
        mine = one["fp16"]
        assert mine["precision"] == "fp16"
        torch.testing.assert_close(mine["losses"], one["plain"]["losses"], rtol=1e-2, atol=5e-3)
        assert mine["overflow"] == [True, SCALE / 2, 0, True]
        assert mine["again"] == [True, SCALE / 4, 0, True]
        assert mine["good"] == [False, SCALE / 4, 2, False]  # by two: it counts processes
        assert mine["skipped"] == 2


def test_a_second_model_answers_while_the_first_trains(
    found: list[dict[str, Numbers]], stage: int
) -> None:
    for one in found:
        mine = one["second_model"]
        assert mine["answers"] == mine["later"] == [True, True]
        assert mine["losses"] == one["plain"]["losses"]
        held, of_whole = mine["memory"]
        assert held < of_whole if stage == 3 else held == of_whole


def test_after_free_memory_all_is_prepared_anew(found: list[dict[str, Numbers]]) -> None:
    for one in found:
        mine = one["twice"]
        assert mine["freed"] == [None] * 4
        assert mine["first"] == mine["second"] == one["plain"]["losses"]
        torch.testing.assert_close(mine["weights"], one["plain"]["weights"], rtol=0, atol=0)


def test_a_file_full_of_auto_is_filled_in(found: list[dict[str, Numbers]]) -> None:
    for one in found:
        mine = one["auto"]
        assert mine["made"] == ["AdamW", 0.02, 16 * 16]
        # 8 steps are 4 of each process, two up and two down; the first is taken twice
        assert mine["rates"] == pytest.approx([0.0, 0.0, LR, LR, LR / 2])
        assert mine["losses"] == pytest.approx(mine["by_hand"], rel=1e-5)


def test_offloading_on_a_cpu_changes_nothing(found: list[dict[str, Numbers]], stage: int) -> None:
    for one in found:
        mine = one["offloaded"]
        assert mine["asked"] == ["cpu" if stage else "none", "cpu" if stage == 3 else "none"]
        assert mine["losses"] == one["plain"]["losses"]
        torch.testing.assert_close(mine["weights"], one["plain"]["weights"], rtol=0, atol=0)
