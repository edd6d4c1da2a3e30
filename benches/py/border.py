"""What the border costs: a hook that asks the core, against a hook that does nothing.

    python benches/py/border.py [--params 8000] [--rounds 15]

Medians of interleaved rounds, in nanoseconds of this thread's CPU time a parameter:

* `call` calls the hooks themselves, as autograd would, without autograd;
* `backward` runs a backward pass over that many scalar parameters with the hooks registered after accumulation;
* `dlpack` takes a flat buffer over and makes a tensor of it again. That happens at setup, never per gradient.

The target: `call` and `backward` with `grad_ready` at most 600 ns a parameter over the hook that does nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable

import torch

from zerort import _core
from zerort.hooks import plain_hook

Hook = Callable[[torch.Tensor], None]


def silent(_: int) -> Hook:
    def hook(_: torch.Tensor) -> None:
        return

    return hook


def asking(reducer: _core.Reducer) -> Callable[[int], Hook]:
    """What an engine registers, with nothing to run when the core says so."""

    def go(param: int, hi: int) -> None:
        return

    return lambda param: plain_hook(param, reducer, None, go)


def reducer_of(params: int) -> _core.Reducer:
    """A reducer past its first pass, which only observes."""
    plan = _core.Plan([(1, "f32", 0, 0)] * params, world=2, stage=2, cap_bytes=25_000_000)
    reducer = _core.Reducer(plan)
    one_pass(reducer, range(params), reducer.grad_ready)
    return reducer


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


def backward(params: list[torch.nn.Parameter], make: Callable[[int], Hook]) -> float:
    handles = [param.register_post_accumulate_grad_hook(make(index)) for index, param in enumerate(params)]
    loss = torch.stack(params).sum()
    start = time.thread_time_ns()
    loss.backward()
    taken = time.thread_time_ns() - start
    for handle in handles:
        handle.remove()
    return taken / len(params)


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
    params = [torch.nn.Parameter(torch.zeros(())) for _ in range(count)]
    gradient, flat = torch.zeros(()), torch.zeros(1 << 20)
    quiet, curious = [silent(index) for index in range(count)], [ask(index) for index in range(count)]
    measures: list[tuple[str, Callable[[], float]]] = [
        ("call no-op", lambda: calls(quiet, gradient)),
        ("call grad_ready", lambda: in_pass(reducer, lambda: calls(curious, gradient))),
        ("backward no-op", lambda: backward(params, silent)),
        ("backward grad_ready", lambda: in_pass(reducer, lambda: backward(params, ask))),
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
    medians = {name: statistics.median(values) for name, values in rows.items()}
    for kind in ("call", "backward"):
        # Differences of neighbours: a slow phase of the machine falls on both.
        pairs = zip(rows[f"{kind} grad_ready"], rows[f"{kind} no-op"], strict=True)
        medians[f"{kind} added"] = statistics.median(asked - quiet for asked, quiet in pairs)
    if options.json:
        print(json.dumps({name: round(value, 1) for name, value in medians.items()}))
        return
    for name, value in medians.items():
        spread = f"  [{min(rows[name]):8.1f} .. {max(rows[name]):8.1f}]" if name in rows else ""
        print(f"{name:22} {value:8.1f} ns{spread}")


if __name__ == "__main__":
    main()
