"""Frozen parameters that no optimizer has are sharded at stage 3 like the others, and cost their
values alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapters
import ranks
from adapters import (
    Model,
    adapters_of,
    assert_same,
    engine_over,
    is_held,
    made,
    persistent,
    settings,
)
from built import bytes_held
from training import keep
from weighing import alive, covered
from zerort.zero import Init
from zerort.zero.born import Born

EVERYTHING = 10**9


def nothing_unused() -> dict[str, Any]:
    """In one bucket, where a gradient that does not come is an error."""
    config = settings(3, cap=EVERYTHING)
    config["zero_optimization"]["ignore_unused_parameters"] = False
    return config


WAYS: dict[str, dict[str, Any]] = {
    "stage_0": settings(0),
    "stage_2": settings(2),
    "one_unit": settings(3, room=1, cap=1),
    "some_units": settings(3, room=1500),
    "everything": settings(3, room=EVERYTHING),
    "nothing_unused": nothing_unused(),
    # Adapters are whole then, and so is what is small of the base.
    "only_the_base": persistent(32),
}


def trained_each_way(rank: int, world: int, accumulation: int) -> dict[str, list[Any]]:
    found = {}
    for way, config in WAYS.items():
        model = made()
        engine = engine_over(model, {**config, "gradient_accumulation_steps": accumulation})
        keep(engine)
        frozen = [p for p in model.parameters() if not p.requires_grad and p.numel() > 32]
        assert all(map(is_held, frozen)) == ("stage" not in way), way
        assert all(b.sharded for b in engine._parts.reduction.plan.buckets if b.group is None)
        found[way] = adapters.train(engine, rank, steps=3 * accumulation)
        assert all(map(is_held, frozen)) == ("stage" not in way), way
    return found


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 2)])
def test_a_base_that_is_sharded_changes_no_bit(world: int, accumulation: int) -> None:
    for found in ranks.run(world, trained_each_way, accumulation):
        truth = found.pop("stage_2")
        if accumulation > 1:
            found.pop("stage_0")  # sums micro-batches before it reduces them
        for way, other in found.items():
            assert truth[0] == other[0], way
            assert_same(truth, other)


# However it is used.


def compiled(model: nn.Module) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="aot_eager")
    return model


def half_base(model: nn.Module) -> nn.Module:
    """As a base is loaded in bf16 under adapters in fp32: one unit has both dtypes."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


def as_it_is(model: nn.Module) -> nn.Module:
    return model


USES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module], Any]] = {
    "checkpointed": (partial(Model, reentrant=False), as_it_is, {}),
    "checkpointed_reentrant": (partial(Model, reentrant=True), as_it_is, {}),
    "compiled": (Model, compiled, {}),
    "bf16": (Model, as_it_is, {"bf16": {"enabled": True}}),
    "fp16": (Model, as_it_is, {"fp16": {"enabled": True, "initial_scale_power": 4}}),
    "autocast": (Model, half_base, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
}


def used(rank: int, world: int) -> dict[str, list[Any]]:
    found = {}
    for name, (make, change, more) in USES.items():
        for stage in (2, 3):
            engine = engine_over(change(made(make)), settings(stage, **more))
            keep(engine)
            found[f"{name} {stage}"] = adapters.train(engine, rank)
    return found


@ranks.once(None)
def used_once() -> list[dict[str, list[Any]]]:
    return ranks.run(2, used)


@pytest.mark.parametrize("name", USES)
def test_it_trains_however_frozen_modules_are_called(name: str) -> None:
    for found in used_once():
        assert_same(found[f"{name} 2"], found[f"{name} 3"])


# Where it comes from.


def born(rank: int, world: int, folder: str) -> dict[str, list[Any]]:
    """Built whole, in parts, with adapters that are put in afterwards, and from a file."""
    from safetensors.torch import save_file

    found = {"whole": adapters.train(engine_over(made(), settings(3)), rank)}
    torch.manual_seed(5 if rank == 0 else 77)
    with Init():
        model = Model()
    assert all(map(is_held, model.parameters()))
    found["born"] = adapters.train(engine_over(model, settings(3)), rank)

    whole = made()
    if rank == 0:
        stored = {n: t for n, t in whole.state_dict().items() if n != "last.weight"}
        save_file(stored, f"{folder}/model.safetensors")
    torch.distributed.barrier()
    with torch.device("meta"):
        model = Model()
    config = settings(3)
    config["zerort"]["load_from"] = folder
    found["loaded"] = adapters.train(engine_over(model, config), rank)
    return found


def test_it_may_be_born_sharded_or_read_from_files(tmp_path: Any) -> None:
    for found in ranks.run(2, born, str(tmp_path)):
        for other in ("born", "loaded"):
            assert_same(found["whole"], found[other])


class Adapted(nn.Module):
    """A layer that is there, and its adapter."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(300, 1, bias=False), nn.Linear(1, 300, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def taken(rank: int, world: int) -> dict[str, Any]:
    start = bytes_held()
    with Init(dtype=torch.bfloat16):
        base = nn.Sequential(*(nn.Linear(300, 300) for _ in range(16)))
    base.requires_grad_(False)
    model = nn.Sequential(*map(Adapted, base))
    peak, fill = 0, Born.fill

    def counting(of: Born, view: Tensor) -> None:
        nonlocal peak
        fill(of, view)
        peak = max(peak, bytes_held() - start)

    Born.fill = counting  # type: ignore[method-assign]
    config = {**settings(3, room=600_000, cap=190_000), "bf16": {"enabled": True}}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 500
    engine = engine_over(model, config)
    keep(engine)
    plan = engine._parts.reduction.plan
    return {
        "size": sum(p.numel() * 2 for p in base.parameters()),
        "trained": sum(p.numel() for p in adapters_of(model)),
        "unit": max(unit.numel for unit in plan.units) * 2,
        "units": len(plan.units),
        "peak": peak,
    }


def test_an_engine_takes_a_born_base_a_unit_at_a_time() -> None:
    for found in ranks.run(2, taken):
        assert found["units"] > 6
        beside = 40 * found["trained"] + found["unit"] / 10
        assert found["peak"] <= 1.02 * found["size"] / 2 + 1.5 * found["unit"] + beside


# What it costs.

WIDTH, LAYERS, WINDOW = 128, 12, 4
UNIT = WIDTH * WIDTH


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def weigh(rank: int, world: int, dtype: str) -> dict[str, int]:
    gc.freeze()
    before = covered(alive())
    model = nn.Sequential(*(Layer() for _ in range(LAYERS)))
    config = settings(3, room=3 * UNIT, cap=UNIT, bf16={"enabled": dtype == "bf16"})
    config["zerort"] = {**config.get("zerort", {}), "transport": "gloo"}  # lanes are counted
    engine = engine_over(model, config)
    at_start = covered(alive()) - before
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}
        most = max(most, sum(storage.nbytes() for storage in storages.values()))

    with torch._C.DisableTorchFunctionSubclass():
        for layer in model:
            layer.register_forward_hook(look)
            layer.register_full_backward_pre_hook(look)
    item = torch.bfloat16 if dtype == "bf16" else torch.float32
    for _ in range(3):
        x = torch.ones(1, WIDTH, dtype=item)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    del x
    at_rest = covered(alive()) - before
    keep(engine)
    buckets = engine._parts.reduction.plan.buckets
    lanes = 2 * sum(
        sorted((b.numel * item.itemsize for b in buckets if b.group is not None), reverse=True)[
            :WINDOW
        ]
    )
    return {"at_start": at_start, "at_rest": at_rest, "most": most, "lanes": lanes}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_frozen_base_costs_its_values_over_the_ranks(dtype: str) -> None:
    item = 2 if dtype == "bf16" else 4
    base, trained = LAYERS * UNIT * item, LAYERS * 4 * WIDTH * (18 if dtype == "bf16" else 16)
    for found in ranks.run(2, weigh, dtype):
        state = (base + trained) / 2
        assert found["at_start"] <= 1.02 * state + found["lanes"] + 8192
        assert state <= found["at_rest"] <= 1.02 * state + found["lanes"] + 8192
        assert 0 < found["most"] <= 3 * UNIT * item
