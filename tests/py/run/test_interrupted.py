"""Whatever breaks a launch or a retirement off, between any two of its lines: no bucket travels
twice, none is lost, and both ranks go on.

One rank of two raises at one line after another of what the executor runs, and in between both
train on. A twin without an engine says which weights are right.
"""

from __future__ import annotations

import copy
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ranks
import zerort
from zerort.params.publish import Publishing
from zerort.run.executor import Executor
from zerort.run.publication import Publication

PACKAGE = Path(zerort.__file__).parent
ENTRIES = {
    getattr(Executor, name).__code__
    for name in ("begin", "run", "launch_all", "drain", "publish_ready", "publish")
}
LANDING = {Publication.land.__code__, Publishing.expose.__code__}
ROOMS = "run", "mesh", "wire", "grads/sources.py", "params/publish.py"
FOLDERS = tuple(str(PACKAGE / room) for room in ROOMS)
LAYERS = 3

Place = tuple[str, int, int]
"""File, line, and whether the first or the second time it runs in a step: leaving a `with` block
runs its line once more.
"""
TIMES = 2


class Raiser:
    """Within `at(place)`, raises once, before the line of that place runs under one of `entries`,
    which are the executor's.
    """

    def __init__(self, kind: type[BaseException], entries: Set[CodeType] = ENTRIES) -> None:
        self.kind = kind
        self._entries = entries
        self.seen: set[Place] = set()
        self._times: Counter[tuple[str, int]] = Counter()
        self.target: Place | None = None

    @contextmanager
    def at(self, target: Place | None) -> Iterator[None]:
        self.target = target
        self._times.clear()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        ours = frame.f_code.co_filename.startswith(FOLDERS)
        return self._line if ours and _below(frame, self._entries) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if event == "line":
            line = (frame.f_code.co_filename, frame.f_lineno)
            self._times[line] += 1
            place = (*line, self._times[line])
            if self._times[line] <= TIMES and not (place[2] > 1 and _gives_back(*line)):
                self.seen.add(place)
            if place == self.target:
                self.target = None
                raise self.kind(f"at {Path(place[0]).name}:{place[1]}")
        return self._line


def _gives_back(file: str, line: int) -> bool:
    """Whether the line, the second time, gives the executor's lock back: no signal's handler runs
    there, and any other raiser would keep the lock.
    """
    return linecache.getline(file, line).strip().startswith("with self._lock")


def _below(frame: FrameType | None, entries: Set[CodeType]) -> bool:
    """Whether the executor runs it; what stands in `publish` itself is not yet, or no longer, under
    its care.
    """
    inner = frame
    while inner is not None:
        if inner.f_code in entries:
            return inner is not frame or frame.f_code.co_name != "publish"
        inner = inner.f_back
    return False


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(LAYERS)))


class Pair:
    """An engine, and a twin that takes the same steps without one."""

    def __init__(self, rank: int, stage: int, window: int | str, publish: str = "step") -> None:
        model = model_of()
        self.rank = rank
        self.model, self.twin = model, copy.deepcopy(model)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 256},
            "zerort": {"window": window, "timeout": 20.0, "publish": publish},
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.engine, *_ = zerort.initialize(model=model, optimizer=optimizer, config=config)
        self.ahead = torch.optim.SGD(self.twin.parameters(), lr=0.01)

    def step(self) -> BaseException | None:
        """One step; returns what it raised."""
        try:
            self.engine.backward(self.engine(torch.ones(2, 16)).square().mean())
            self.engine.step()
        except BaseException as error:
            return error
        return None

    def follow(self) -> bool | None:
        """Whether the engine has applied the step; None if its weights are neither before it nor
        after.
        """
        before = copy.deepcopy(self.twin.state_dict())
        self.ahead.zero_grad()
        self.twin(torch.ones(2, 16)).square().mean().backward()
        self.ahead.step()
        if self._equal():
            return True
        self.twin.load_state_dict(before)
        return False if self._equal() else None

    def _equal(self) -> bool:
        pairs = zip(self.model.parameters(), self.twin.parameters(), strict=True)
        return all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in pairs)


def break_everywhere(
    rank: int,
    world: int,
    stage: int,
    window: int | str,
    kind: type[BaseException],
    publish: str = "step",
) -> list[tuple[Place, str, list[bool | None]]]:
    """What each place came to: what rank 1 raised there, and whether each step was applied."""
    pair, raiser = Pair(rank, stage, window, publish), Raiser(kind)
    for _ in range(2):
        assert (pair.step(), pair.follow()) == (None, True)
    for _ in range(2):  # which lines there are
        with raiser.at(None):
            assert (pair.step(), pair.follow()) == (None, True)
    told: list[Any] = [sorted(raiser.seen)]
    dist.broadcast_object_list(told, src=1)
    results = []
    for place in told[0]:
        if rank == 1:
            with raiser.at(place):
                error = pair.step()
        else:
            error = pair.step()
        applied = [pair.follow()]
        later = pair.step()
        assert later is None, f"the step after {place}: {later!r}"
        results.append((place, type(error).__name__, [*applied, pair.follow()]))
    return results


@pytest.mark.parametrize(
    ("stage", "window", "kind"),
    [
        pytest.param(0, 2, KeyboardInterrupt, marks=pytest.mark.slow),
        pytest.param(2, 1, KeyError, marks=pytest.mark.slow),
        (2, "all", KeyboardInterrupt),
    ],
)
def test_a_command_that_is_broken_off_at_any_line_is_neither_lost_nor_repeated(
    stage: int, window: int | str, kind: type[BaseException]
) -> None:
    first, second = ranks.run(2, break_everywhere, stage, window, kind, timeout=100)
    assert len(first) > 60
    broken = 0
    for (place, on_the_other, here), (_, raised, there) in zip(first, second, strict=True):
        assert here == there, f"{place}: the ranks differ, {here} and {there}"
        applied, after = here
        assert after is True, f"{place}: the step after it is wrong"
        if applied:  # broken off behind the vote, or not at all: the timing was another
            assert on_the_other == "NoneType", place
        else:
            assert applied is False, f"{place}: the weights are neither old nor new"
            assert on_the_other == "StepError", place
            broken += raised != "NoneType"
    assert broken > 40


def break_off_what_is_published_beside_the_forward(rank: int, world: int) -> Any:
    return break_everywhere(rank, world, 2, "all", KeyboardInterrupt, "overlapped")


@pytest.mark.slow
def test_what_is_published_beside_the_forward_is_sent_once_wherever_it_is_broken_off() -> None:
    first, second = ranks.run(2, break_off_what_is_published_beside_the_forward, timeout=100)
    for (place, _, here), (_, _, there) in zip(first, second, strict=True):
        assert here == there and here[1] is True, f"{place}: {here} and {there}"
    applied = [place for place, _, (first, _) in first if first]
    assert {Path(file).name for file, _, _ in applied} >= {"publication.py", "publish.py"}


def ask_at_every_line(rank: int, world: int) -> tuple[set[str], int]:
    """On rank 1 a wait for updated parameters is broken off at one line after another: whoever asks
    again finds them whole. Returns the files, and how often it was.
    """
    pair, raiser = Pair(rank, 2, "all", "overlapped"), Raiser(KeyboardInterrupt, LANDING)
    for _ in range(2):
        assert (pair.step(), pair.follow()) == (None, True)
    assert pair.step() is None
    with raiser.at(None):  # which lines there are
        assert pair.follow()
    told: list[Any] = [sorted(raiser.seen)]
    dist.broadcast_object_list(told, src=1)
    broken = 0
    for place in told[0]:
        assert pair.step() is None
        with raiser.at(place if rank == 1 else None):
            try:
                torch.stack([p.data for p in pair.model.parameters()])
            except KeyboardInterrupt:
                broken += 1
        assert pair.follow() is True, place
        assert all(type(p) is nn.Parameter for p in pair.model.parameters()), place
    return {Path(file).name for file, _, _ in told[0]}, broken


def test_a_wait_for_updated_parameters_that_is_broken_off_is_taken_up_again() -> None:
    (files, _), (_, broken) = ranks.run(2, ask_at_every_line, timeout=100)
    assert files >= {"publication.py", "publish.py"} and broken > 15
