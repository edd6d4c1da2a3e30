"""A name is a name wherever it is held: in the optimizer, frozen and out of it, or as a buffer."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
from saved import assert_equal, config_of, contents, engine_of, manifest_of, weights
from training import keep
from zerort.errors import CheckpointError

HELD = ("trained", "frozen", "outside", "buffer")
"""In the optimizer and trained; in it and frozen; frozen and out of it; a buffer."""


class Net(nn.Module):
    """(batch, 5) -> (batch, 5); two tensors are held as asked, and `wide` lies in another order if
    `turned`.
    """

    def __init__(self, held: str, seed: int, *, turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        weight, wide = torch.randn(5, 5), torch.randn(5, 7)
        wide = wide.t().contiguous().t() if turned else wide
        for name, value in (("weight", weight), ("wide", wide)):
            if held == "buffer":
                self.register_buffer(name, value)
            else:
                setattr(self, name, nn.Parameter(value, requires_grad=held == "trained"))
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.weight.to(x.dtype)) @ self.wide.to(x.dtype))


def made(held: str, seed: int, dtype: str = "fp32", *, turned: bool = False, stage: int = 2) -> Any:
    model = Net(held, seed, turned=turned)
    if dtype == "bf16":
        model.bfloat16()
    params = [p for p in model.parameters() if held != "outside" or p.requires_grad]
    make: Callable[[Any], Any] = lambda _: torch.optim.AdamW(params, lr=0.01)  # noqa: E731
    return engine_of(config_of(stage, dtype), model, make, model_parameters=params)


def train(engine: Any, steps: int = 2) -> None:
    for step in range(steps):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        x = x.to(engine.module.head.weight.dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()


HOW: list[dict[str, Any]] = [
    {},
    {"load_module_strict": False},
    {"load_module_only": True},
    {"load_module_only": True, "load_module_strict": False},
]


def resume_everywhere(rank: int, world: int, folder: str, dtype: str) -> list[str]:
    """Saves with `weight` and `wide` held in each way, and loads in each other; what was wrong.

    Each engine loads one checkpoint after another, whose values all differ: nothing of the one
    before may be left.
    """
    wrong, expected = [], {}
    for seed, saved in enumerate(HELD):
        engine = made(saved, seed, dtype)
        train(engine)
        engine.save_checkpoint(folder, f"{saved}-{dtype}")
        expected[saved] = weights(engine)
        keep(engine)
    for have in HELD:
        for number, how in enumerate(HOW):
            engine = made(have, 9, dtype, turned=number % 2 == 1, stage=number % 3)
            for saved in HELD:
                engine.load_checkpoint(folder, f"{saved}-{dtype}", **how)
                found, kept = weights(engine), engine.last_load.stayed + engine.last_load.unused
                wrong += [
                    f"{saved} -> {have} {how}: {name}"
                    for name, value in expected[saved].items()
                    if not torch.equal(found[name], value)
                ]
                wrong += [f"{saved} -> {have} {how}: {name} is said to differ" for name in kept]
                train(engine, 1)
            keep(engine)
    return wrong


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_tensor_is_found_wherever_it_is_held_on_both_sides(dtype: str, tmp_path: Path) -> None:
    assert ranks.run(2, resume_everywhere, str(tmp_path), dtype) == [[], []]


def test_masters_survive_a_stage_in_which_they_are_frozen_in_the_optimizer(tmp_path: Path) -> None:
    one = made("trained", 0, "bf16")
    train(one)
    one.save_checkpoint(tmp_path, "one")
    two = made("frozen", 1, "bf16")
    two.load_checkpoint(tmp_path)
    two.save_checkpoint(tmp_path, "two")
    assert_equal(contents(tmp_path / "one"), contents(tmp_path / "two"))


def test_what_had_no_state_of_the_optimizer_starts_fresh_and_it_is_said_once(
    tmp_path: Path, caplog: Any
) -> None:
    outside, trained = made("outside", 0), made("trained", 1)
    train(outside)
    outside.save_checkpoint(tmp_path, "outside")
    with caplog.at_level(logging.INFO, "zerort"):
        trained.load_checkpoint(tmp_path)
    assert set(trained.last_load.fresh) == {"weight", "wide"}
    lines = [r.getMessage() for r in caplog.records if "fresh state" in r.getMessage()]
    assert len(lines) == 1 and "weight, wide" in lines[0]
    train(trained, 1)
    trained.save_checkpoint(tmp_path, "trained")
    steps = {
        entry["name"]: entry["state"]["values"]["step"]["$scalar"][2]
        for entry in manifest_of(tmp_path / "trained")["params"]
    }
    assert steps == {"weight": 1.0, "wide": 1.0, "head.weight": 3.0, "head.bias": 3.0}
    caplog.clear()
    with caplog.at_level(logging.INFO, "zerort"):
        outside.load_checkpoint(tmp_path, "trained")
    assert set(outside.last_load.dropped) == {"weight", "wide"} and "hold them now" in caplog.text


def test_without_strict_what_stayed_and_what_was_not_taken_is_listed(
    tmp_path: Path, caplog: Any
) -> None:
    engine = made("trained", 0)
    engine.save_checkpoint(tmp_path)
    model = nn.Sequential(Net("buffer", 1))
    other = engine_of(config_of(1), model)
    before = weights(other)
    with pytest.raises(
        CheckpointError,
        match=r"lacks 0\.head\.weight, .*0\.wide, and the model lacks .*leaves what",
    ):
        other.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_module_strict=False)
    assert set(other.last_load.stayed) == set(before)
    assert set(other.last_load.unused) == {"weight", "wide", "head.weight", "head.bias"}
    assert_equal(weights(other), before)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    for name, words in (("0.wide", "stay at their present values"), ("wide", "are not taken")):
        assert any(f"{name} {words}" in line or f"{name}, " in line for line in lines)
        assert sum(words in line for line in lines) == 1
    assert other.last_load.path == str(tmp_path / "global_step0")


def test_frozen_parameters_that_were_left_out_stay_and_are_listed(tmp_path: Path) -> None:
    for held in ("frozen", "outside"):
        engine, other = made(held, 0), made(held, 1)
        engine.save_checkpoint(tmp_path, held, exclude_frozen_parameters=True)
        before = weights(other)
        other.load_checkpoint(tmp_path, held)
        assert set(other.last_load.stayed) == {"weight", "wide"}
        assert torch.equal(other.module.wide, before["wide"])


class Tied(nn.Module):
    """`first` and `second` in one order of registration or the other, tied or not."""

    def __init__(self, order: tuple[str, str], *, tied: bool) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(4, 4, bias=False))
        if tied:
            getattr(self, order[1]).weight = getattr(self, order[0]).weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_tied_tensor_is_found_by_any_of_its_names(tmp_path: Path) -> None:
    orders = (("first", "second"), ("second", "first"))
    for number, (saved, have) in enumerate(itertools.product(orders, orders)):
        engine = engine_of(config_of(1), Tied(saved, tied=True))
        other = engine_of(config_of(1), Tied(have, tied=True))
        engine.save_checkpoint(tmp_path, str(number))
        other.load_checkpoint(tmp_path)
        assert torch.equal(other.module.first.weight, engine.module.second.weight)
        apart = engine_of(config_of(1), Tied(have, tied=False))
        apart.load_checkpoint(tmp_path)
        assert torch.equal(apart.module.first.weight, apart.module.second.weight)
        apart.save_checkpoint(tmp_path, f"{number}-apart")
        with pytest.raises(CheckpointError, match="the model lacks"):
            other.load_checkpoint(tmp_path, f"{number}-apart")


@pytest.mark.parametrize(
    ("saved", "have"),
    [
        (torch.float32, torch.int8),
        (torch.int8, torch.float32),
        (torch.int16, torch.int8),
        (torch.uint8, torch.int8),
        (torch.bool, torch.uint8),
        (torch.complex64, torch.float32),
    ],
)
def test_a_dtype_in_which_values_would_mean_something_else_is_refused(
    saved: torch.dtype, have: torch.dtype, tmp_path: Path
) -> None:
    def with_table(dtype: torch.dtype) -> Any:
        model = nn.Linear(3, 3)
        model.register_buffer("table", torch.ones(4).to(dtype))
        return engine_of(config_of(1), model)

    with_table(saved).save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"table has dtype {have}, in the checkpoint {saved}"):
        with_table(have).load_checkpoint(tmp_path)
    for wider in (torch.int64,) if saved in (torch.int8, torch.uint8, torch.int16) else ():
        engine = with_table(wider)
        engine.load_checkpoint(tmp_path)
        assert engine.module.table.dtype == wider and engine.module.table.sum() == 4
