"""Parameters are views of flat buffers. What users do with parameters goes on working, or is
refused by name.

(What moves a parameter out of its buffer is in `test_failures`.)
"""

import copy
import io
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import ranks
from models import WIDTH, Terms, Tied
from terms import engine_over_terms, step_with, weights
from training import at_stage

BF16 = {"bf16": {"enabled": True}}


def a_saver_that_keeps_one_name_per_storage_keeps_all(rank: int, world: int) -> None:
    engine = engine_over_terms({"zero_optimization": {"reduce_bucket_size": 10**8}})
    step_with(engine, 1.0, 2.0)
    with tempfile.TemporaryDirectory() as folder:
        safetensors.torch.save_model(engine.module, f"{folder}/model.safetensors")
        saved = safetensors.torch.load_file(f"{folder}/model.safetensors")
    assert {name: tensor[0].item() for name, tensor in saved.items()} == {"a": -1.0, "b": -2.0}


def a_saved_model_has_the_size_of_its_tensors(rank: int, world: int) -> None:
    engine = engine_over_terms(
        {"zero_optimization": {"reduce_bucket_size": 10**8}}, model=nn.Linear(100, 100)
    )
    alone, all_of_it = io.BytesIO(), io.BytesIO()
    torch.save(engine.module.state_dict()["bias"], alone)
    torch.save(engine.module.state_dict(), all_of_it)
    assert len(alone.getvalue()) < 4_000 < len(all_of_it.getvalue()) < 50_000


def a_loaded_state_dict_is_trained_from(rank: int, world: int) -> None:
    engine = engine_over_terms()
    step_with(engine, 64.0, 64.0)
    engine.module.load_state_dict({"a": torch.full((4,), 3.0), "b": torch.full((4,), 5.0)})
    assert step_with(engine, 1.0, 1.0) == (2.0, 4.0)


def a_loaded_state_dict_reaches_the_masters(rank: int, world: int) -> None:
    engine = engine_over_terms(BF16)
    step_with(engine, 64.0, 64.0)
    engine.module.load_state_dict({"a": torch.full((4,), 3.0), "b": torch.full((4,), 5.0)})
    assert step_with(engine, 1.0, 1.0) == (2.0, 4.0)


def a_write_in_place_reaches_the_masters_and_costs_no_other_its_bits(rank: int, world: int) -> None:
    model = Terms()
    engine = engine_over_terms(
        BF16, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=2.0**-12)
    )
    with torch.no_grad():
        model.b.fill_(1.0)
    for _ in range(8):
        step_with(engine, 1.0, 1.0)  # 1 - 8 * 2^-12 is no bf16 number: only the master has moved
    with torch.no_grad():
        model.a.fill_(3.0)
    for _ in range(8):
        step_with(engine, 1.0, 1.0)
    assert weights(engine) == (3.0, 1.0 - 16 * 2.0**-12)


def a_parameter_written_in_place_is_trained_from(rank: int, world: int) -> None:
    engine = engine_over_terms()
    step_with(engine, 1.0, 1.0)
    with torch.no_grad():
        engine.module.a.fill_(10.0)
    assert step_with(engine, 1.0, 1.0) == (9.0, -2.0)


def a_step_of_the_optimizers_own_that_was_left_in_the_loop_changes_nothing(
    rank: int, world: int
) -> None:
    engine = engine_over_terms()
    step_with(engine, 1.0, 1.0)
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    assert weights(engine) == (-1.0, -1.0)
    assert step_with(engine, 1.0, 1.0) == (-2.0, -2.0)


def a_deepcopied_module_trains_alone(rank: int, world: int) -> None:
    engine = engine_over_terms()
    step_with(engine, 1.0, 1.0)
    twin = copy.deepcopy(engine.module)
    twin(5.0, 5.0).backward()
    with torch.no_grad():
        twin.a -= twin.a.grad
    assert twin.a.tolist() == [-6.0] * 4
    assert step_with(engine, 1.0, 1.0) == (-2.0, -2.0)


def a_graph_kept_over_a_step_is_refused_by_autograd(rank: int, world: int) -> None:
    engine = engine_over_terms(model=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    loss = engine(torch.ones(2, 4)).sum()
    engine.backward(loss, retain_graph=True)
    engine.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.backward(loss)


def gradients_are_gone_after_the_backward(rank: int, world: int) -> None:
    engine = engine_over_terms()
    engine.backward(engine(1.0, 1.0))
    assert engine.module.a.grad is None
    engine.step()


def tied_names_stay_one_parameter(rank: int, world: int) -> None:
    engine = engine_over_terms(model=Tied())
    engine.backward(engine(torch.ones(2, WIDTH)).square().mean())
    engine.step()
    assert engine.module.first.weight is engine.module.second.weight
    taken = engine.module.state_dict()
    assert torch.equal(taken["first.weight"], taken["second.weight"])


def the_users_optimizer_is_the_engines(rank: int, world: int) -> None:
    model = Terms()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = engine_over_terms(model=model, optimizer=optimizer)
    assert engine.optimizer is optimizer
    optimizer.param_groups[0]["lr"] = 0.5
    assert step_with(engine, 2.0, 4.0) == (-1.0, -2.0)


def ranks_start_from_rank_0s_weights_and_buffers(rank: int, world: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(rank)
    engine = engine_over_terms(model=model)
    assert all((tensor == 0).all() for tensor in engine.module.state_dict().values())


def two_engines_of_one_process_do_not_mix(rank: int, world: int) -> None:
    first, second = engine_over_terms(), engine_over_terms(at_stage(2))
    losses = first(1.0, 10.0), second(2.0, 20.0)
    for engine, loss in zip((first, second), losses, strict=True):
        engine.backward(loss)
    second.step()
    first.step()
    assert (weights(first), weights(second)) == ((-1.0, -10.0), (-2.0, -20.0))


def a_destroyed_engine_leaves_a_working_model(rank: int, world: int) -> None:
    engine = engine_over_terms()
    step_with(engine, 1.0, 1.0)
    model = engine.module
    engine.destroy()
    model(3.0, 3.0).backward()
    assert model.a.grad.tolist() == [3.0] * 4


SCENARIOS: list[Callable[[int, int], Any]] = [
    a_saver_that_keeps_one_name_per_storage_keeps_all,
    a_saved_model_has_the_size_of_its_tensors,
    a_loaded_state_dict_is_trained_from,
    a_loaded_state_dict_reaches_the_masters,
    a_write_in_place_reaches_the_masters_and_costs_no_other_its_bits,
    a_parameter_written_in_place_is_trained_from,
    a_step_of_the_optimizers_own_that_was_left_in_the_loop_changes_nothing,
    a_deepcopied_module_trains_alone,
    a_graph_kept_over_a_step_is_refused_by_autograd,
    gradients_are_gone_after_the_backward,
    tied_names_stay_one_parameter,
    the_users_optimizer_is_the_engines,
    ranks_start_from_rank_0s_weights_and_buffers,
    two_engines_of_one_process_do_not_mix,
    a_destroyed_engine_leaves_a_working_model,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_views(scenario: Callable[[int, int], Any]) -> None:
    ranks.shared(2, scenario)
