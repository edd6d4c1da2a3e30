"""A model of stage 3 whose engine has gone keeps its values, in shards, for the next engine."""

from __future__ import annotations

import copy
import gc
import sys
import tempfile
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ranks
import zerort
from adapters import WIDTH, assert_same, data, engine_over, is_held, made, settings, train, values
from catching import assert_told, caught
from training import keep
from weighing import alive, covered
from zerort.errors import ConfigError, PlanError, StepError
from zerort.params.homes import HOMES
from zerort.zero import GatheredParameters, Init
from zerort.zero import init as births


class Net(nn.Module):
    """Layers of several shapes and formats, tied weights, an empty parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        seen = self.conv(x.view(-1, 2, 2, WIDTH // 4)).mean()
        return self.last(x) + self.shift + seen + self.empty.sum()


def kept(engine: Any) -> Any:
    keep(engine)
    return engine


def net(seed: int = 3) -> Any:
    return made(Net, seed)


def forward_only(model: nn.Module, **more: Any) -> Any:
    return zerort.initialize(model=model, config=settings(3, **more))[0]


def same(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    different = [name for name in truth if not torch.equal(found[name], truth[name])]
    assert not different, different


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def next_engines(rank: int, world: int) -> None:
    """Validate, then fit: at another cut of buckets, at other stages, in other dtypes."""
    nexts: list[Callable[[Any], Any]] = [
        lambda model: engine_over(model, settings(3)),
        lambda model: engine_over(model, settings(3, cap=1000)),
        lambda model: engine_over(model, settings(2)),
        lambda model: engine_over(model, settings(0)),
        lambda model: engine_over(model, settings(3, bf16={"enabled": True})),
    ]
    for make in nexts:
        truth = train(kept(make(net())), rank)
        model = net(3 if rank == 0 else 99)
        first = forward_only(model, cap=200)
        with torch.no_grad():
            expected = net()(data(0, rank))
            assert torch.equal(first(data(0, rank)), expected)
        first.destroy()
        assert all(is_held(p) for p in model.parameters() if p.numel())
        assert_same(train(kept(make(model)), rank), truth)


def fit_then_more(rank: int, world: int) -> None:
    """What training left is evaluated and trained on, collected or destroyed."""
    for dtype in ({}, {"bf16": {"enabled": True}}):
        model = net()
        engine = engine_over(model, settings(3, **dtype))
        truth = train(engine, rank)[1]
        engine.destroy()
        engine.destroy()
        del engine
        for cap, way in ((150, "destroy"), (900, "collect")):
            engine = zerort.initialize(model=model, config=settings(3, cap=cap, **dtype))[0]
            same(values(model), truth)
            if way == "destroy":
                engine.destroy()
            del engine
            gc.collect()
        same(values(model), truth)
        below = kept(zerort.initialize(model=model, config=settings(1, **dtype))[0])
        same(whole(below.module), truth)
        assert not HOMES


def held_meanwhile(rank: int, world: int) -> None:
    """Between two engines the values can be looked at, written, copied and saved."""
    model, truth = net(), whole(net())
    forward_only(model).destroy()
    weight = model.layers[1].weight
    for touch in (lambda: weight + 1, weight.zero_, lambda: model(data(0, rank))):
        assert_told(caught(touch), StepError, "is sharded and in no engine", "GatheredParameters")
    assert all(v.is_meta for n, v in model.state_dict().items() if n not in ("shift", "empty"))
    same(values(model), truth)
    with GatheredParameters([weight, model.conv.weight], modifier_rank=world - 1):
        if rank == world - 1:
            weight.data.mul_(2)
            model.conv.weight.data.zero_()
    truth["layers.1.weight"] *= 2
    truth["conv.weight"].zero_()
    with GatheredParameters(weight, modifier_rank=0):
        weight.data = truth["layers.1.weight"] + 1  # memory of its own
    truth["layers.1.weight"] += 1
    twin = copy.deepcopy(model)
    for each in (twin, model):
        with GatheredParameters(list(each.parameters())):
            same({n: v for n, v in each.state_dict().items() if n in truth}, truth)
    engine = kept(engine_over(model, settings(3, cap=1000)))
    same(values(engine.module), truth)
    forward_only(twin).destroy()
    same(values(twin), truth)


def dropped(rank: int, world: int) -> None:
    """A model that is dropped behind its engine takes all with it."""
    before = set(map(id, HOMES))
    model = net()
    engine = forward_only(model)
    engine.destroy()
    left = [weakref.ref(p) for p in model.parameters()]
    memory = weakref.ref(births.born_of(model.first.weight).part.untyped_storage())
    model_left = weakref.ref(model)
    del model
    engine.module = None
    del engine
    gc.collect()
    assert model_left() is None
    assert not any(one() is not None for one in left)
    assert memory() is None
    assert set(map(id, HOMES)) == before
    assert births._nursery is not None and not births._nursery._born
    if world > 1:
        dist.barrier()
    kept(forward_only(net()))
    assert births._nursery is None


def weighed(rank: int, world: int) -> float:
    """The most that a rank has while the values change engines, as a part of the whole model's."""
    gc.collect()
    gc.freeze()
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(16)))
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    first = zerort.initialize(model=model, config=settings(3, cap=128 * 128))[0]
    first.destroy()
    most = 0.0
    fill = births.Born.fill

    def weighing(born: Any, view: Tensor) -> None:
        nonlocal most
        fill(born, view)
        most = max(most, covered(alive()) / size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(births.Born, "fill", weighing)
        second = kept(zerort.initialize(model=model, config=settings(3, cap=2 * 128 * 128))[0])
    assert all(map(is_held, second.module.parameters()))
    return most


def failing(rank: int, world: int) -> None:
    """An initialize that fails, before values are moved and behind it, leaves them in shards."""
    truth = whole(net())
    model = net()
    forward_only(model).destroy()
    for _ in range(2):
        error = caught(lambda: zerort.initialize(model=model, config={**settings(3), "no": 1}))
        assert_told(error, ConfigError, "no")
        with pytest.MonkeyPatch.context() as patch:
            for where in ("Reduction", "Engine"):
                if rank == 1:
                    patch.setattr(sys.modules["zerort.initialize"], where, raising)
                error = caught(lambda: forward_only(model, cap=500))
                assert_told(error, PlanError if rank == 0 else KeyError, "no luck")
                patch.undo()
                assert all(is_held(p) for p in model.parameters() if p.numel()), where
    same(values(kept(forward_only(model)).module), truth)
    born = net()
    with Init():
        twin = Net()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(sys.modules["zerort.initialize"], "Reduction", raising)
        for each in (born, twin):
            caught(lambda each=each: forward_only(each))
    same(values(kept(forward_only(born)).module), truth)
    forward_only(twin).destroy()


def raising(*_: Any, **__: Any) -> None:
    raise KeyError("no luck")


def broken(rank: int, world: int) -> None:
    """Behind a forward that raised the values are right; behind a torn update they are nobody's."""
    model = net()
    engine = engine_over(model, settings(3))
    if rank == 0:
        caught(lambda: engine(torch.zeros(2, WIDTH + 1)))
    else:
        caught(lambda: engine.backward(engine(data(0, rank)).mean()))
    caught(engine.step)
    engine.destroy()
    same(values(model), whole(net()))
    engine = engine_over(model, settings(3))
    engine.backward(engine(data(0, rank)).mean())
    if rank == 1:
        engine.optimizer.step = raising
    caught(engine.step)
    engine.destroy()
    if rank == 1:
        error = caught(lambda: model.first.weight + 1)
        assert_told(error, StepError, "whose values went with its engine", "middle of an update")
    error = caught(lambda: forward_only(model))
    assert_told(error, PlanError, "parameter")
    model = net()
    engine = engine_over(model, settings(3))
    engine._parts.boundary.flat.state += rank  # as when one has heard of a vote, and not the other
    engine.destroy()
    for call in (lambda: values(model), lambda: forward_only(model)):
        assert_told(caught(call), PlanError, "two states of the model", "behind 0", "behind 1")


def unlike(rank: int, world: int) -> None:
    """Ranks whose models are at different places."""
    used, fresh = net(), net()
    forward_only(used).destroy()
    error = caught(lambda: forward_only(used if rank == 0 else fresh))
    assert_told(error, PlanError, "in the shards of engine", "on rank 0", "whole on rank 1")
    other = net()
    forward_only(other).destroy()
    error = caught(lambda: forward_only(used if rank == 0 else other))
    assert_told(error, PlanError, "the same model on all ranks")
    same(values(kept(forward_only(used)).module), whole(net()))


def inside(rank: int, world: int) -> None:
    """An engine that is destroyed while parameters are kept whole leaves those whole."""
    model, truth = net(), whole(net())
    engine = forward_only(model)
    with GatheredParameters([model.first.weight]):
        engine.destroy()
        assert torch.equal(model.first.weight, truth["first.weight"])
    assert torch.equal(model.first.weight, truth["first.weight"])
    same(values(kept(forward_only(model)).module), truth)


@pytest.mark.parametrize(
    "flow",
    [
        next_engines,
        fit_then_more,
        held_meanwhile,
        dropped,
        failing,
        broken,
        unlike,
        inside,
    ],
)
def test_values_stay_in_shards(flow: Callable[..., None]) -> None:
    ranks.run(2, flow)


def test_no_rank_holds_the_model_while_it_changes_engines() -> None:
    for most in ranks.run(2, weighed):
        assert 0.5 < most < 0.5 + 4 / 16 + 0.01


def renumbered(rank: int, world: int, folder: str) -> None:
    """The job is made anew, its ranks in another order; then each rank alone."""
    model = net()
    forward_only(model).destroy()
    rejoin(f"{folder}/turned", (rank + 1) % world, world)
    same(values(model), whole(net()))
    engine = forward_only(model, cap=700)
    same(values(engine.module), whole(net()))
    engine.destroy()
    rejoin(f"{folder}/alone{rank}", 0, 1)
    for call in (lambda: values(model), lambda: forward_only(model)):
        assert_told(caught(call), PlanError, "an engine of 3 ranks", "none of the 1 ranks")


def rejoin(file: str, rank: int, world: int) -> None:
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )


def test_ranks_may_have_other_numbers_but_none_may_be_missing() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks.run(3, renumbered, folder)


def test_one_process_hands_over_too() -> None:
    for flow in (next_engines, fit_then_more, held_meanwhile, dropped):
        ranks.run(1, flow)
