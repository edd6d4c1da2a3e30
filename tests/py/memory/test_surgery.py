"""A model that is changed after `initialize`: what would not be trained is refused by name at the
next backward; what makes no difference to training goes on.
"""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import ranks
from catching import assert_told, caught
from terms import engine_over_terms
from training import keep
from zerort.errors import StepError

SIZE = 8


class Net(nn.Module):
    """A list, a layer, a gain of one element and a frozen base in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(2))
        self.head = nn.Linear(SIZE, SIZE)
        self.gain = nn.Parameter(torch.ones(()))
        self.base = nn.Parameter(torch.ones(SIZE, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(SIZE), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x) * self.gain * self.scale


class Adapted(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.up = base, nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(x)


def delete(model: Net) -> None:
    del model.layers[1]


def write_past_torch(model: Net) -> None:
    model._modules["head"] = nn.Linear(SIZE, SIZE)


def write_a_parameter_past_torch(model: Net) -> None:
    model._parameters["gain"] = nn.Parameter(torch.ones(()))


def narrow(model: Net) -> None:
    model.head.weight.data = model.head.weight.data[:4]


def swap(model: Net) -> None:
    torch.utils.swap_tensors(model.head.weight, nn.Parameter(torch.ones(SIZE, SIZE)))


REFUSED: dict[str, tuple[Callable[[Net], object], str]] = {
    "layer exchanged": (lambda m: setattr(m, "head", nn.Linear(SIZE, SIZE)), "head.weight"),
    "layer made an identity": (lambda m: setattr(m, "head", nn.Identity()), "head.weight"),
    "layer set to None": (lambda m: setattr(m, "head", None), "head.weight"),
    "layer deleted": (lambda m: delattr(m, "head"), "head.weight"),
    "layer deleted from a list": (delete, "layers.1.weight"),
    "layer exchanged past torch": (write_past_torch, "head.weight"),
    "adapters": (lambda m: setattr(m, "head", Adapted(m.head)), "head.up.weight"),
    "layer appended": (lambda m: m.layers.append(nn.Linear(SIZE, SIZE)), "layers.2.weight"),
    "layer inserted": (lambda m: m.layers.insert(0, nn.Linear(SIZE, SIZE)), "layers.0.weight"),
    "parameter registered": (lambda m: setattr(m, "new", nn.Parameter(torch.ones(1))), "new"),
    "parameter exchanged": (
        lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach().clone())),
        "head.weight",
    ),
    "parameter of one element exchanged": (write_a_parameter_past_torch, "gain"),
    "parameter set to None": (lambda m: setattr(m.head, "bias", None), "head.bias"),
    "pruned": (lambda m: prune.l1_unstructured(m.head, "weight", 0.5), "head.weight"),
    "cast": (lambda m: m.double(), "gain"),
    "data exchanged": (
        lambda m: setattr(m.head.weight, "data", m.head.weight.data.clone()),
        "head.weight",
    ),
    "data narrowed in place": (narrow, "head.weight"),
    "tensors swapped": (swap, "head.weight"),
}


def step(engine: object) -> None:
    engine.backward(engine(torch.ones(2, SIZE)).square().mean())
    engine.step()


def change_each(rank: int, world: int) -> dict[str, Exception | None]:
    told = {}
    for name, (change, _) in REFUSED.items():
        model = Net()
        engine = engine_over_terms({"zero_optimization": {"stage": 2}}, model=model)
        step(engine)
        change(model)
        x = torch.ones(2, SIZE)
        # the forward may be broken by what was done; the backward is not reached through it
        loss = sum(p.float().sum() for p in model.parameters()) * x.mean()
        told[name] = caught(lambda engine=engine, loss=loss: engine.backward(loss))
        keep(engine)
    return told


@ranks.once(None)
def refusals() -> list[dict[str, Exception | None]]:
    return ranks.run(2, change_each)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_trained_is_refused_by_name(name: str) -> None:
    for told in refusals():
        assert_told(told[name], StepError, f"parameter {REFUSED[name][1]} ", "before zerort.init")


# ---- what makes no difference


def add_frozen(model: Net) -> None:
    model.extra = nn.Linear(SIZE, SIZE).requires_grad_(False)


def come_and_go(model: Net) -> None:
    head, model.head = model.head, nn.Identity()
    model.head = head


def alias(model: Net) -> None:
    model.current = model.layers[0]


ALLOWED: dict[str, Callable[[Net], object]] = {
    "a module wrapped": lambda m: setattr(m, "head", nn.Sequential(m.head)),
    "a module compiled": lambda m: setattr(m, "head", torch.compile(m.head, backend="eager")),
    "a second name": alias,
    "a buffer": lambda m: m.register_buffer("seen", torch.zeros(1)),
    "frozen parameters": add_frozen,
    "an unplanned one taken out": lambda m: setattr(m, "base", None),
    "exchanged and put back": come_and_go,
    "modules shuffled": lambda m: setattr(m, "layers", nn.ModuleList(reversed(m.layers))),
}


def change_and_go_on(rank: int, world: int) -> None:
    for name, change in ALLOWED.items():
        model = Net()
        engine = engine_over_terms({"zero_optimization": {"stage": 2}}, model=model)
        step(engine)
        change(model)
        before = model.gain.item()
        step(engine)
        step(engine)
        assert model.gain.item() != before, name
        keep(engine)


def test_what_makes_no_difference_to_training_goes_on() -> None:
    ranks.run(2, change_and_go_on)


def test_a_parameter_that_was_added_frozen_is_refused_when_it_is_to_train() -> None:
    model = Net()
    engine = engine_over_terms(model=model)
    add_frozen(model)
    step(engine)
    model.extra.requires_grad_(True)
    with pytest.raises(StepError, match=r"extra\.weight was registered after zerort\.initialize"):
        step(engine)
    model.extra.requires_grad_(False)
    step(engine)


def test_one_that_the_optimizer_never_had_is_named_when_it_is_unfrozen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Net()
    trained = [p for n, p in model.named_parameters() if n not in ("base", "scale")]
    engine = engine_over_terms(model=model, optimizer=torch.optim.SGD(trained, lr=1.0))
    step(engine)
    model.scale.requires_grad_(True)
    with caplog.at_level(logging.WARNING, logger="zerort"):
        step(engine)
        step(engine)
    told = [record.message for record in caplog.records if "unfrozen" in record.message]
    assert told == ["unfrozen, but not in the optimizer, so never updated: scale"]


def test_an_error_goes_away_with_its_cause() -> None:
    model = Net()
    engine = engine_over_terms(model=model)
    head, model.head = model.head, nn.Linear(SIZE, SIZE)
    with pytest.raises(StepError, match=r"head\.weight has been replaced"):
        step(engine)
    with pytest.raises(StepError, match=r"head\.weight has been replaced"):
        step(engine)
    model.head = head
    step(engine)


# ---- what the watch costs others


def test_modules_of_the_process_are_built_as_without_an_engine() -> None:
    from torch.nn.modules import module as torchs

    before = [
        copy.copy(getattr(torchs, name))
        for name in dir(torchs)
        if name.startswith("_global") and "hooks" in name
    ]
    engine = engine_over_terms(model=Net())
    step(engine)
    after = [
        copy.copy(getattr(torchs, name))
        for name in dir(torchs)
        if name.startswith("_global") and "hooks" in name
    ]
    assert before == after


def test_the_watch_keeps_no_engine_and_no_module_alive() -> None:
    model = Net()
    engine = engine_over_terms(model=model)
    step(engine)
    left = [weakref.ref(engine), weakref.ref(model)]
    engine.destroy()
    del engine, model
    gc.collect()
    assert [ref() for ref in left] == [None, None]


# ---- dtypes and layouts at the start


class Quantised(nn.Module):
    """A frozen base in a dtype that no gradient has, and a layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.ones(SIZE).to(dtype), requires_grad=False)
        self.layer = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base.real if self.base.is_complex() else self.base
        return self.layer(x * base.to(x.dtype))


DTYPES = [
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_parameter_of_any_dtype_is_left_as_it_is(dtype: torch.dtype, bf16: bool) -> None:
    model = Quantised(dtype)
    memory, before = model.base.data_ptr(), model.base.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine = engine_over_terms({"bf16": {"enabled": bf16}}, model=model, optimizer=optimizer)
    x = torch.ones(2, SIZE, dtype=model.layer.weight.dtype)
    engine.backward(engine(x).float().square().mean())
    engine.step()
    assert engine.was_step_applied()
    assert (model.base.dtype, model.base.data_ptr()) == (dtype, memory)
    assert torch.equal(model.base.to(torch.complex64), before.to(torch.complex64))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_one_that_is_to_train_in_such_a_dtype_is_refused_with_advice_that_works(
    dtype: torch.dtype,
) -> None:
    model = Quantised(dtype)
    model.base.requires_grad_(True)
    error = caught(lambda: engine_over_terms(model=model))
    assert_told(error, ValueError, "parameter base", str(dtype), "requires_grad_(False)")
    model.base.requires_grad_(False)
    step(engine_over_terms(model=model))


def start_in_another_format(rank: int, world: int) -> Exception | None:
    model = nn.Conv2d(2, 3, 3)
    if rank == 1:
        model = model.to(memory_format=torch.channels_last)
    return caught(lambda: engine_over_terms(model=model))


def test_ranks_whose_elements_lie_in_another_order_are_refused() -> None:
    for error in ranks.run(2, start_in_another_format):
        assert_told(error, ValueError, "different models", "weight [3, 2, 3, 3]", "strides")
