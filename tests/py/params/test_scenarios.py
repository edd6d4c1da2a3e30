"""Stage 3 trains as a plain module does, however its modules are used, and goes on rightly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import ranks
import routes
import zerort
from routes import Net, engine_over, train


def plain(rank: int) -> None:
    train(rank, Net)


def tied(rank: int) -> None:
    train(rank, routes.Tied)


def outside_its_module(rank: int) -> None:
    train(rank, routes.Outside)


def module_twice(rank: int) -> None:
    train(rank, routes.Twice)


def views_changed_in_place(rank: int) -> None:
    train(rank, routes.Views)


def frozen_base_with_adapters(rank: int) -> None:
    train(rank, routes.Adapted)


def checkpointed(rank: int) -> None:
    train(rank, partial(Net, reentrant=False))


def checkpointed_reentrant(rank: int) -> None:
    train(rank, partial(Net, reentrant=True))


def side_losses(rank: int) -> None:
    train(rank, routes.SideLoss)


def views_of_a_parameter(rank: int) -> None:
    def between(engine: Any, step: int) -> None:
        evaluate(1, torch.no_grad, rank, engine, step)
        evaluate(1, torch.inference_mode, rank, engine, step)

    train(rank, routes.Aliases, between=between)


def functional_call(rank: int) -> None:
    train(rank, routes.Functional)


def evaluate(times: int, mode: Callable[[], Any], rank: int, engine: Any, step: int) -> None:
    engine.eval()
    with mode():
        for _ in range(times):
            engine(routes.data(50 + step, rank))
    engine.train()


def attention_with_its_fast_path(rank: int) -> None:
    train(rank, routes.Attention, between=partial(evaluate, 2, torch.no_grad, rank))


def evaluation(rank: int) -> None:
    train(rank, Net, between=partial(evaluate, 2, torch.no_grad, rank))


def evaluation_in_inference_mode(rank: int) -> None:
    train(rank, Net, between=partial(evaluate, 2, torch.inference_mode, rank))


def uneven_evaluation(rank: int) -> None:
    train(rank, Net, between=partial(evaluate, 1 + 3 * rank, torch.no_grad, rank))


def evaluation_without_the_engine(rank: int) -> None:
    def between(engine: Any, step: int) -> None:
        with torch.no_grad():
            for _ in range(1 + 2 * rank):
                engine.module(routes.data(60 + step, rank))

    train(rank, Net, between=between)


def moving_average(rank: int) -> None:
    """Copies that follow the weights, one of before and one of the engine's module."""
    copies: list[nn.Module] = []
    expected: list[Any] = []

    def follow(engine: Any, step: int) -> None:
        whole = list(engine.module.parameters())
        with zerort.zero.GatheredParameters(whole), torch.no_grad():
            if len(copies) == 1:
                copies.append(copy.deepcopy(engine.module))
                expected.extend([p.detach().clone() for p in each.parameters()] for each in copies)
            for each, values in zip(copies, expected, strict=True):
                for average, value, now in zip(each.parameters(), values, whole, strict=True):
                    average.lerp_(now, 0.25)
                    value.lerp_(now.detach(), 0.25)

    engine = train(rank, Net, 4, between=follow, prepare=lambda m: copies.append(copy.deepcopy(m)))
    before, within = copies
    for each, values in zip(copies, expected, strict=True):
        assert all(map(torch.equal, each.parameters(), values))
    # the copy of a module that has hooks is a plain one
    within.load_state_dict(before.state_dict())
    assert torch.equal(within(routes.data(9, rank)), before(routes.data(9, rank)))
    engine.destroy()
    assert torch.equal(within(routes.data(9, rank)), before(routes.data(9, rank)))


def other_order_on_one_rank(rank: int) -> None:
    train(
        rank,
        partial(Net, order=lambda order, step: order if rank == 0 or step == 0 else order[::-1]),
    )


def other_order_from_the_start(rank: int) -> None:
    train(rank, partial(Net, order=lambda order, step: order if rank == 0 else order[::-1]))


def layer_dropped_on_one_rank(rank: int) -> None:
    train(
        rank,
        partial(Net, order=lambda order, step: order if rank == 0 or step == 0 else order[1:]),
    )


def one_use_more_on_one_rank(rank: int) -> None:
    train(
        rank,
        partial(Net, order=lambda order, step: order if rank == 0 or step == 0 else [*order, 0, 1]),
    )


def another_use_each_step(rank: int) -> None:
    train(rank, partial(Net, order=lambda order, step: order + [0] * step), steps=5)


def compiled_blocks(rank: int) -> None:
    def compile_blocks(model: nn.Module) -> None:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(backend="aot_eager")

    train(rank, Net, prepare=compile_blocks)


def beside_a_twin(rank: int, take: Callable[[Any, nn.Module, int], None], gas: int = 1) -> None:
    """Three times `take(engine, twin, step)`, which trains both; they end alike."""
    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    engine = engine_over(model, routes.settings(gradient_accumulation_steps=gas))
    for step in range(3):
        take(engine, twin, step)
    assert routes.compare(engine, twin) < 1e-6


def retained_graph(rank: int) -> None:
    def take(engine: Any, twin: nn.Module, step: int) -> None:
        x = routes.data(step, rank)
        loss = routes.loss_of(engine(x))
        engine.backward(loss, retain_graph=True)
        engine.backward(loss)
        engine.step()
        routes.twin_step(twin, x, twice)

    def twice(loss: torch.Tensor) -> None:
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        loss.backward()  # type: ignore[no-untyped-call]

    beside_a_twin(rank, take)


def accumulation(rank: int) -> None:
    def take(engine: Any, twin: nn.Module, step: int) -> None:
        xs = [routes.data(10 * step + micro, rank) for micro in range(2)]
        for x in xs:
            engine.backward(routes.loss_of(engine(x)))
            engine.step()

        def both(loss: torch.Tensor) -> None:
            (sum(routes.loss_of(twin(x)) for x in xs) / 2).backward()  # type: ignore[union-attr]

        routes.twin_step(twin, xs[0], both)

    beside_a_twin(rank, take, gas=2)


def direct_backward(rank: int) -> None:
    def take(engine: Any, twin: nn.Module, step: int) -> None:
        x = routes.data(step, rank)
        routes.loss_of(engine(x)).backward()  # type: ignore[no-untyped-call]
        engine.step()
        routes.twin_step(twin, x, lambda loss: loss.backward())  # type: ignore[no-untyped-call]

    beside_a_twin(rank, take)


def slopes_of_hidden_tensors(rank: int) -> None:
    def slopes(engine: Any, step: int) -> None:
        seen: list[torch.Tensor] = []

        def see(module: nn.Module, args: Any, out: torch.Tensor) -> None:
            seen.append(out)

        handles = [block.register_forward_hook(see) for block in engine.module.blocks]
        loss = routes.loss_of(engine(routes.data(step, rank)))
        for handle in handles:
            handle.remove()
        assert all(float(g.abs().sum()) > 0 for g in torch.autograd.grad(loss, seen))

    train(rank, Net, between=slopes)


SCENARIOS = [
    slopes_of_hidden_tensors,
    plain,
    tied,
    outside_its_module,
    module_twice,
    views_changed_in_place,
    frozen_base_with_adapters,
    checkpointed,
    checkpointed_reentrant,
    side_losses,
    functional_call,
    views_of_a_parameter,
    attention_with_its_fast_path,
    evaluation,
    evaluation_in_inference_mode,
    uneven_evaluation,
    evaluation_without_the_engine,
    moving_average,
    other_order_on_one_rank,
    other_order_from_the_start,
    layer_dropped_on_one_rank,
    one_use_more_on_one_rank,
    another_use_each_step,
    compiled_blocks,
    retained_graph,
    accumulation,
    direct_backward,
]


def act(rank: int, world: int, name: str) -> None:
    scenario = next(each for each in SCENARIOS if each.__name__ == name)
    scenario(rank)


@pytest.mark.parametrize("name", [each.__name__ for each in SCENARIOS])
def test_it_trains_as_a_plain_module_does(name: str) -> None:
    ranks.shared(2, act, name, timeout=60)
