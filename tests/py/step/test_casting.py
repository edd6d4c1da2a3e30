"""What bf16 and fp16 cast: what trains as `module.to(dtype)` trains here, and what an author keeps
in another dtype stays.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from terms import engine_over_terms
from zerort.step.casting import cast, explained
from zerort.step.mode import Mode

SIZE = 8
CONFIGS = {
    torch.bfloat16: {"bf16": {"enabled": True}},
    torch.float16: {"fp16": {"enabled": True, "loss_scale": 1.0}},
}
each_dtype = pytest.mark.parametrize("dtype", CONFIGS, ids=str)


def between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(SIZE, SIZE), layer, nn.ReLU(), nn.Linear(SIZE, SIZE))


def in_images(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 2, 1), layer, nn.Flatten())


def old_spectral_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(nn.Linear(SIZE, SIZE))


class Statistics(nn.Module):
    """An author's own normalisation; affine numbers are buffers too, as in a frozen batch norm."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("running_mean", 0.0), ("running_var", 1.0), ("weight", 2.0)):
            self.register_buffer(name, torch.full((SIZE,), value))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) * self.weight / self.running_var.sqrt()


class Weighted(nn.Module):
    """A loss with class weights inside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)
        self.loss = nn.CrossEntropyLoss(weight=torch.arange(1.0, SIZE + 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.layer(x), torch.zeros(len(x), dtype=torch.int64))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: between(nn.BatchNorm1d(SIZE)),
    "BatchNorm1d without affine": lambda: between(nn.BatchNorm1d(SIZE, affine=False)),
    "BatchNorm1d without statistics": lambda: between(
        nn.BatchNorm1d(SIZE, track_running_stats=False)
    ),
    "BatchNorm2d": lambda: in_images(nn.BatchNorm2d(2)),
    "InstanceNorm2d": lambda: in_images(nn.InstanceNorm2d(2, affine=True)),
    "InstanceNorm2d with statistics": lambda: in_images(
        nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
    ),
    "GroupNorm": lambda: between(nn.GroupNorm(2, SIZE)),
    "LayerNorm": lambda: between(nn.LayerNorm(SIZE)),
    "RMSNorm": lambda: between(nn.RMSNorm(SIZE)),
    "spectral norm": lambda: between(
        nn.utils.parametrizations.spectral_norm(nn.Linear(SIZE, SIZE))
    ),
    "spectral norm by hook": lambda: between(old_spectral_norm()),
    "an author's normalisation": lambda: between(Statistics()),
    "class weights": Weighted,
}


@each_dtype
@pytest.mark.parametrize("name", MODELS)
def test_what_trains_as_module_to_trains_here(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    plain = copy.deepcopy(model).to(dtype)
    x = torch.randn(4, SIZE).to(dtype)
    engine = engine_over_terms(CONFIGS[dtype], model=model)
    for _ in range(2):
        expected = plain(x).float().square().mean()
        loss = engine(x).float().square().mean()
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=1e-3)
        engine.backward(loss)
        engine.step()
        expected.backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.sub_(parameter.grad)
                parameter.grad = None
    engine.eval()
    plain.eval()
    torch.testing.assert_close(engine(x), plain(x), rtol=0.1, atol=0.05)


class Rotary(nn.Module):
    """A table that needs its precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)
        self.register_buffer("angles", 1.0 / 10000 ** torch.arange(0, 1, 1 / SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (self.angles * 4097).cos().to(x.dtype)


class Norm(nn.BatchNorm1d):
    """A subclass of a layer of torch's."""


@each_dtype
def test_what_is_cast(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"rotary": Rotary(), "norm": Norm(SIZE), "steps": nn.BatchNorm1d(SIZE)})
    model.register_buffer("mine", torch.ones(1))
    model.codes = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    model.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64), requires_grad=False)
    model.wide = nn.Parameter(torch.ones(4, dtype=torch.float64))
    cast(model, dtype)
    kept = {
        name: tensor.dtype
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.dtype != dtype
    }
    assert kept == {
        "codes": torch.float8_e4m3fn,
        "phase": torch.complex64,
        "mine": torch.float32,
        "rotary.angles": torch.float32,
        "norm.num_batches_tracked": torch.int64,
        "steps.num_batches_tracked": torch.int64,
    }


def test_batch_norms_that_are_kept_are_not_cast_and_not_blamed() -> None:
    model = nn.Sequential(Careless(SIZE, SIZE), Norm(SIZE), nn.BatchNorm1d(SIZE, affine=False))
    mode = Mode(torch.float16, keeps_norms=True)
    cast(model, torch.float16, keeps_norms=True)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    given = torch.zeros(2, SIZE, dtype=torch.float16)
    with pytest.raises(RuntimeError) as raised, explained(model, mode, (given,), {}):
        model(given)
    if sys.version_info >= (3, 11):
        assert "So are all inputs and buffers" in raised.value.__notes__[0]


# ---- two dtypes that meet


class Positions(nn.Module):
    """An author's table that meets activations, and makes them wide."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(SIZE))
        self.layer = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.table)


class Careless(nn.Linear):
    """The forward itself makes a wide tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x + torch.zeros(SIZE), self.weight)


def note(model: nn.Module, dtype: torch.dtype, *args: object, **kwargs: object) -> str:
    cast(model, dtype)
    with pytest.raises(RuntimeError) as raised, explained(model, Mode(dtype), args, kwargs):
        model(*args, **kwargs)
    (found,) = raised.value.__notes__
    return found


needs_notes = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="exceptions take notes from Python 3.11 on"
)


@needs_notes
@each_dtype
def test_an_input_is_blamed_where_it_is_one(dtype: torch.dtype) -> None:
    told = note(nn.Linear(SIZE, SIZE), dtype, torch.zeros(2, SIZE))
    assert "the inputs args[0] (torch.float32): cast" in told and "in the module" not in told
    told = note(nn.Linear(SIZE, SIZE), dtype, input=torch.zeros(2, SIZE))
    assert "the inputs kwargs['input'] (torch.float32): cast" in told


@needs_notes
@each_dtype
def test_a_buffer_is_named_and_its_way_out_works(dtype: torch.dtype) -> None:
    model, x = Positions(), torch.zeros(2, SIZE, dtype=dtype)
    told = note(model, dtype, x)
    assert "in the module are table (torch.float32): cast" in told and "inputs" not in told
    model.table = model.table.to(dtype)
    engine = engine_over_terms(CONFIGS[dtype], model=model)
    assert engine(x).dtype == dtype


@needs_notes
@each_dtype
def test_nobody_is_blamed_for_what_the_forward_makes(dtype: torch.dtype) -> None:
    told = note(Careless(SIZE, SIZE), dtype, torch.zeros(2, SIZE, dtype=dtype))
    assert "So are all inputs and buffers" in told


@needs_notes
def test_another_error_is_left_alone() -> None:
    with (
        pytest.raises(RuntimeError) as raised,
        explained(nn.Linear(4, 4), Mode(torch.bfloat16), (), {}),
    ):
        raise RuntimeError("too wide")
    assert not hasattr(raised.value, "__notes__")


def test_buffers_are_cast_where_data_types_asks_whoevers_they_are() -> None:
    model = Positions()
    model.register_buffer("count", torch.tensor(3))
    config = {"data_types": {"buffer_dtype": "bf16", "param_dtype": "fp32"}}
    engine_over_terms(config, model=model)
    assert model.table.dtype == torch.bfloat16 and model.count.dtype == torch.int64
    assert {p.dtype for p in model.parameters()} == {torch.float32}
