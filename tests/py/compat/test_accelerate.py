"""Accelerate's flow with a DeepSpeedPlugin, on two ranks: what people call, in their order, and
the numbers of a plain DistributedDataParallel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import doors
import ranks

STEPS, ACCUMULATION, CLIP, LR = 4, 2, 0.05, 0.01
CASES = [
    pytest.param(2, "fp32"),
    pytest.param(3, "bf16"),
    *(
        pytest.param(stage, precision, marks=pytest.mark.slow)
        for stage in range(4)
        for precision in ("fp32", "bf16")
        if (stage, precision) not in ((2, "fp32"), (3, "bf16"))
    ),
]
Numbers = dict[str, Any]

DEEPSPEEDS = {
    "losses": [
        0.7084391117095947,
        0.5514616966247559,
        0.7758514285087585,
        0.6663184762001038,
        0.6210948824882507,
        0.5590367317199707,
        0.5790903568267822,
        0.6140003204345703,
    ],
    "norms": [0.714817225933075, 0.9793204069137573, 0.6978254914283752, 0.5512368679046631],
}
"""Of rank 0, in fp32 at stage 2, by DeepSpeed 0.19.8 in this very flow (torch 2.15, Accelerate
1.15).
"""


def loss_of(model: nn.Module, batch: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0].to(dtype)).float(), batch[1])


def plain(rank: int, world: int) -> Numbers:
    """The same training, by hand."""
    model = nn.parallel.DistributedDataParallel(doors.net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    data = doors.rows(STEPS * ACCUMULATION * doors.BATCH * world)
    losses, norms = [], []
    for step in range(STEPS):
        for micro in range(ACCUMULATION):
            batch = doors.micro_batch(data, step * ACCUMULATION + micro)
            loss = loss_of(model, batch, torch.float32)
            (loss / ACCUMULATION).backward()
            losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "weights": model.module.state_dict()}


class Flow:
    """One run on one rank; each method is a part of what people do with an Accelerator."""

    def __init__(self, stage: int, precision: str, folder: str) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin

        self.stage, self.folder = stage, Path(folder)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.found: Numbers = {}
        plugin = DeepSpeedPlugin(
            hf_ds_config=doors.settings(
                stage,
                precision,
                gradient_clipping=CLIP,
                **{
                    "zero_optimization": {
                        "stage": stage,
                        "stage3_gather_16bit_weights_on_model_save": True,
                        "stage3_param_persistence_threshold": 20,
                    }
                },
            ),
            gradient_accumulation_steps=ACCUMULATION,
        )
        self.accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision=None)
        self.data = doors.rows(STEPS * ACCUMULATION * doors.BATCH * dist.get_world_size())
        model, rows = doors.net(), torch.utils.data.TensorDataset(*self.data)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        loader = torch.utils.data.DataLoader(rows, batch_size=doors.BATCH)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, optimizer, loader, schedule
        )

    def train(self) -> None:
        self.model.train()
        self.found["losses"], self.found["norms"], self.found["skipped"] = [], [], []
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = loss_of(self.model, batch, self.dtype)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                    self.found["norms"].append(float(norm))
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self.found["losses"].append(loss.item())
            self.found["skipped"].append(self.optimizer.step_was_skipped)

    def once(self, factor: float = 1.0) -> float:
        """One window of gradients."""
        for micro in range(ACCUMULATION):
            with self.accelerator.accumulate(self.model):
                batch = doors.micro_batch(self.data, micro)
                loss = loss_of(self.model, batch, self.dtype) * factor
                self.accelerator.gradient_state._set_sync_gradients(micro + 1 == ACCUMULATION)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.schedule.step()
        return loss.item()

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole, on every rank."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            state = self.model.module.state_dict()
            return {name: value.float().clone() for name, value in state.items()}

    def look_around(self) -> None:
        import deepspeed

        engine, accelerator = self.model, self.accelerator
        self.found["class"] = type(engine) is deepspeed.DeepSpeedEngine
        self.found["unwrapped"] = type(accelerator.unwrap_model(engine)).__name__
        self.found["config"] = engine.config.get("zero_optimization", {}).get("stage")
        self.found["parameters"] = [
            parameter.ds_numel if hasattr(parameter, "ds_id") else None
            for parameter in engine.module.parameters()
        ]
        self.found["stage"] = engine.zero_optimization_stage()
        self.found["optimizer"] = [
            isinstance(engine.optimizer, torch.optim.Optimizer),
            engine.optimizer.optimizer is engine.optimizer,
            self.schedule.scheduler.optimizer is engine.optimizer,
            isinstance(engine.optimizer, deepspeed.DeepSpeedOptimizer),
            engine.optimizer.needs_scaler(),
            engine.optimizer.loss_scale,
        ]
        state = accelerator.get_state_dict(engine)
        self.found["state_dict"] = None if state is None else {n: v.shape for n, v in state.items()}
        self.found["optimizer_state"] = sorted(self.optimizer.state_dict())
        self.model.eval()
        with torch.no_grad():
            outputs = self.model(doors.micro_batch(self.data, 0)[0].to(self.dtype))
        self.found["gathered"] = tuple(accelerator.gather_for_metrics(outputs).shape)
        self.model.train()

    def save_and_resume(self) -> None:
        accelerator, place = self.accelerator, str(self.folder / "state")
        accelerator.save_state(place)
        first, steps, rate = self.weights(), self.model.global_steps, self.schedule.get_last_lr()
        self.once()
        expected = self.weights()
        accelerator.load_state(place)
        self.found["restored"] = same(self.weights(), first)
        self.found["restored_steps"] = self.model.global_steps == steps
        self.found["restored_rate"] = self.schedule.get_last_lr() == rate
        self.once()
        self.found["resumed"] = same(self.weights(), expected)
        accelerator.save_state(place)  # the same folder again
        accelerator.save_model(self.model, str(self.folder / "model"))
        accelerator.wait_for_everyone()
        from safetensors.torch import load_file

        saved = load_file(self.folder / "model" / "model.safetensors")
        self.found["saved"] = same({n: v.float() for n, v in saved.items()}, self.weights())

    def overflow(self) -> None:
        before = self.weights(), self.schedule.scheduler.last_epoch
        self.once(float("inf"))
        self.found["overflow"] = [
            self.optimizer.step_was_skipped,
            same(self.weights(), before[0]),
            self.schedule.scheduler.last_epoch == before[1],
            self.model.skipped_steps,
        ]
        self.once()
        self.found["after"] = [
            self.optimizer.step_was_skipped,
            not same(self.weights(), before[0]),
            self.schedule.scheduler.last_epoch > before[1],
        ]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def through_accelerate(rank: int, world: int, stage: int, precision: str, folder: str) -> Numbers:
    doors.enter(rank, world)
    flow = Flow(stage, precision, folder)
    flow.train()
    flow.found["weights"] = flow.weights()
    flow.look_around()
    flow.save_and_resume()
    flow.overflow()
    return flow.found


@pytest.fixture(scope="module")
def by_hand() -> Numbers:
    return ranks.run(2, plain)[0]


@ranks.once(None)
def flows(stage: int, precision: str, folder: str) -> list[Numbers]:
    return ranks.run(2, through_accelerate, stage, precision, folder, timeout=150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accelerate")


@pytest.fixture
def found(stage: int, precision: str, folder: Path) -> list[Numbers]:
    place = folder / f"{stage}-{precision}"
    place.mkdir(exist_ok=True)
    return flows(stage, precision, str(place))


pytestmark = [doors.needs("accelerate"), pytest.mark.parametrize(("stage", "precision"), CASES)]


def test_losses_norms_and_weights_are_those_of_ddp(
    found: list[Numbers], by_hand: Numbers, precision: str
) -> None:
    near = {"rtol": 1e-5, "atol": 1e-6} if precision == "fp32" else {"rtol": 5e-2, "atol": 2e-2}
    torch.testing.assert_close(found[0]["losses"], by_hand["losses"], **near)
    torch.testing.assert_close(found[0]["norms"], by_hand["norms"], **near)
    torch.testing.assert_close(found[0]["weights"], by_hand["weights"], **near)
    assert found[0]["skipped"] == [False] * (STEPS * ACCUMULATION)


def test_losses_and_norms_are_those_of_deepspeed(found: list[Numbers], precision: str) -> None:
    near = {"rtol": 1e-5, "atol": 1e-6} if precision == "fp32" else {"rtol": 5e-2, "atol": 2e-2}
    for key, numbers in DEEPSPEEDS.items():
        torch.testing.assert_close(found[0][key], numbers, **near)


def test_ranks_hold_the_same_weights(found: list[Numbers]) -> None:
    assert same(found[0]["weights"], found[1]["weights"])


def test_the_engine_and_its_optimizer_are_what_parameter_for(
    found: list[Numbers], stage: int, precision: str
) -> None:
    one = found[0]
    assert one["class"]
    assert one["unwrapped"] == "Sequential"
    assert one["config"] == one["stage"] == stage
    assert one["parameters"] == ([128, 16, 64, 4] if stage == 3 else [None] * 4)
    assert one["optimizer"] == [True, True, True, True, False, 1.0]
    assert one["optimizer_state"] == ["param_groups", "state"]
    assert {name: tuple(shape) for name, shape in one["state_dict"].items()} == {
        "0.weight": (16, 8),
        "0.bias": (16,),
        "2.weight": (4, 16),
        "2.bias": (4,),
    }
    assert one["gathered"] == (2 * doors.BATCH, 4)


def test_a_state_is_saved_loaded_resumed_to_the_bit_and_saved_again(found: list[Numbers]) -> None:
    for one in found:
        assert one["restored"]
        assert one["restored_steps"]
        assert one["restored_rate"]
        assert one["resumed"]
        assert one["saved"]


def test_an_infinity_skips_the_step_and_the_schedule_waits(found: list[Numbers]) -> None:
    for one in found:
        assert one["overflow"] == [True, True, True, 1]
        assert one["after"] == [False, True, True]
