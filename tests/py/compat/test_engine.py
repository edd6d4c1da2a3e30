"""The engine and the optimizer as DeepSpeed's callers know them, on one process."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zerort
from zerort.compat.deepspeed.engine import DeepSpeedEngine
from zerort.compat.deepspeed.optimizer import (
    DeepSpeedOptimizer,
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    ZeROOptimizer,
)
from zerort.compat.deepspeed.start import initialize


def engine_of(stage: int = 2, **more: Any) -> DeepSpeedEngine:
    torch.manual_seed(0)
    config = {
        "train_batch_size": 2,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        **more,
    }
    return initialize(model=nn.Linear(4, 4), config=config)[0]


def step(engine: Any, factor: float = 1.0) -> None:
    dtype = next(engine.parameters()).dtype
    engine.backward(engine(torch.ones(2, 4, dtype=dtype)).float().sum() * factor)
    engine.step()


def test_the_configuration_has_deepspeeds_private_name_too() -> None:
    engine = engine_of(bf16={"enabled": True})
    found = engine._config
    assert found.train_micro_batch_size_per_gpu == 2 and found.gradient_accumulation_steps == 1
    assert found.zero_optimization.stage == 2 and found.bf16.enabled
    assert dict(found) == dict(engine.config), "as a mapping what was given"
    engine.set_train_micro_batch_size(1)
    assert engine._config.train_batch_size == engine.train_batch_size() == 1
    engine.destroy()


@pytest.mark.parametrize("stage", range(4))
def test_the_class_is_set_on_the_instance_and_the_optimizer_is_torchs(stage: int) -> None:
    model = nn.Linear(4, 4)
    mine = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(mine)
    config = {"train_batch_size": 2, "zero_optimization": {"stage": stage}}
    engine, optimizer, _, _ = initialize(model=model, optimizer=mine, config=config)
    assert type(engine) is DeepSpeedEngine
    assert optimizer is mine is engine.optimizer is optimizer.optimizer is schedule.optimizer
    assert isinstance(optimizer, DeepSpeedOptimizer)
    assert isinstance(optimizer, ZeROOptimizer) == (stage > 0)
    assert isinstance(optimizer, DeepSpeedZeroOptimizer) == (stage in (1, 2))
    assert isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) == (stage == 3)
    assert not isinstance(torch.optim.SGD(nn.Linear(1, 1).parameters()), DeepSpeedOptimizer)
    assert vars(DeepSpeedEngine).keys() & {"__init__", "__slots__"} == set()
    assert sorted(optimizer.state_dict()) == ["param_groups", "state"]
    engine.destroy()


def test_the_optimizer_says_whether_its_step_was_skipped_and_the_loss_scale() -> None:
    engine = engine_of(fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    optimizer: Any = engine.optimizer
    assert (optimizer.overflow, optimizer.cur_scale, optimizer.loss_scale) == (False, 256, 256)
    assert optimizer.needs_scaler()
    assert optimizer.dynamic_loss_scale
    step(engine, float("inf"))
    assert (optimizer.overflow, optimizer.cur_scale, optimizer.loss_scale) == (True, 128, 128)
    scaler = optimizer.loss_scaler
    assert (scaler.cur_scale, scaler.loss_scale, scaler.cur_iter) == (128, 128, 1)
    step(engine)
    assert (optimizer.overflow, optimizer.cur_scale) == (False, 128)
    assert (scaler.cur_scale, scaler.cur_iter) == (128, 2)
    assert optimizer.loss_scale_config is scaler is optimizer.loss_scaler
    engine.destroy()


def test_the_norm_is_of_the_last_step_that_was_not_skipped() -> None:
    engine = engine_of(fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    assert engine.get_global_grad_norm() is None
    step(engine, float("inf"))
    assert engine.get_global_grad_norm() == 0
    step(engine)
    norm = engine.get_global_grad_norm()
    assert norm is not None
    assert norm > 0
    step(engine, float("inf"))
    assert engine.get_global_grad_norm() == norm == engine.optimizer._global_grad_norm  # type: ignore[union-attr]
    engine.destroy()


def test_the_loss_scaler_says_how_it_was_configured() -> None:
    moving = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
    engine = engine_of(fp16={**moving, "min_loss_scale": 4})
    scaler = engine.optimizer.loss_scaler  # type: ignore[union-attr]
    assert scaler.dynamic is scaler.dynamic_loss_scale is True
    assert (scaler.scale_window, scaler.min_scale, scaler.min_loss_scale) == (2, 4, 4)
    for _ in range(3):  # the scale of the step behind the window's end is the first that is larger
        step(engine)
    assert scaler.cur_scale == scaler.scale_factor * 256 == engine.loss_scale
    engine.destroy()
    engine = engine_of(fp16={"enabled": True, "loss_scale": 32})
    scaler = engine.optimizer.loss_scaler  # type: ignore[union-attr]
    assert (scaler.cur_scale, scaler.dynamic) == (32, False)
    engine.destroy()


def test_without_a_loss_scale_it_is_one() -> None:
    engine = engine_of(bf16={"enabled": True})
    optimizer: Any = engine.optimizer
    assert (optimizer.cur_scale, optimizer.needs_scaler()) == (1.0, False)
    engine.destroy()


def test_an_existing_tag_is_replaced_unless_told(tmp_path: Path) -> None:
    engine = engine_of()
    step(engine)
    assert engine.save_checkpoint(str(tmp_path), tag=3)  # DeepSpeed makes text of a tag
    step(engine)
    after = engine.module.weight.detach().clone()
    assert engine.save_checkpoint(tmp_path, "3", client_state={"epoch": 1})
    with pytest.raises(zerort.CheckpointError, match="exists"):
        engine.save_checkpoint(tmp_path, "3", overwrite=False)
    step(engine)
    path, client = engine.load_checkpoint(tmp_path)
    assert Path(path or "").name == "3"
    assert client == {"epoch": 1}
    assert torch.equal(engine.module.weight, after)
    engine.destroy()


def test_to_load_nothing_gives_none_and_none(tmp_path: Path) -> None:
    engine = engine_of()
    assert engine.load_checkpoint(tmp_path) == (None, None)
    engine.destroy()


def test_a_loaded_loss_scale_is_the_optimizers_too(tmp_path: Path) -> None:
    engine = engine_of(fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    engine.save_checkpoint(tmp_path, "start")
    step(engine, float("inf"))
    engine.load_checkpoint(tmp_path, "start")
    assert engine.optimizer.cur_scale == engine.loss_scale == 256  # type: ignore[union-attr]
    engine.destroy()


def test_a_loss_that_is_none_is_an_assertion_wherever_it_is_given() -> None:
    engine = engine_of()
    for call in (engine.backward, engine.scale):
        with pytest.raises(AssertionError, match="scalar tensor"):
            call(engine(torch.ones(2, 4)))
    engine.destroy()


def test_what_gradients_are_sent_in_can_be_read_and_not_changed() -> None:
    engine = engine_of(bf16={"enabled": True})
    engine.communication_data_type = torch.bfloat16  # as loops do that cast the model
    assert engine.communication_data_type == torch.bfloat16
    with pytest.raises(zerort.StepError, match=r"planned for torch\.bfloat16"):
        engine.communication_data_type = torch.float32
    engine.destroy()


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        ({}, None),
        ({"offload_optimizer": {"device": "none"}}, "none"),
        ({"cpu_offload": True}, "cpu"),
    ],
)
def test_who_asks_where_the_optimizer_is_at_home_is_answered(asked: Any, where: Any) -> None:
    engine = engine_of(zero_optimization={"stage": 2, **asked})
    section = engine.zero_offload_optimizer()
    assert (section and section.device) == where
    assert engine.zero_offload_param() is None
    assert engine.zero_cpu_offload() is engine.zero_use_cpu_optimizer() is (where == "cpu")
    assert not engine.pipeline_parallelism
    assert not engine.has_moe_layers
    engine.destroy()


def test_a_parameter_says_whether_it_stays_whole() -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 4}
    engine = engine_of(zero_optimization=zero)
    assert engine.module.bias.ds_persist
    assert not engine.module.weight.ds_persist
    step(engine)
    assert not engine.module.weight.ds_persist
    engine.destroy()


def test_calls_that_cannot_be_are_assertions() -> None:
    engine = engine_of(managed_gradient_accumulation=False)
    with pytest.raises(AssertionError, match="set_gradient_accumulation_boundary"):
        engine.set_gradient_accumulation_boundary(True)
    with (
        pytest.raises(AssertionError, match="coalesce_grad_reduction"),
        engine.coalesce_grad_reduction(),
    ):
        pass
    engine.destroy()


@pytest.mark.parametrize("folder", [None, ""])
def test_a_checkpoint_without_a_folder_is_a_value_error(folder: Any) -> None:
    engine = engine_of()
    with pytest.raises(ValueError, match="cannot save") as raised:
        engine.save_checkpoint(folder)
    assert isinstance(raised.value, zerort.CheckpointError)
    engine.destroy()


def test_what_callers_look_for_in_an_error_is_in_it() -> None:
    engine = engine_of(fp16={"enabled": True, "initial_scale_power": 8})
    batch = torch.ones(2, 4, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="Loss scaling is required"):
        engine(batch).sum().backward()
    with pytest.raises(AssertionError, match="raised in this micro-batch"):
        engine.step()
    engine.module.weight.grad = torch.ones_like(engine.module.weight)
    with pytest.raises(AssertionError, match=r"gradients put into \.grad by hand"):
        engine.step()
    illegal = r"It is illegal to call Engine.step\(\) inside no_sync context manager"
    with engine.no_sync():
        engine.backward(engine(batch).sum())
        with pytest.raises(AssertionError, match=illegal):
            engine.step()
        with (
            pytest.raises(AssertionError, match="nested inside no_sync"),
            engine.coalesce_grad_reduction(),
        ):
            pass
    engine.destroy()


def test_gradients_of_ones_own_take_a_backwards_place_under_a_loss_scale() -> None:
    more = {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "gradient_clipping": 0}
    engine = engine_of(fp16={"enabled": True, "initial_scale_power": 8}, **more)
    before = engine.module.weight.detach().clone()
    engine.backward(engine(torch.ones(2, 4, dtype=torch.float16)).sum())
    mine = torch.full_like(before, 0.25)
    zerort.utils.safe_set_full_grad(engine.module.weight, mine * engine.loss_scale)
    engine.step()
    torch.testing.assert_close(before - engine.module.weight, mine / 2, atol=1e-3, rtol=0)
    engine.destroy()


def test_errors_are_assertions_too_and_what_they_were() -> None:
    for kind in (AssertionError, zerort.ConfigError, ValueError):
        with pytest.raises(kind, match="train_bach_size"):
            engine_of(train_bach_size=2)
    engine = engine_of()
    for kind in (AssertionError, zerort.StepError, RuntimeError):
        with engine.no_sync(), pytest.raises(kind, match=r"inside no_sync"):
            engine.step()
    assert not issubclass(zerort.StepError, AssertionError)
    engine.destroy()


def test_an_error_of_the_users_own_passes_as_it_is() -> None:
    engine = engine_of()

    class Mine(RuntimeError):
        pass

    def raises(gradient: torch.Tensor) -> None:
        raise Mine

    loss = engine(torch.ones(2, 4)).sum()
    loss.register_hook(raises)
    with pytest.raises(Mine):
        engine.backward(loss)
    engine.zero_grad()
    engine.destroy()


def test_keys_that_are_paths_are_read_over_and_the_callers_dict_stays() -> None:
    config = {
        "train_batch_size": 2,
        "zero_optimization": {"stage": 2},
        "zero_optimization.reduce_bucket_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    }
    given = json.loads(json.dumps(config))
    engine, *_ = initialize(model=nn.Linear(4, 4), config_params=config)
    assert config == given
    assert engine.config["zero_optimization"] == {"stage": 2}
    engine.destroy()


def test_an_engine_without_an_optimizer_has_none_and_runs_forward() -> None:
    model = nn.Linear(4, 4)
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 0}}
    engine, optimizer, *_ = initialize(model=model, config=config)
    assert type(engine) is DeepSpeedEngine
    assert optimizer is engine.optimizer is None
    assert engine(torch.ones(2, 4)).shape == (2, 4)
    engine.destroy()


def test_a_configuration_may_come_by_its_oldest_name(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(
        '{"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 1}}}'
    )
    args = Namespace(deepscale_config=str(tmp_path / "ds.json"))
    engine, *_ = initialize(args=args, model=nn.Linear(4, 4))
    assert engine.train_batch_size() == 2
    engine.destroy()
