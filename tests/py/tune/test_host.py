"""What a bucket costs its host, tried beside a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import zerort
from zerort.run import waits
from zerort.run.waits import Busy, Waits
from zerort.tune import host
from zerort.tune.host import measure_host
from zerort.tune.profile import Observer

BUCKETS = 6


class Clock:
    """Stands still until something is said to take a while."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float, what: Callable[..., Any]) -> Callable[..., Any]:
        """`what`, which takes so long."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return what(*args, **kwargs)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made)
    monkeypatch.setattr(waits, "perf_counter", made)
    return made


def engine_of(optimizer: Any = torch.optim.AdamW, **config: Any) -> Any:
    """Of one rank, whose layers have a bucket each."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(BUCKETS)))
    engine, *_ = zerort.initialize(
        model=model,
        optimizer=optimizer(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": None,
            "zerort": {"bucket_bytes": 1024},
            **config,
        },
    )
    assert len(engine._parts.reduction.plan.buckets) == BUCKETS
    return engine


def step(engine: Any) -> None:
    engine.backward(engine(torch.ones(1, 16)).sum())
    engine.step()


def figures(engine: Any) -> host.Host:
    parts = engine._parts
    return measure_host(parts.mesh, parts.boundary.flat, parts.boundary.optimizer)


def test_a_price_is_told_from_next_to_nothing_and_from_much(clock: Clock) -> None:
    def run_of(numel: int) -> Callable[[], object]:
        return clock.takes(5e-5 + 2e-9 * (numel - 16), lambda: None)

    found = host._line(run_of, 1 << 20, nbytes=4)
    assert (found.alpha, found.beta) == pytest.approx((5e-5, 5e-10))
    # where much took no longer, a byte costs nothing
    assert host._line(lambda numel: clock.takes(1 / numel, lambda: None), 1 << 20).beta == 0.0


def test_an_optimizer_is_tried_and_stays_as_it_is() -> None:
    engine = engine_of()
    step(engine)
    optimizer = engine._parts.boundary.optimizer.optimizer
    before = [
        (key, value.clone()) for state in optimizer.state.values() for key, value in state.items()
    ]
    weights = [p.detach().clone() for p in engine.module.parameters()]
    random = torch.get_rng_state()
    found = figures(engine)
    assert found.update is not None and found.update.alpha > 0
    for line in (found.pack, found.sums, found.update):
        assert line.alpha >= 0 and line.beta >= 0
    after = [pair for state in optimizer.state.values() for pair in state.items()]
    assert [key for key, _ in before] == [key for key, _ in after]
    assert all(torch.equal(old, new) for (_, old), (_, new) in zip(before, after, strict=True))
    assert all(map(torch.equal, weights, engine.module.parameters()))
    assert torch.equal(random, torch.get_rng_state())
    engine.destroy()


class Own(torch.optim.SGD):
    """The user's."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        type(self).steps += 1
        return super().step(closure)


class Broken(torch.optim.SGD):
    """Cannot be tried."""


def test_nobodys_own_optimizer_is_stepped_behind_its_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(Own)
    Own.steps = 0
    assert figures(engine).update is None
    assert Own.steps == 0
    engine.destroy()
    watched = engine_of()
    heard: list[object] = []
    own = watched._parts.boundary.optimizer.optimizer
    own.register_step_pre_hook(lambda *_: heard.append(1))
    assert figures(watched).update is None
    assert not heard
    watched.destroy()
    broken = engine_of()
    monkeypatch.setattr(host.Twin, "step", lambda self: 1 / 0)
    assert figures(broken).update is None
    broken.destroy()


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_whole_matrices_are_as_many_in_whatever_buckets_they_lie(name: str) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip(f"torch has no {name}")
    engine = engine_of(getattr(torch.optim, name))
    assert figures(engine).update is None
    engine.destroy()


def test_work_within_itself_counts_once_and_waiting_not(clock: Clock) -> None:
    counted = Waits.__new__(Waits)
    counted.seconds = 0.0
    busy = Busy(counted)
    with busy:
        clock.now += 1.0
        with busy:
            clock.now += 2.0
        clock.now += 4.0
        counted.seconds += 4.0
    clock.now += 8.0
    assert busy.seconds == 3.0
    with pytest.raises(ZeroDivisionError), busy:
        clock.now += 16.0
        raise ZeroDivisionError
    assert busy.seconds == 19.0


def timed(engine: Any, clock: Clock) -> None:
    """A layer's gradient takes 1 s, packing a bucket 10 s, updating one 100 s."""
    parts = engine._parts
    for transport in parts.reduction.local._sources.values():
        transport.pack = clock.takes(10.0, transport.pack)
    for layer in engine.module:
        layer.weight.register_hook(clock.takes(1.0, lambda gradient: None))
    optimizer = parts.boundary.optimizer
    own = optimizer.step

    def update(factor: float, batch: Any) -> None:
        clock.now += 100.0 * len(batch)
        own(factor, batch)

    optimizer.step = update


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_backward_is_observed_without_what_its_buckets_cost(
    clock: Clock, stage: int, micro_batches: int
) -> None:
    """Below stage 2 the last micro-batch alone is reduced."""
    engine = engine_of(
        gradient_accumulation_steps=micro_batches, zero_optimization={"stage": stage}
    )
    timed(engine, clock)
    observer = Observer(engine._parts)
    for _ in range(3):
        observer.start()
        for _ in range(micro_batches):
            step(engine)
        clock.now += 7.0
        observer.crossed()
    observer.close()
    found = observer.profile()
    passes = micro_batches if stage == 2 else 1
    assert found.backward == pytest.approx(BUCKETS)
    assert found.reducing == pytest.approx(10.0 * BUCKETS * passes)
    assert found.update == pytest.approx(100.0 * BUCKETS)
    assert found.other == pytest.approx(7.0)
    # a tensor pre-hook of the observer's is called before the user's, which was registered later
    first = min(found.arrivals)
    assert [at - first for at in found.arrivals] == pytest.approx([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    engine.destroy()
