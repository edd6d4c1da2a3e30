"""What leaves the engine and what comes back: files, copies, pickles, and the layouts of odd
parameters.

`test_views` has what training needs of the views; here a module is treated as the ordinary module
it must remain.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import ranks
import zerort
from catching import assert_told, caught
from models import WIDTH, OddShapes, Terms, Tied, mlp
from terms import engine_over_terms, step_with, weights
from zerort.errors import PlanError
from zerort.memory import FlatModel

BF16 = {"bf16": {"enabled": True}}
ONE_BUCKET = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10**8}}


def trained(model: nn.Module, changes: Any = None, size: int = WIDTH) -> Any:
    """An engine over `model` after one step."""
    engine = engine_over_terms({**ONE_BUCKET, **(changes or {})}, model=model)
    x = torch.ones(2, size, dtype=next(model.parameters()).dtype)
    engine.backward(engine(x).float().square().mean())
    engine.step()
    return engine


def same_values(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


# ---- files


def a_file_of_torch_save_is_loaded_by_a_plain_model(rank: int, world: int) -> None:
    engine = trained(mlp())
    file = io.BytesIO()
    torch.save(engine.module.state_dict(), file)
    file.seek(0)
    plain = mlp()
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert same_values(plain.state_dict(), engine.module.state_dict())


def a_safetensors_file_is_loaded_by_a_plain_model_weights_tied(rank: int, world: int) -> None:
    engine = trained(Tied())
    plain = Tied()
    with tempfile.TemporaryDirectory() as folder:
        safetensors.torch.save_model(engine.module, f"{folder}/model.safetensors")
        safetensors.torch.load_model(plain, f"{folder}/model.safetensors")
    assert same_values(plain.state_dict(), engine.module.state_dict())


def the_engines_own_state_dict_has_the_modules_names_and_loads_back(rank: int, world: int) -> None:
    engine = engine_over_terms()
    taken = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
    assert list(taken) == ["module.a", "module.b"]
    step_with(engine, 7.0, 9.0)
    engine.load_state_dict(taken)
    assert step_with(engine, 1.0, 2.0) == (-1.0, -2.0)


def what_the_engine_loads_in_bf16_survives_the_next_step(rank: int, world: int) -> None:
    engine = engine_over_terms(BF16)
    step_with(engine, 64.0, 64.0)
    engine.load_state_dict({"module.a": torch.full((4,), 3.0), "module.b": torch.full((4,), 5.0)})
    assert step_with(engine, 1.0, 1.0) == (2.0, 4.0)


# ---- copies


def engines_and_flat_models() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked for their class
        return sum(isinstance(thing, (zerort.Engine, FlatModel)) for thing in gc.get_objects())


def a_deepcopy_takes_neither_the_engine_nor_its_buffers_along(rank: int, world: int) -> None:
    engine = trained(mlp())
    before = engines_and_flat_models()
    twin = copy.deepcopy(engine.module)
    assert engines_and_flat_models() == before
    own = {tensor.untyped_storage().data_ptr() for tensor in engine.module.parameters()}
    for tensor in twin.parameters():
        assert tensor.untyped_storage().data_ptr() not in own
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert not tensor._post_accumulate_grad_hooks


def a_deepcopy_of_a_model_can_have_an_engine_of_its_own(rank: int, world: int) -> None:
    first = engine_over_terms()
    step_with(first, 1.0, 1.0)
    second = engine_over_terms(model=copy.deepcopy(first.module))
    assert step_with(second, 2.0, 4.0) == (-3.0, -5.0)
    assert weights(first) == (-1.0, -1.0)


def loading_into_a_copy_leaves_the_engine_alone(rank: int, world: int) -> None:
    engine = engine_over_terms(BF16)
    step_with(engine, 2.0, 4.0)
    copy.deepcopy(engine.module).load_state_dict({"a": torch.ones(4), "b": torch.ones(4)})
    assert step_with(engine, 1.0, 1.0) == (-3.0, -5.0)


def a_module_can_be_pickled_whole(rank: int, world: int) -> None:
    engine = trained(mlp())
    pickled = pickle.dumps(engine.module)
    assert len(pickled) < 20_000
    twin = pickle.loads(pickled)
    assert same_values(twin.state_dict(), engine.module.state_dict())
    twin(torch.ones(2, WIDTH)).sum().backward()
    assert all(tensor.grad is not None for tensor in twin.parameters())


# ---- layouts


def strided(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tensor.stride() for name, tensor in module.named_parameters()}


def channels_last_weights_stay_channels_last(rank: int, world: int) -> None:
    convolution = nn.Conv2d(3, 4, kernel_size=3).to(memory_format=torch.channels_last)
    before = strided(convolution)
    engine = engine_over_terms(ONE_BUCKET, model=convolution)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(convolution)
    engine.backward(engine(x).square().mean())
    engine.step()
    assert strided(engine.module) == before
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    twin(x).square().mean().backward()
    mean = twin.weight.grad.clone()
    if world > 1:
        torch.distributed.all_reduce(mean)
    assert torch.allclose(convolution.weight, twin.weight - mean / world, atol=1e-6)


def transposed_weights_stay_transposed(rank: int, world: int) -> None:
    model = OddShapes()
    before = model.transposed.stride()
    engine = trained(model)
    assert engine.module.transposed.stride() == before == (1, WIDTH)


# ---- the optimizer


def the_optimizer_keeps_its_group_dictionaries(rank: int, world: int) -> None:
    model = Terms()
    optimizer = torch.optim.SGD(
        [{"params": [model.a], "lr": 1.0}, {"params": [model.b], "lr": 3.0}]
    )
    groups = list(optimizer.param_groups)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    engine = engine_over_terms(model=model, optimizer=optimizer, lr_scheduler=schedule)
    assert all(
        mine is theirs for mine, theirs in zip(groups, engine.optimizer.param_groups, strict=True)
    )
    assert step_with(engine, 1.0, 1.0) == (-1.0, -3.0)
    assert step_with(engine, 1.0, 1.0) == (-1.5, -4.5)


SCENARIOS: list[Callable[[int, int], None]] = [
    a_file_of_torch_save_is_loaded_by_a_plain_model,
    a_safetensors_file_is_loaded_by_a_plain_model_weights_tied,
    the_engines_own_state_dict_has_the_modules_names_and_loads_back,
    what_the_engine_loads_in_bf16_survives_the_next_step,
    a_deepcopy_takes_neither_the_engine_nor_its_buffers_along,
    a_deepcopy_of_a_model_can_have_an_engine_of_its_own,
    loading_into_a_copy_leaves_the_engine_alone,
    a_module_can_be_pickled_whole,
    channels_last_weights_stay_channels_last,
    transposed_weights_stay_transposed,
    the_optimizer_keeps_its_group_dictionaries,
]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_flat_views(scenario: Callable[[int, int], None], world: int) -> None:
    ranks.shared(world, scenario)


# ---- files of a known size


def file_size(rank: int, world: int, kind: str) -> int:
    """Bytes of a saved model of eight layers that share one bucket."""
    engine = trained(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), size=64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        if kind == "safetensors":
            safetensors.torch.save_model(engine.module, str(path))
        else:
            torch.save(engine.state_dict(), path)
        return path.stat().st_size


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_file_holds_each_parameter_once_and_no_flat_buffer(kind: str) -> None:
    parameters = 8 * (64 * 64 + 64) * 4
    for size in ranks.shared(2, file_size, kind):
        assert parameters < size < parameters + 8_000


# ---- memory that two parameters share


class Overlapping(nn.Module):
    """Two vectors over one piece of memory; the second starts `apart` elements behind the first."""

    def __init__(self, apart: int) -> None:
        super().__init__()
        base = torch.zeros(16)
        self.a = nn.Parameter(base[:8])
        self.b = nn.Parameter(base[apart : apart + 8])

    def forward(self) -> Tensor:
        return self.a.sum() + 2 * self.b.sum()


def start_with_overlap(rank: int, world: int, apart: int) -> Exception | None:
    return caught(lambda: engine_over_terms(model=Overlapping(apart)))


@pytest.mark.parametrize("apart", [0, 4, 7])
def test_parameters_that_overlap_in_memory_are_refused_by_name(apart: int) -> None:
    for error in ranks.shared(2, start_with_overlap, apart):
        assert_told(error, PlanError, "a", "b", "memory")


def train_neighbours(rank: int, world: int) -> tuple[float, float]:
    engine = engine_over_terms(model=Overlapping(8))
    engine.backward(engine())
    engine.step()
    return weights(engine)


def test_parameters_side_by_side_in_one_storage_train() -> None:
    assert ranks.shared(2, train_neighbours) == [(-1.0, -2.0)] * 2
