"""What stage 3 does in Python for each module, counted: models of many small tensors live by it.

Counts are differences between a model of many layers and one of few, so that what is done once a
step or a bucket does not show.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

import ranks
from routes import WIDTH, data, engine_over, loss_of, settings
from zerort.params import calls
from zerort.run import gathers

FEW, MANY = 10, 40


OTHERS = tuple(
    map(
        str, (*nn.modules.__path__, torch.compiler.__file__, torch._jit_internal.__file__, __file__)
    )
)
"""Where what a module's call costs by itself is."""


@contextmanager
def counting(calls: Counter[str]) -> Iterator[None]:
    """Within, calls of functions of Python's, by name."""

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and not frame.f_code.co_filename.startswith(OTHERS):
            calls[frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def trained(layers: int, steps: int) -> Any:
    """An engine whose whole model is one bucket, behind so many steps."""
    row = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    engine = engine_over(row, settings(room=None, cap=10**6))
    for step in range(steps):
        engine.backward(loss_of(engine(data(step, 0))))
        engine.step()
    return engine


def calls_a_layer(count: Callable[[Any], Counter[str]]) -> dict[str, float]:
    """By name, what each layer adds."""
    few, many = count(trained(FEW, 3)), count(trained(MANY, 3))
    added = {name: (many[name] - few[name]) / (MANY - FEW) for name in many}
    return {name: calls for name, calls in added.items() if calls}


def of_a_forward(engine: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    with counting(found):
        engine(data(3, 0))
    return found


def of_a_backward(engine: Any) -> Counter[str]:
    loss, found = loss_of(engine(data(3, 0))), Counter[str]()
    with counting(found):
        engine.backward(loss)
    return found


def count_calls(rank: int, world: int) -> tuple[dict[str, float], dict[str, float], list[int]]:
    engine = trained(MANY, 3)
    hooked = [len(p._post_accumulate_grad_hooks or ()) for p in engine.module.parameters()]
    return calls_a_layer(of_a_forward), calls_a_layer(of_a_backward), hooked


def test_a_layer_costs_two_calls_in_a_forward_one_in_a_backward_and_no_hook_of_its_own() -> None:
    for forward, backward, hooked in ranks.run(1, count_calls):
        assert forward == {"hook": 2}
        assert backward.pop("<genexpr>") <= 8, "loops over what a bucket has"
        assert backward == {"hook": 1}
        assert sum(hooked) == 1


def count_versions(rank: int, world: int) -> tuple[int, int]:
    read = mock.Mock(side_effect=calls.version_of)
    with (
        mock.patch.object(calls, "version_of", read),
        mock.patch.object(gathers, "version_of", read),
    ):
        engine = trained(MANY, 2)
        loss = loss_of(engine(data(2, rank)))
        read.reset_mock()
        engine.backward(loss)
        engine.step()
        between = read.call_count
        engine(data(3, rank))
        return between, read.call_count


def test_versions_are_read_where_a_parameter_can_be_written_and_nowhere_else() -> None:
    assert ranks.run(1, count_versions) == [(0, 2 * 2 * MANY)]
