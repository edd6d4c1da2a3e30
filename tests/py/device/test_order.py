"""The order that an accelerator's streams are put into, on a stand-in that follows what is over
before what.

Whole steps of an engine run on it, on one rank and on two, with a backward on two streams: no
access races, the weights are right, and with any one of the calls that order streams left out some
access does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import stand_in
import zerort
from stand_in import Machine, Race, Site, on_stream
from training import keep
from zerort.device.accelerator import AcceleratorStreams
from zerort.run.executor import Executor, Fold

WIDTH = 16


class TwoStreams(nn.Module):
    """Two branches; the backward of one of them runs on a stream of the user's.

    It begins with the last layer of that branch and ends with its first; in between comes the
    other branch, whose gradient shares a bucket with the last layer's.
    """

    def __init__(self, machine: Machine | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other, self.last = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.machine = machine
        self.user = stand_in.Stream(machine, "user") if machine is not None else None

    def forward(self, x: Tensor) -> Tensor:
        if self.machine is None or self.user is None:
            return (self.last(self.first(x)) + self.other(x)).square().mean()
        machine, main, user = self.machine, self.machine.main, self.user
        with machine.on(user, after=main):
            first = on_stream(self.first(x), machine, user, user)
        other = on_stream(self.other(x), machine, main, main)
        with machine.on(user, after=main):
            last = on_stream(self.last(first), machine, user, main)
        main.merge(user.clock, user.ms)
        return (last + other).square().mean()


class Case:
    """How an engine is set up and driven."""

    def __init__(
        self,
        stage: int,
        window: int | str,
        gas: int = 1,
        *,
        direct: bool = False,
        wire: str = "fp32",
        publish: str = "step",
        layers: int = 2,
    ) -> None:
        self.stage, self.window, self.gas, self.direct, self.wire = stage, window, gas, direct, wire
        self.publish, self.layers = publish, layers

    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.gas,
            "gradient_clipping": 0.0,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": self.layers * WIDTH**2,
            },
            "zerort": {"window": self.window, "wire": self.wire, "publish": self.publish},
        }


CASES = {
    "stage 2, window 1": Case(2, 1),
    "stage 2, direct backward": Case(2, "all", direct=True),
    "stage 1, two micro-batches": Case(1, 1, 2),
    "stage 0, bf16 wire": Case(0, 1, wire="bf16"),
    "stage 0": Case(0, 2, direct=True),
    # whose bucket comes on the user's stream, and is read on both
    "stage 2, published beside the forward": Case(2, "all", publish="overlapped", layers=3),
}


Outcome = tuple[list[Tensor], list[list[str]]]
"""Weights, and what the host has waited for in each step."""


def run(machine: Machine, case: Case, steps: int = 3) -> Outcome:
    """A few steps on the machine."""
    with machine.running():
        return _steps(TwoStreams(machine), case, steps, machine)


def _steps(model: nn.Module, case: Case, steps: int, machine: Machine | None) -> Outcome:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = zerort.initialize(model=model, optimizer=optimizer, config=case.config())
    syncs: list[list[str]] = []
    for _ in range(steps):
        before = len(machine.syncs) if machine is not None else 0
        for micro in range(case.gas):
            loss = engine(torch.full((2, WIDTH), 1.0 + micro))
            if case.direct:
                loss.backward()
            else:
                engine.backward(loss)
            engine.step()
        syncs.append(machine.syncs[before:] if machine is not None else [])
    keep(engine)
    return [p.detach().clone() for p in model.parameters()], syncs


@dataclass
class Found:
    """What a run of one case came to."""

    races: list[Race]
    sites: set[Site]
    syncs: list[list[str]]
    right: bool
    """The weights are the CPU's."""


@ranks.once(None)
def on_the_machine(world: int) -> list[tuple[dict[str, Found], dict[Site, bool]]]:
    """By rank: the cases, and whether some case races without the call at a site."""
    return ranks.run(world, every_case_and_site, timeout=100)


def every_case_and_site(rank: int, world: int) -> tuple[dict[str, Found], dict[Site, bool]]:
    found = {name: _found(case) for name, case in CASES.items()}
    sites = sorted({site for one in found.values() for site in one.sites})
    races = {}
    for site in sites:
        machines = [Machine(dropped=site) for _ in CASES]
        for machine, case in zip(machines, CASES.values(), strict=True):
            run(machine, case)
        races[site] = any(machine.races for machine in machines)
    return found, races


def _found(case: Case) -> Found:
    machine = Machine()
    weights, syncs = run(machine, case)
    expected, _ = _steps(TwoStreams(None), case, 3, None)
    pairs = zip(weights, expected, strict=True)
    right = all(torch.allclose(ours, theirs, rtol=1e-5) for ours, theirs in pairs)
    return Found(machine.races, machine.sites, syncs, right)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_no_access_of_a_step_races_and_weights_are_the_cpus(world: int, name: str) -> None:
    for cases, _ in on_the_machine(world):
        assert cases[name].races == []
        assert cases[name].right


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_the_device_once_a_step(world: int, name: str) -> None:
    for cases, _ in on_the_machine(world):
        first, *others = cases[name].syncs  # the first brings the order of gradients along
        assert len(first) <= 2
        assert others == [["tolist"], ["tolist"]]


def test_without_any_one_of_the_calls_that_order_streams_an_access_races() -> None:
    needed: dict[Site, bool] = {}
    for world in (1, 2):
        for _, races in on_the_machine(world):
            for site, raced in races.items():
                needed[site] = needed.get(site, False) or raced
    assert {file for file, _ in needed} == {"accelerator.py", "publication.py", "waits.py"}
    assert len(needed) >= 9
    assert [site for site, raced in needed.items() if not raced] == []


def without_producers(rank: int, world: int, when: str) -> list[str]:
    """The cases that race when the streams of gradients are not noted, or forgotten too early."""
    begin = Executor.begin

    def forgetting(executor: Executor, fold: Fold) -> None:
        executor.streams.packed()
        begin(executor, fold)

    if when == "never noted":
        AcceleratorStreams.produced = lambda _: None  # type: ignore[method-assign]
    else:
        Executor.begin = forgetting  # type: ignore[method-assign]
    machines = {name: Machine() for name in CASES}
    for name, machine in machines.items():
        run(machine, CASES[name])
    return [name for name, machine in machines.items() if machine.races]


def test_a_bucket_waits_for_the_streams_of_its_gradients() -> None:
    assert ranks.run(1, without_producers, "never noted") == [list(CASES)]


def test_the_first_gradient_of_a_direct_backward_comes_before_its_pass() -> None:
    (racing,) = ranks.run(1, without_producers, "forgotten when a pass begins")
    assert racing == [name for name, case in CASES.items() if case.direct]
