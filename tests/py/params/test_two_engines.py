"""Two engines of stage 3 in one process, of which ranks run different numbers of forwards."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from adapters import WIDTH, data, engine_over, made, settings, values
from catching import assert_told, caught
from training import keep
from zerort.errors import CommError
from zerort.params.hall import HALL
from zerort.params.roll import Diverged
from zerort.zero import GatheredParameters


class Net(nn.Module):
    """Layers in an order that may change."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.order = list(range(layers))
        self.inside: Callable[[], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        for number in self.order:
            x = x + torch.tanh(self.layers[number](x))
            if self.inside is not None:
                self.inside()
        return x


class Critic(Net):
    """Another class, whose name errors tell."""


def policy_and_reference(room: int | None = None) -> tuple[Any, Any]:
    policy = engine_over(made(Net, 3), settings(3, room))
    reference = zerort.initialize(model=made(Critic, 4), config=settings(3, room))[0]
    return policy, reference


def step(policy: Any, reference: Any, number: int, rank: int) -> None:
    with torch.no_grad():
        known = reference(data(number, rank))
    policy.backward((policy(data(number, rank)) - known).square().mean())
    policy.step()


def evaluate(engine: Any, truth: nn.Module | None, rank: int) -> None:
    number = random.Random(rank).randrange(1000)
    with torch.no_grad():
        found = engine(data(number, rank))
    if truth is not None:
        assert torch.equal(found, truth(data(number, rank)))


# Uneven numbers of forwards


def uneven(rank: int, world: int) -> None:
    """Each rank evaluates more on the other engine, at all places where the peer may be."""
    policy, reference = policy_and_reference()
    truth = made(Critic, 4)
    before = made(Net, 3)
    for _ in range(3 if rank == 0 else 0):
        evaluate(policy, before, rank)
    for _ in range(3 if rank == 1 else 1):
        evaluate(reference, truth, rank)
    for number in range(3):
        step(policy, reference, number, rank)
        for _ in range((number + rank) % 3):
            evaluate(reference, truth, rank)
        for _ in range((number + 2 * rank) % 3):
            evaluate(policy, None, rank)
    with GatheredParameters(list(policy.module.parameters())):
        evaluate(policy, None, rank)
    for _ in range(2 if rank == 0 else 0):
        evaluate(reference, truth, rank)
    policy.destroy()
    for _ in range(2 if rank == 1 else 0):
        evaluate(reference, truth, rank)
    reference.destroy()


def nested(rank: int, world: int) -> None:
    """One engine's forward calls the other, on one rank more often."""
    policy, reference = policy_and_reference(room=1)
    truth, plain = made(Critic, 4), made(Net, 3)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, eps=1e-3)
    for number in range(6):
        calls = 0

        def inside(number: int = number) -> None:
            nonlocal calls
            calls += 1
            if number > 2 and rank == number % 2 and calls == 2:
                evaluate(reference, truth, rank)

        policy.module.inside = inside
        loss = policy(data(number, rank)).square().mean()
        for _ in range(2 if rank == 1 else 0):
            evaluate(policy, None, rank)
        policy.backward(loss)
        policy.step()
        policy.module.inside = None
        sums = sum(plain(data(number, other)).square().mean() for other in range(world)) / world
        sums.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in values(policy.module).items():
        torch.testing.assert_close(value, dict(plain.named_parameters())[name], atol=1e-5, rtol=0)
    keep(policy)
    keep(reference)


def at_random(rank: int, world: int, seed: int) -> None:
    """Programs in which ranks agree on what trains, and on nothing else."""
    policy, reference = policy_and_reference(room=300 if seed % 2 else None)
    other = engine_over(made(Critic, 5), settings(3, cap=700))
    truth = made(Critic, 4)
    twin = engine_over(made(Net, 3), settings(2))
    common, own = random.Random(seed), random.Random(100 * seed + rank)
    engines = {"policy": policy, "reference": reference, "other": other}
    for number in range(8):
        for _ in range(own.randrange(4)):
            name = own.choice(list(engines))
            engine = engines[name]
            engine.module.order = own.sample(range(3), 3)
            with torch.no_grad():
                found = engine(data(number, rank))
                if name == "reference":
                    truth.order = engine.module.order
                    assert torch.equal(found, truth(data(number, rank)))
            engine.module.order = truth.order = [0, 1, 2]
        match common.choice(["step", "step", "other", "gather", "save"]):
            case "step":
                policy.backward(policy(data(number, rank)).square().mean())
                policy.step()
                twin.backward(twin(data(number, rank)).square().mean())
                twin.step()
            case "other":
                other.backward(other(data(number, rank)).square().mean())
                other.step()
            case "gather":
                with GatheredParameters(list(reference.module.parameters())):
                    for one, two in zip(
                        reference.module.parameters(), truth.parameters(), strict=True
                    ):
                        assert torch.equal(one, two)
            case "save":
                reference.module_state_dict()
    found, expected = values(policy.module), values(twin.module)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-6)
    for engine in engines.values():
        keep(engine)
    keep(twin)


# What cannot be


def parted(rank: int, world: int) -> None:
    """Ranks train different engines: both are named, at once, and all goes on."""
    policy, reference = policy_and_reference()
    other = engine_over(made(Critic, 5), settings(3))
    step(policy, reference, 0, rank)
    began = time.monotonic()
    if rank == 0:
        error = caught(lambda: policy(data(0, rank)))
    else:
        error = caught(lambda: other(data(0, rank)))
    assert time.monotonic() - began < 10
    assert_told(
        error,
        Diverged,
        "different engines: rank 0 begins a training forward",
        "of engine 0 (Net); rank 1 begins a training forward",
        "of engine 2 (Critic)",
    )
    for number in range(1, 3):
        step(policy, reference, number, rank)
        other.backward(other(data(number, rank)).mean())
        other.step()
    assert policy.global_steps == 3 and other.global_steps == 2
    for engine in (policy, reference, other):
        keep(engine)


def collected(rank: int, world: int) -> None:
    """A rank has dropped an engine that the other still evaluates on."""
    policy, reference = policy_and_reference()
    if rank == 1:
        del reference
        gc.collect()
        error = caught(lambda: policy(data(0, rank)))
    else:
        error = caught(lambda: evaluate(reference, None, rank))
    assert_told(error, Diverged, "rank 1 has no engine of stage 3 any more", "engine 1")
    assert policy.module is not None
    policy.backward(policy(data(1, rank)).mean())
    policy.step()
    keep(policy)


def fails(rank: int, world: int) -> None:
    """A rank gives its engines back after an exception while its peer is in the other's call."""
    policy, reference = policy_and_reference()
    if rank == 1:
        try:
            raise KeyError("no luck")
        except KeyError:
            reference.destroy()
            policy.destroy()
        return
    error = caught(lambda: policy(data(0, rank)))
    assert_told(error, CommError, "rank 1", "destroy() while it handles an exception")
    error = caught(lambda: evaluate(reference, None, rank))
    assert_told(error, Diverged, "rank 1", "destroy() while it handles an exception")
    reference.destroy()
    policy.destroy()


def comes_and_goes(rank: int, world: int) -> None:
    """Engines are made and given back, in other orders than they came, with evaluations between."""
    first = zerort.initialize(model=made(Critic, 1), config=settings(3))[0]
    assert HALL._control is None
    evaluate(first, made(Critic, 1), rank)
    second = zerort.initialize(model=made(Critic, 2), config=settings(3))[0]
    assert HALL._control is not None
    for _ in range(1 + rank):
        evaluate(first, made(Critic, 1), rank)
    for _ in range(2 - rank):
        evaluate(second, made(Critic, 2), rank)
    first.destroy()
    third = zerort.initialize(model=made(Critic, 3), config=settings(3))[0]
    for _ in range(2 - rank):
        evaluate(third, made(Critic, 3), rank)
    for _ in range(1 + rank):
        evaluate(second, made(Critic, 2), rank)
    third.destroy()
    second.destroy()
    assert not list(HALL._callers)
    last = zerort.initialize(model=made(Critic, 1), config=settings(3))[0]
    assert HALL._control is None
    for _ in range(1 + rank):
        evaluate(last, made(Critic, 1), rank)
    last.destroy()


@pytest.mark.parametrize("flow", [uneven, nested, parted, collected, fails, comes_and_goes])
def test_two_engines(flow: Callable[..., None]) -> None:
    ranks.run(2, flow, timeout=40)


@pytest.mark.parametrize("seed", range(6))
def test_ranks_that_call_engines_at_random_hang_nowhere_and_compute_rightly(seed: int) -> None:
    ranks.run(2 if seed else 3, at_random, seed, timeout=60)


def news_behind_another_call(rank: int, world: int) -> None:
    """Rank 0 has seen something new before a call that all make together, and behind that a rank
    fails in the middle of a window: it learns nothing alone.
    """
    config = settings(3, 300, gradient_accumulation_steps=2)
    engine = engine_over(made(Net, 3), config)

    def window(fails: bool = False) -> None:
        for micro in range(2):
            if fails and not micro and rank == 1:
                assert isinstance(caught(lambda: engine(torch.zeros(1, 3))), RuntimeError)
            else:
                engine.backward(engine(data(micro, rank)).square().mean())
            failed = caught(engine.step)
            assert (failed is not None) == (fails and micro == 1), failed

    window()
    engine.module.order = [2, 0, 1]
    evaluate(engine, None, rank)
    engine.module.order = [0, 1, 2]
    with GatheredParameters([engine.module.layers[0].weight]):
        pass
    window(fails=True)
    window()
    assert engine.was_step_applied()
    keep(engine)


def test_what_is_new_is_learnt_by_all_ranks_or_none() -> None:
    ranks.run(2, news_behind_another_call, timeout=40)
