"""Frozen parameters that no optimizer has, at stage 3: who is sharded, and what is done to them."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapters
import ranks
import zerort
from adapters import (
    assert_same,
    data,
    engine_over,
    is_held,
    made,
    persistent,
    settings,
    step,
    values,
)
from catching import assert_told, caught
from logged import log_lines
from training import keep
from zerort.zero import GatheredParameters


def unfrozen(rank: int, world: int) -> dict[str, Any]:
    """Once by all ranks, once by one, and once for a backward that nobody has announced."""
    other, model = engine_over(made(), settings(3)), made()
    weight = model.blocks[1].frozen.weight  # type: ignore[union-attr, operator]
    weight.grad = torch.ones(16, 16)  # of when it was trained
    engine = engine_over(model, settings(3))
    keep(engine)
    found: dict[str, Any] = {"stale": weight.grad is None}
    step(engine, 0, rank)
    for name, whose in (("all", (0, 1)), ("one", (1,))):
        weight.requires_grad_(rank in whose)
        found[name] = caught(lambda: step(engine, 7, rank))
        weight.requires_grad_(False)
        found[f"{name} grad"] = weight.grad is None
    weight.requires_grad_(True)

    def direct() -> None:
        engine(data(8, rank)).square().mean().backward()
        engine.step()

    found["direct"] = caught(direct)
    found["direct grad"] = weight.grad is None
    weight.requires_grad_(False)
    step(engine, 1, rank)
    step(other, 0, rank)
    step(other, 1, rank)
    found["differs"] = [
        n for n, v in values(engine.module).items() if not torch.equal(v, values(other.module)[n])
    ]
    return found


def test_unfreezing_what_no_optimizer_has_is_an_error_by_name() -> None:
    for rank, found in enumerate(ranks.run(2, unfrozen)):
        for name in ("all", "direct") + (("one",) if rank else ()):
            assert_told(
                found[name],
                zerort.StepError,
                "blocks.1.frozen.weight requires grad now",
                "give it to",
            )
        assert_told(found["one"], zerort.StepError, "blocks.1.frozen.weight requires grad now")
        assert found["all grad"] and found["one grad"] and found["direct grad"] and found["stale"]
        assert found["differs"] == []


def written(rank: int, world: int) -> dict[str, Any]:
    engine = engine_over(made(), settings(3))
    keep(engine)
    model, found = engine.module, dict[str, Any]()
    inside, early = model.blocks[0].frozen.weight, model.blocks[0].norm.weight
    version = inside._version
    step(engine, 0, rank)
    found["untouched"] = inside._version == version  # a graph that is kept over the step is good
    with GatheredParameters([inside, early], modifier_rank=1):
        if rank == 1:
            inside.data.fill_(0.125)
            early.add_(1.0)
    step(engine, 1, rank)
    found["stays"] = {n: v.unique().tolist() for n, v in values(model).items() if "0.frozen.w" in n}
    found["seen"] = values(model)["blocks.0.norm.weight"].unique().tolist()

    def look_and_write() -> None:
        with GatheredParameters([inside]), torch.no_grad():
            inside.zero_()

    found["looking"] = caught(look_and_write)

    def write_in_forward() -> None:
        def scribble(module: nn.Module, args: Any) -> None:
            with torch.no_grad():
                module.weight.zero_()  # type: ignore[union-attr, operator]

        with model.blocks[1].norm.register_forward_pre_hook(scribble):
            step(engine, 2, rank)

    found["in forward"] = caught(write_in_forward)
    for name, call in {
        "outside": lambda: inside.add_(1.0),
        "read": inside.sum,
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.dumps(inside),
        "load": lambda: model.load_state_dict(made().state_dict()),
        "replaced": lambda: replace(engine, rank),
    }.items():
        found[name] = caught(call)
    found["meta"] = model.state_dict()["blocks.0.frozen.weight"].device.type
    found["master"] = zerort.utils.safe_get_full_fp32_param(inside)
    zerort.utils.safe_set_full_fp32_param(inside, torch.zeros(16, 16))
    step(engine, 3, rank)
    found["in the end"] = values(model)["blocks.0.frozen.weight"].unique().tolist()
    return found


def replace(engine: Any, rank: int) -> None:
    block = engine.module.blocks[2]
    old, block.frozen.weight = block.frozen.weight, nn.Parameter(torch.ones(16, 16), False)
    try:
        step(engine, 9, rank)
    finally:
        block.frozen.weight = old


@ranks.once(None)
def written_once() -> list[dict[str, Any]]:
    return ranks.run(2, written)


def test_what_is_written_where_it_is_whole_goes_to_the_shards_and_stays() -> None:
    for found in written_once():
        assert found["stays"] == {"blocks.0.frozen.weight": [0.125]}
        assert found["seen"] == [2.0]
        assert found["untouched"]
        assert found["master"] is None
        assert found["in the end"] == [0.125]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("looking", ("blocks.0.frozen.weight was written inside GatheredParameters",)),
        ("in forward", ("blocks.1.norm.weight", "GatheredParameters")),
        ("outside", ("blocks.0.frozen.weight is sharded", "modifier_rank=0")),
        ("read", ("blocks.0.frozen.weight is sharded", "outside a forward")),
        ("deepcopy", ("is sharded, and copy.deepcopy", "GatheredParameters")),
        ("pickle", ("blocks.0.frozen.weight is sharded, and pickle",)),
        ("replaced", ("blocks.2.frozen.weight has been replaced",)),
    ],
)
def test_what_would_be_lost_or_read_what_is_not_there_is_named(
    how: str, words: tuple[str, ...]
) -> None:
    for found in written_once():
        assert_told(found[how], zerort.StepError, *words)
        assert "modifier_rank=0" in str(found["load"])
        assert found["meta"] == "meta"


# Who is sharded, and who is not.


class Odd(nn.Module):
    """Frozen parameters of every kind."""

    def __init__(self) -> None:
        super().__init__()
        frozen = partial(nn.Parameter, requires_grad=False)
        self.trained = nn.Linear(16, 16)
        self.plain = frozen(torch.randn(16, 16))
        self.turned = frozen(torch.randn(16, 8).t())
        self.long = frozen(torch.randn(16, 16, dtype=torch.float64))
        self.short = frozen(torch.randn(16, 16).half())
        self.gaps = frozen(torch.randn(16, 32)[:, ::2])
        self.codes = frozen(torch.randint(0, 9, (16, 16), dtype=torch.int8))
        self.eighth = frozen(torch.randn(16, 16).to(torch.float8_e4m3fn))
        self.spread = frozen(torch.randn(16, 1).expand(16, 16))
        shared = torch.randn(24, 16)
        self.over, self.under = frozen(shared[:16]), frozen(shared[8:])
        self.sparse = frozen(torch.zeros(3))  # what an embedding has a flag of that name for
        self.empty = frozen(torch.zeros(0, 4))
        self.unheld = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        for name in ("plain", "long", "short", "gaps", "spread", "over", "under", "unheld"):
            x = torch.tanh(x @ getattr(self, name).float())
        return self.trained(x + torch.cat([self.turned, self.turned]).t()[:4].mean())  # type: ignore[no-any-return]


SHARDED = {"plain", "turned", "long", "short", "gaps", "sparse", "trained.weight", "trained.bias"}


def odd(rank: int, world: int) -> dict[str, Any]:
    found = dict[str, Any]()
    for stage in (2, 3):
        model = made(Odd)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.trained.parameters(), lr=0.05)  # type: ignore[operator, union-attr]
        lines = log_lines()
        engine, *_ = zerort.initialize(model=model, optimizer=optimizer, config=settings(stage))
        keep(engine)
        found["said"] = [line for line in lines if "never updated" in line or "whole on" in line]
        found["strides"] = [model.turned.stride(), model.gaps.stride()]  # type: ignore[union-attr, operator]
        found["held"] = {n for n, p in model.named_parameters() if is_held(p)}
        for number in range(2):
            step(engine, number, rank)
            model.unheld.grad = None  # type: ignore[union-attr]
        after = values(model)
        found["moved"] = {n for n in before if not same(before[n], after[n])}
        found[stage] = [engine.get_global_grad_norm(), after["trained.weight"]]
    return found


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.float(), b.float())


def test_what_is_no_plain_array_of_its_own_stays_whole() -> None:
    for rank, found in enumerate(ranks.run(2, odd)):
        assert found["held"] == SHARDED | {"empty"}
        assert found["moved"] == {"trained.weight", "trained.bias"}
        assert found["strides"] == [(1, 8), (16, 1)]
        never, whole = found["said"] if rank == 0 else ("unheld", "")
        assert never.endswith("unheld")
        assert rank or whole.endswith(": codes, eighth, spread, over, under, unheld")
        assert found[2][0] == found[3][0] and torch.equal(found[2][1], found[3][1])


def parted(rank: int, world: int) -> Exception | None:
    model = made()
    if rank == 1:
        model.blocks[0].norm.weight.requires_grad_(True)  # type: ignore[union-attr, operator]
    return caught(lambda: engine_over(model, settings(3)))


def test_ranks_that_freeze_different_parameters_are_told() -> None:
    for error in ranks.run(2, parted):
        words = ("blocks.0.norm.weight [16] float32 (in no group)", "(group 0) on rank 1")
        assert_told(error, zerort.errors.PlanMismatch, *words)


class Tiny(nn.Module):
    """One parameter trains: fewer than ranks, and most ranks own nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scale  # type: ignore[no-any-return]


def tiny(rank: int, world: int) -> list[list[Any]]:
    found = []
    for config in (settings(2), settings(3), persistent(1)):
        engine = engine_over(made(Tiny), config)
        keep(engine)
        found.append(adapters.train(engine, rank))
    return found


def test_one_adapter_on_three_ranks_trains_all_the_same() -> None:
    for whole, *others in ranks.run(3, tiny):
        for other in others:
            assert_same(whole, other)


def traced(rank: int, world: int, path: str) -> list[str]:
    config = settings(3, room=600)
    config["zerort"]["trace"] = {"enabled": True, "path": path}
    engine = engine_over(made(), config)
    adapters.train(engine, rank)
    held = [b.id for b in engine._parts.reduction.plan.buckets if b.group is None]
    engine.destroy()
    return [f"all_gather b{number}" for number in held]


def test_a_trace_names_the_gathers_of_the_base(tmp_path: Any) -> None:
    path = str(tmp_path / "trace.json")
    gathers = ranks.run(2, traced, path)[0]
    text = "".join(file.read_text() for file in tmp_path.iterdir())
    assert len(gathers) > 3
    assert all(f'"{gather}"' in text for gather in gathers)
