"""What a host keeps of sharded parameters (`zero_hpz_partition_size`): no bit changes, whatever
replaces values and whoever asks; between hosts a unit's values go once an update.

Two hosts of two ranks, on one machine. One program, with the key and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from tap import tapped
from zerort.errors import StepError
from zerort.utils import (
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)

WORLD, HOSTS, WIDTH, LAYERS = 4, 2, 16, 6
ONE = WIDTH * WIDTH + WIDTH
KEPT: dict[str, Any] = {"zero_hpz_partition_size": 2}
NESTED: dict[str, Any] = {"hierarchy": {"inner": 2}}


class Layers(nn.Module):
    """More of them than there is room for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.order = list(range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for at in self.order:
            x = torch.tanh(self.layers[at](x))
        return x


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gloo, fp32": ("gloo", {}),
    "shared, bf16": ("shared", {"bf16": {"enabled": True}}),
}


def engine_of(keeps: bool, kind: str) -> Any:
    transport, more = KINDS[kind]
    zero = {
        "stage": 3,
        "reduce_bucket_size": ONE,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 3 * (ONE + 500),
    }
    engine, *_ = zerort.initialize(
        model=Layers(),
        optimizer=lambda params: torch.optim.Adam(params, lr=0.01),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "zero_optimization": zero | (KEPT if keeps else {}),
            "zerort": {"transport": transport} | ({} if keeps else NESTED),
            **more,
        },
    )
    return engine


def batch(rank: int, step: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randn(2, WIDTH, generator=generator)


class Program:
    """Of one rank: what it has computed, by what was done before."""

    def __init__(self, engine: Any, rank: int) -> None:
        self.engine, self.rank, self.steps = engine, rank, 0
        self.found: dict[str, Any] = {}
        self.first = engine.module.layers[1].weight

    def micro(self, number: int) -> Tensor:
        x = batch(self.rank, self.steps, number).to(next(self.engine.module.parameters()).dtype)
        loss = self.engine(x).float().square().sum()
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def step(self, between: Callable[[], None] = lambda: None) -> Tensor:
        """Two micro-batches, with something between them; their losses."""
        first = self.micro(0)
        between()
        second = self.micro(1)
        self.steps += 1
        return torch.stack([first, second])

    def look(self) -> Tensor:
        """An evaluation, which all ranks make."""
        with torch.no_grad():
            x = batch(9, 0, 0).to(next(self.engine.module.parameters()).dtype)
            return self.engine(x).clone()

    def note(self, name: str, *values: Tensor) -> None:
        self.found[name] = torch.cat([value.float().reshape(-1) for value in values])

    def local(self, rank: int) -> None:
        """That rank alone replaces its part of a master."""
        part = safe_get_local_fp32_param(self.first)
        if self.rank == rank and part is not None:
            safe_set_local_fp32_param(self.first, part + 0.5)

    def fails(self) -> None:
        """Rank 1's forward raises, in the second micro-batch."""

        def broken(module: nn.Module, args: Any) -> None:
            raise ZeroDivisionError

        self.micro(0)
        hook = self.engine.module.layers[3].register_forward_pre_hook(broken)
        if self.rank != 1:
            hook.remove()
        with pytest.raises((ZeroDivisionError, StepError)):
            self.micro(1)
        hook.remove()
        self.steps += 1


def written(program: Program) -> None:
    with zerort.zero.GatheredParameters([program.first], modifier_rank=2):
        if program.rank == 2:
            program.first.data.add_(0.25)


def set_whole(program: Program) -> None:
    safe_set_full_fp32_param(program.first, torch.full((WIDTH, WIDTH), 0.125))


def evaluates_more(program: Program) -> None:
    program.local(2)
    more = [program.look() for _ in range(2 if program.rank == 0 else 0)]
    program.step()  # at which the others are meanwhile
    if more:
        program.note("what rank 0 alone sees", *more)


def turned(program: Program) -> None:
    order = program.engine.module.order
    if program.rank == 3:
        order[1], order[2] = order[2], order[1]


CHANGES: dict[str, Callable[[Program], None]] = {
    "GatheredParameters": written,
    "a whole master": set_whole,
    "one rank's part of a master": lambda program: program.local(2),
    "evaluations of one rank alone": evaluates_more,
    "a forward that fails": Program.fails,
    "another order on one rank": turned,
}


LAST = ["what rank 0 alone sees", "a checkpoint", "all"]


def through(rank: int, world: int, keeps: bool, kind: str, folder: str) -> dict[str, Any]:
    """All of it, one after the other; with what it has sent between hosts in a window."""
    engine = engine_of(keeps, kind)
    program = Program(engine, rank)
    program.note("the first steps", *(program.step() for _ in range(3)))
    with counted(engine) as sent:
        program.note("a step", program.step())
    program.found["sent"] = sent
    program.note("between micro-batches", program.step(lambda: program.local(1)))
    engine.save_checkpoint(folder)
    for name, change in CHANGES.items():
        before = program.look()
        change(program)
        program.note(name, before, program.look(), program.step(), program.look())
    program.look()
    engine.load_checkpoint(folder)
    program.note("a checkpoint", program.look(), program.step())
    with zerort.zero.GatheredParameters(list(engine.module.parameters())):
        program.note("all", *(p.detach() for p in engine.module.parameters()))
    program.found.setdefault("what rank 0 alone sees", torch.zeros(0))
    program.found["elements"] = sum(b.numel for b in engine._parts.reduction.plan.buckets)
    engine.destroy()
    return program.found


@contextmanager
def counted(engine: Any) -> Iterator[list[int]]:
    """Bytes that this rank sends of parameters within, between hosts and inside."""
    found: list[int] = []
    mesh = engine._parts.mesh
    with tapped() as calls:
        yield found
    for group in (mesh["outer"], mesh["inner"]):
        own = [call for call in calls if call.op == "broadcast" and call.ranks == group.ranks]
        found.append(sum(call.sent for call in own))


@ranks.once(None)
def both(kind: str, folder: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Without, and with."""
    plain, kept = f"{folder}/plain", f"{folder}/kept"
    return (
        ranks.shared(WORLD, through, False, kind, plain, timeout=90),
        ranks.shared(WORLD, through, True, kind, kept, timeout=90),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def found(folder: str) -> Any:
    return both("gloo, fp32", folder)


@pytest.mark.parametrize(
    "name",
    ["the first steps", "a step", "between micro-batches", *CHANGES, *LAST],
)
def test_no_bit_changes(found: Any, name: str) -> None:
    for plain, kept in zip(*found, strict=True):
        assert torch.equal(plain[name], kept[name])


@pytest.mark.slow
def test_no_bit_changes_in_16_bits_and_shared_memory(folder: str) -> None:
    for plain, kept in zip(*both("shared, bf16", f"{folder}/shared"), strict=True):
        for name in ["the first steps", "a step", "between micro-batches", *CHANGES, *LAST]:
            assert torch.equal(plain[name], kept[name]), name


def test_between_hosts_a_unit_goes_once_an_update_and_not_once_a_pass(found: Any) -> None:
    for plain, kept in zip(*found, strict=True):
        once = 4 * kept["elements"] // WORLD * (HOSTS - 1)
        assert kept["sent"][0] == once
        assert plain["sent"][0] > 2 * once, "there is room for all: nothing is shown"
        assert kept["sent"][1] == plain["sent"][1]
