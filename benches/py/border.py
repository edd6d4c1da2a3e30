"""What the border costs: hooks that ask the core, against a hook that does nothing on every
parameter.

    python benches/py/border.py [--params 8000] [--rounds 15]

Medians of interleaved rounds, in nanoseconds of this thread's CPU time a parameter:

* `call` calls the hooks themselves, as autograd would, without autograd;
* `backward` runs a backward pass over that many scalar parameters: without hooks; with a hook
  after accumulation on each, which does nothing or asks the core (on CUDA, under a trace, where
  sentinels were dismissed); in the pass that observes, once in a training; and with sentinels, as
  in every pass after it;
* `observing hooks` puts the hooks of the observing pass on and takes them off;
* `engine` is `engine.backward` in one process, packing and summing included, with a hook on each
  and with sentinels;
* `dlpack` takes a flat buffer over and makes a tensor of it again, at setup, never per gradient.

The limit: at most 600 ns a parameter over the hook that does nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch

import zerort
from zerort import _core
from zerort.grads.hooks import ParameterHooks, plain_hook

LIMIT = 600.0
BUCKET = 80 * 16
"""Elements a bucket; every parameter starts on 64 bytes."""

Hook = Callable[[torch.Tensor], None]


def silent(_: int) -> Hook:
    def hook(_: torch.Tensor) -> None:
        return

    return hook


class Idle:
    """There is nothing to run."""

    def dispatch(self, param: int, hi: int) -> None:
        """Nothing."""


IDLE = Idle()


def asking(reducer: _core.Reducer) -> Callable[[int], Hook]:
    """What an engine registers on every parameter."""
    return lambda param: plain_hook(param, reducer, None, IDLE.dispatch)


def plan_of(params: int) -> _core.Plan:
    return _core.Plan([(1, "f32", 0, 0)] * params, world=2, stage=2, cap_elements=BUCKET)


def reducer_of(params: int) -> _core.Reducer:
    """A reducer past its first pass, which only observes."""
    reducer = _core.Reducer(plan_of(params))
    one_pass(reducer, range(params), reducer.grad_ready)
    return reducer


class Watching:
    """Scalars with the hooks that an engine puts on them, and nothing to run."""

    def __init__(self, count: int) -> None:
        self.params = scalars(count)
        self._plan = plan_of(count)
        self._renew()
        self.observe()

    def _renew(self) -> None:
        """As a new engine has them."""
        self.reducer = _core.Reducer(self._plan)
        self.reducer.post_sentinels()
        untraced: Any = SimpleNamespace(
            watch=SimpleNamespace(times_gradients=False), device=SimpleNamespace(blocks=True)
        )
        self._hooks = ParameterHooks(self.params, self.reducer, untraced, IDLE.dispatch)

    def observe(self) -> tuple[float, float]:
        """(a backward that observes, putting hooks on and taking them off)."""
        self._hooks.remove()
        self._renew()
        start = time.thread_time_ns()
        self._hooks.observe(self.reducer.watched)
        on = time.thread_time_ns() - start
        taken = in_pass(self.reducer, lambda: bare_backward(self.params))
        start = time.thread_time_ns()
        self._hooks.relieve()
        return taken, (on + time.thread_time_ns() - start) / len(self.params)

    def guarded(self) -> float:
        """A backward with sentinels."""
        self._hooks.attach(self.reducer.watched)
        return in_pass(self.reducer, lambda: bare_backward(self.params))


def one_pass(reducer: _core.Reducer, params: Iterable[int], ready: Callable[[int], object]) -> None:
    reducer.begin()
    for param in params:
        ready(param)
    reducer.finish()


def calls(hooks: list[Hook], gradient: torch.Tensor) -> float:
    start = time.thread_time_ns()
    for hook in hooks:
        hook(gradient)
    return (time.thread_time_ns() - start) / len(hooks)


class Scalars(torch.nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.scalars = torch.nn.ParameterList(scalars(count))

    def forward(self) -> torch.Tensor:
        return torch.stack(list(self.scalars)).sum()


def engine_over(count: int, *, sentinels: bool) -> zerort.Engine:
    """Past the pass that observes."""
    model = Scalars(count)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": BUCKET},
    }
    engine, *_ = zerort.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config
    )
    if not sentinels:
        engine._parts.reduction.listener.dismiss_sentinels()
    engine_step(engine)
    return engine


def engine_step(engine: zerort.Engine) -> float:
    loss = engine()
    start = time.thread_time_ns()
    engine.backward(loss)
    taken = time.thread_time_ns() - start
    engine.step()
    return taken / len(engine.module.scalars)


def scalars(count: int) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(())) for _ in range(count)]


def bare_backward(params: list[torch.nn.Parameter]) -> float:
    for param in params:
        param.grad = None
    loss = torch.stack(params).sum()
    start = time.thread_time_ns()
    loss.backward()
    return (time.thread_time_ns() - start) / len(params)


def backward(params: list[torch.nn.Parameter], make: Callable[[int], Hook]) -> float:
    handles = [
        param.register_post_accumulate_grad_hook(make(index)) for index, param in enumerate(params)
    ]
    taken = bare_backward(params)
    for handle in handles:
        handle.remove()
    return taken


def in_pass(reducer: _core.Reducer, measure: Callable[[], float]) -> float:
    reducer.begin()
    taken = measure()
    reducer.finish()
    return taken


def dlpack(flat: torch.Tensor) -> float:
    start = time.thread_time_ns()
    for _ in range(100):
        torch.from_dlpack(_core.Buffer(flat))
    return (time.thread_time_ns() - start) / 100


def measure(count: int, rounds: int) -> dict[str, list[float]]:
    reducer = reducer_of(count)
    ask = asking(reducer)
    params, free, watching = scalars(count), scalars(count), Watching(count)
    gradient, flat = torch.zeros(()), torch.zeros(1 << 20)
    all_hooks, guarded = engine_over(count, sentinels=False), engine_over(count, sentinels=True)
    quiet, curious = (
        [silent(index) for index in range(count)],
        [ask(index) for index in range(count)],
    )
    measures: list[tuple[str, Callable[[], float]]] = [
        ("call no-op", lambda: calls(quiet, gradient)),
        ("call grad_ready", lambda: in_pass(reducer, lambda: calls(curious, gradient))),
        ("backward no-op", lambda: backward(params, silent)),
        ("backward grad_ready", lambda: in_pass(reducer, lambda: backward(params, ask))),
        ("backward without hooks", lambda: bare_backward(free)),
        ("backward observing", lambda: watching.observe()[0]),
        ("backward sentinels", watching.guarded),
        ("engine grad_ready", lambda: engine_step(all_hooks)),
        ("engine sentinels", lambda: engine_step(guarded)),
        ("observing hooks", lambda: watching.observe()[1]),
        ("dlpack", lambda: dlpack(flat)),
    ]
    rows: dict[str, list[float]] = {name: [] for name, _ in measures}
    for round_ in range(rounds):
        # Forwards and backwards in turn: neither of a pair always runs first.
        for name, run in measures if round_ % 2 == 0 else reversed(measures):
            rows[name].append(run())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Nanoseconds a parameter that the border costs.")
    parser.add_argument("--params", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print the medians as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.params, options.rounds)
    for name in (
        "call grad_ready",
        "backward grad_ready",
        "backward observing",
        "backward sentinels",
    ):
        # Differences within a round: a slow phase of the machine falls on both.
        quiet = rows[f"{name.split()[0]} no-op"]
        rows[f"{name} over no-op"] = [
            asked - silent for asked, silent in zip(rows[name], quiet, strict=True)
        ]
    rows["engine saved"] = [
        a - b for a, b in zip(rows["engine grad_ready"], rows["engine sentinels"], strict=True)
    ]
    medians = {name: statistics.median(values) for name, values in rows.items()}
    if options.json:
        print(json.dumps({name: round(value, 1) for name, value in medians.items()}))
        return
    for name, value in medians.items():
        limit = f"  limit {LIMIT:.0f}" if "over" in name else ""
        print(
            f"{name:31} {value:8.1f} ns  [{min(rows[name]):8.1f} .. {max(rows[name]):8.1f}]{limit}"
        )


if __name__ == "__main__":
    main()
