"""What cannot start: one clear error that names it, on every rank, within a time limit."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ranks
from catching import assert_told, caught
from models import Terms
from terms import engine_over_terms
from training import at_stage
from zerort.errors import ConfigError, PlanError, PlanMismatch, StepError, ZerortError

LIMIT = 30.0  # seconds a scenario may take, start included
BY_NAME = {"optimizer": functools.partial(torch.optim.SGD, lr=1.0)}


class _Wider(Terms):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(6))


class _Longer(Terms):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(4))


def _start_with_another_model(
    rank: int, world: int, odd: type[Terms], stage: int
) -> Exception | None:
    model = odd() if rank == 1 else Terms()
    return caught(lambda: engine_over_terms(at_stage(stage), model=model))


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    ("odd", "words"), [(_Wider, ["b [4]", "b [6]", "rank 1"]), (_Longer, ["rank 1", "extra"])]
)
def test_ranks_with_different_models_name_the_first_difference(
    odd: type[Terms], words: list[str], stage: int
) -> None:
    for error in ranks.shared(2, _start_with_another_model, odd, stage, timeout=LIMIT):
        assert_told(error, PlanMismatch, *words)


def _start_with_other_buckets(rank: int, world: int) -> Exception | None:
    return caught(
        lambda: engine_over_terms(
            {"zero_optimization": {"reduce_bucket_size": 1 if rank == 0 else 100}}
        )
    )


def test_ranks_with_different_bucket_sizes_do_not_start() -> None:
    for error in ranks.shared(2, _start_with_other_buckets, timeout=LIMIT):
        assert_told(error, PlanMismatch, "rank 1")


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gradient_clipping": ({"gradient_clipping": 1.0}, {"gradient_clipping": 2.0}),
    "gradient_accumulation_steps": ({}, {"gradient_accumulation_steps": 2}),
    "fp16.loss_scale": (
        {"fp16": {"enabled": True, "loss_scale": 2.0}},
        {"fp16": {"enabled": True, "loss_scale": 4.0}},
    ),
    "zerort.timeout": ({"zerort": {"timeout": 10}}, {}),
    "optimizer.params.lr": (
        {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}},
        {"optimizer": {"type": "SGD", "params": {"lr": 2.0}}},
    ),
}


def _start_with_settings(rank: int, world: int, key: str) -> Exception | None:
    return caught(lambda: engine_over_terms(SETTINGS[key][rank]))


@pytest.mark.parametrize("key", SETTINGS)
def test_ranks_with_different_settings_name_the_first_key(key: str) -> None:
    for error in ranks.shared(2, _start_with_settings, key, timeout=LIMIT):
        assert_told(error, PlanMismatch, f"{key} is", "on rank 0 and", "on rank 1")


def _print_on_rank_0(rank: int, world: int) -> Exception | None:
    return caught(
        lambda: engine_over_terms({"steps_per_print": 10, "dump_state": True} if rank == 0 else {})
    )


def test_what_is_printed_may_differ_between_ranks() -> None:
    assert ranks.shared(2, _print_on_rank_0, timeout=LIMIT) == [None, None]


def _start_with_other_rates(rank: int, world: int, momentum: bool) -> Exception | None:
    model = Terms()
    different = {"momentum": 0.1 * rank} if momentum else {"lr": torch.tensor(1.0 + rank)}
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 1.0, **different})
    return caught(lambda: engine_over_terms(model=model, optimizer=optimizer))


@pytest.mark.parametrize("momentum", [False, True])
def test_ranks_whose_optimizers_have_other_numbers_do_not_start(momentum: bool) -> None:
    for error in ranks.shared(2, _start_with_other_rates, momentum, timeout=LIMIT):
        assert_told(error, PlanMismatch, "momentum" if momentum else "lr", "group 0", "on rank 1")


def _start_under_inference_mode(rank: int, world: int) -> Exception | None:
    with torch.inference_mode():
        return caught(engine_over_terms)


def test_nothing_starts_under_inference_mode() -> None:
    assert_told(ranks.shared(1, _start_under_inference_mode)[0], PlanError, "inference_mode")


def _start_twice(rank: int, world: int) -> tuple[Exception | None, Exception | None]:
    model = Terms()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    first = engine_over_terms(model=model, optimizer=optimizer)
    again = caught(lambda: engine_over_terms(model=model, optimizer=optimizer))
    engine_over_terms(model=model)
    return again, caught(lambda: first.backward(first(1.0, 1.0)))


def test_a_model_or_optimizer_that_has_an_engine_already_is_told_so() -> None:
    for again, first in ranks.shared(2, _start_twice, timeout=LIMIT):
        assert_told(again, PlanError, "not the model's", "engine has had")
        assert_told(first, StepError, "parameter a", "second initialize")


def _start_with_a_mistake_on_rank_1(rank: int, world: int) -> Exception | None:
    return caught(lambda: engine_over_terms({"gradient_cliping": 1.0} if rank == 1 else {}))


def test_a_configuration_mistake_on_one_rank_stops_all() -> None:
    innocent, culprit = ranks.shared(2, _start_with_a_mistake_on_rank_1, timeout=LIMIT)
    assert_told(culprit, ConfigError, "gradient_cliping", "gradient_clipping")
    assert_told(innocent, ZerortError, "rank 1", "gradient_cliping")


class _Shared(Terms):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(self.a.detach())


class _Complex(Terms):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


def all_frozen() -> nn.Module:
    return Terms().requires_grad_(False)


def used_optimizer() -> dict[str, Any]:
    model = Terms()
    optimizer = torch.optim.Adam(model.parameters())
    model(1.0, 1.0).backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def foreign_parameter() -> dict[str, Any]:
    model = Terms()
    return {
        "model": model,
        "optimizer": torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(7))], lr=1.0),
    }


def optimizer_of_another_model() -> dict[str, Any]:
    return {"model": Terms(), "optimizer": torch.optim.SGD(Terms().parameters(), lr=1.0)}


class _Columns(Terms):
    """Two parameters that interleave in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        matrix = torch.zeros(4, 2)
        self.a, self.b = nn.Parameter(matrix[:, 0]), nn.Parameter(matrix[:, 1])


def made_for_inference() -> nn.Module:
    with torch.inference_mode():
        return Terms()


class _Across(torch.optim.SGD):
    """Looks at all tensors: no step is longer than 1."""

    def step(self, closure: Any = None) -> None:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        length = torch.stack([p.grad.norm() for p in held]).norm().clamp(min=1.0)
        for p in held:
            p.data -= p.grad / length * self.param_groups[0]["lr"]


def with_optimizer(kind: Callable[..., Any], **options: Any) -> dict[str, Any]:
    model = Terms()
    return {"model": model, "optimizer": kind(model.parameters(), **options)}


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], list[str]]] = {
    "nothing_to_train": (lambda: {"model": all_frozen()}, PlanError, ["train"]),
    "shared_storage": (lambda: {"model": _Shared()}, PlanError, ["a", "b"]),
    "columns": (lambda: {"model": _Columns()}, PlanError, ["a and b", "interleaved", "clone()"]),
    "lazy": (
        lambda: {"model": nn.LazyLinear(4), **BY_NAME},
        PlanError,
        ["parameter weight", "forward"],
    ),
    "meta": (
        lambda: {"model": nn.Linear(4, 4, device="meta")},
        PlanError,
        ["parameter weight", "to_empty"],
    ),
    "no_parameters": (
        lambda: {"model": nn.ReLU(), **BY_NAME},
        PlanError,
        ["ReLU", "no parameters"],
    ),
    "made_for_inference": (
        lambda: {"model": made_for_inference()},
        PlanError,
        ["parameter a", "inference_mode"],
    ),
    "complex_parameter": (lambda: {"model": _Complex()}, PlanError, ["phase", "complex"]),
    "optimizer_with_state": (used_optimizer, PlanError, ["optimizer", "state"]),
    "parameter_of_another_model": (foreign_parameter, PlanError, ["(7,)"]),
    "optimizer_across_parameters": (
        lambda: with_optimizer(_Across, lr=1.0),
        ConfigError,
        ["_Across", "cannot run on shards", "stage 0"],
    ),
    "closure_optimizer": (
        lambda: with_optimizer(torch.optim.LBFGS),
        ConfigError,
        ["LBFGS", "every stage", "closure"],
    ),
    "optimizer_of_another_model": (
        optimizer_of_another_model,
        PlanError,
        ["not the model's, 2 of 2"],
    ),
    "no_optimizer": (
        lambda: {"model": Terms(), "optimizer": {"type": "AdamW"}},
        ConfigError,
        ["initialize(optimizer=...)", "got dict"],
    ),
    "no_module": (
        lambda: {"model": "gpt2", "optimizer": None},
        ConfigError,
        ["torch.nn.Module", "str"],
    ),
    "data_parallel": (
        lambda: {"model": nn.DataParallel(Terms())},
        ConfigError,
        ["DataParallel", "model.module"],
    ),
}


def _start(rank: int, world: int, name: str, stage: int) -> Exception | None:
    arguments, _, _ = REFUSED[name]
    return caught(lambda: engine_over_terms(at_stage(stage), **arguments()))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(name: str, world: int) -> None:
    _, kind, words = REFUSED[name]
    for error in ranks.shared(world, _start, name, 1, timeout=LIMIT):
        assert_told(error, kind, *words)


@pytest.mark.parametrize("name", ["complex_parameter", "shared_storage", "lazy"])
def test_what_cannot_be_sharded_is_refused_by_name(name: str) -> None:
    _, kind, words = REFUSED[name]
    for error in ranks.shared(2, _start, name, 3, timeout=LIMIT):
        assert_told(error, kind, *words)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_optimizers_that_no_stage_can_run_are_refused_at_stage_0(kind: Callable[..., Any]) -> None:
    error = caught(lambda: engine_over_terms(at_stage(0), **with_optimizer(kind)))
    assert_told(error, ConfigError, kind.__name__, "every stage")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"learning_rate": 1.0},
            "unexpected keyword argument 'learning_rate'; it takes lr, betas, eps",
        ),
        ({"lr": -1.0}, "AdamW cannot be built with {'lr': -1.0}: Invalid learning rate: -1.0"),
    ],
)
def test_an_optimizer_that_cannot_be_built_says_what_it_takes(
    params: dict[str, Any], message: str
) -> None:
    error = caught(lambda: engine_over_terms({"optimizer": {"type": "AdamW", "params": params}}))
    assert_told(error, ConfigError, message)


def test_a_refused_option_of_adam_is_told_without_a_second_complaint() -> None:
    error = caught(
        lambda: engine_over_terms(
            {"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}
        )
    )
    assert str(error).startswith("optimizer.params.bias_correction: expected true")


def test_a_name_that_neither_engine_nor_module_has_names_both() -> None:
    with pytest.raises(
        AttributeError, match="neither the engine nor its module Terms has 'save_chekpoint'"
    ):
        engine_over_terms().save_chekpoint("folder")


def _start_with_environment(rank: int, world: int, environment: dict[str, str]) -> Exception | None:
    os.environ.update(environment)
    return caught(engine_over_terms)


def test_a_rank_without_a_master_address_is_told_what_is_missing() -> None:
    (error,) = ranks.shared(
        1, _start_with_environment, {"RANK": "1", "WORLD_SIZE": "2"}, timeout=LIMIT
    )
    assert_told(error, ZerortError, "MASTER_ADDR")


def _start_with_trace(rank: int, world: int, path: str) -> Exception | None:
    return caught(lambda: engine_over_terms({"zerort": {"trace": {"path": path}}}))


def test_a_trace_that_cannot_be_written_is_refused_at_the_start(tmp_path: Any) -> None:
    path = str(tmp_path / "missing" / "trace.json")
    (tmp_path / "missing").write_text("a file where a folder should be")
    for error in ranks.shared(2, _start_with_trace, path, timeout=LIMIT):
        assert_told(error, ZerortError, "missing")
