"""Optimizers that look at whole parameters, where ranks hold shards: the same bits at every stage
and on each way of resuming, each matrix updated once by one rank, in torch's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode
from whole import ADAFACTOR, MUON, SMALL, counted, engine_of, flat, seeded, tokens, train

import ranks
from reference import Moment
from training import keep, weights
from zerort.optim import build
from zerort.optim.muon import flops
from zerort.optim.segments import regions

needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is torch 2.9's"
)
HIDDEN = 6
"""Matrices that Muon updates: conv, tall, wide, square, transposed, unused."""


class Trust(Optimizer):
    """As LAMB: a ratio of norms for each parameter; it knows neither gaps nor empty groups."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            torch._foreach_norm([parameter.grad for parameter in group["params"]])
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(mean=torch.zeros_like(parameter), rows=torch.zeros(2, 3), count=0)
                state["mean"].lerp_(parameter.grad, 0.1)
                state["rows"] += parameter.norm()
                state["count"] += 1
                ratio = parameter.norm() / (state["mean"].norm() + 1e-6)
                parameter.sub_(state["mean"] * ratio * group["lr"])


OPTIMIZERS: dict[str, Any] = {"Muon": MUON, "Adafactor": ADAFACTOR, "trust ratio": Trust}


Run = tuple[int, str]
"""A stage, and the way of matrices."""
SHARDED: list[Run] = [(stage, way) for way in ("owned", "exchanged") for stage in (1, 2, 3)]
RUNS: list[Run] = [(0, "owned"), *SHARDED]


def ends(rank: int, world: int, name: str, accumulation: int) -> dict[Run, Any]:
    """By run, the weights after some steps, with parameters frozen and thawed between them; the
    matrices orthogonalised, and the elements of state on this rank.
    """
    found = {}
    for stage, way in RUNS:
        engine = engine_of(stage, OPTIMIZERS[name], accumulation, way)
        ways = {bucket.way for bucket in engine._parts.reduction.plan.buckets} - {None}
        assert way in ways or not stage or world == 1
        with counted() if name == "Muon" else nullcontext([]) as seen:
            train(engine, rank)
        engine.module.tall.weight.requires_grad_(False)
        train(engine, rank, 1, 2)
        engine.module.tall.weight.requires_grad_(True)
        train(engine, rank, 1, 3)
        kept = [
            value.numel()
            for state in engine.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.numel() > 1
        ]
        found[stage, way] = flat(engine), len(seen), sum(kept)
        keep(engine)
    return found


CASES = [("Muon", 2, 1), ("Muon", 2, 3), ("Adafactor", 2, 1), ("trust ratio", 2, 1)]
RARE = [(name, *at) for name in OPTIMIZERS for at in ((1, 3), (2, 3), (3, 1), (4, 3))]
SLOW = [case for case in RARE if case not in CASES]


def parameters(*cases: tuple[Any, ...], slow: Sequence[tuple[Any, ...]] = ()) -> list[Any]:
    """Each begins with the name of an optimizer."""
    found = []
    for case in (*cases, *slow):
        marks = [needs_muon] if case[0] == "Muon" else []
        found.append(
            pytest.param(*case, marks=[*marks, pytest.mark.slow] if case in slow else marks)
        )
    return found


ended = ranks.once(None)(lambda world, name, gas: ranks.run(world, ends, name, gas, timeout=200))


@pytest.mark.parametrize(("name", "world", "accumulation"), parameters(*CASES, slow=SLOW))
def test_every_stage_gives_the_same_bits(name: str, world: int, accumulation: int) -> None:
    found = ended(world, name, accumulation)
    expected = found[0][RUNS[0]][0]
    assert expected.isfinite().all()
    for rank in found:
        for run, (end, _, _) in rank.items():
            assert torch.equal(end, expected), f"{run}: {(end - expected).abs().max()}"


@pytest.mark.parametrize(
    ("name", "world", "accumulation"),
    parameters(*CASES[:2], slow=[case for case in SLOW if case[0] == "Muon"]),
)
def test_each_matrix_is_orthogonalised_once_a_boundary_by_one_rank(
    name: str, world: int, accumulation: int
) -> None:
    found = ended(world, name, accumulation)
    for run in SHARDED:
        counts = [rank[run][1] for rank in found]
        assert sum(counts) == 2 * HIDDEN
        assert max(counts) < sum(counts) or world == 1
    assert all(rank[RUNS[0]][1] == 2 * HIDDEN for rank in found)


@pytest.mark.parametrize("name", parameters(*((name,) for name in OPTIMIZERS)))
def test_state_is_kept_once_among_the_ranks(name: str) -> None:
    found = ended(2, name, 1)
    whole = found[0][RUNS[0]][2]
    for run in SHARDED:
        kept = [rank[run][2] for rank in found]
        slack = 0 if name != "Muon" else 1500  # moments of a flat shard have its padding
        assert whole <= sum(kept) <= whole + slack and max(kept) <= 0.7 * whole


# ---- torch's own arithmetic


Seen = tuple[tuple[int, ...], Tensor, Tensor, Tensor]
"""A shape, a gradient, and values before and after the step."""


def gradients_and_updates(rank: int, world: int, stage: int, way: str) -> list[Seen]:
    """What entered the optimizer and what it made of it, for this rank's matrices."""
    engine = engine_of(stage, way=way)
    held = [p for g in engine.optimizer.param_groups if g["use_muon"] for p in g["params"]]
    noted: list[tuple[Tensor, Tensor]] = []

    def note(*_: Any) -> None:
        noted.extend((p.grad.clone(), p.detach().clone()) for p in held)

    flat = engine._parts.boundary.flat
    owned = [bucket for bucket in flat.stepped if bucket.spec.grain == "whole"]
    assert owned
    for bucket in owned:  # without padding, which may be behind another rank's parameter
        fragments = flat.layout.fragments(bucket.spec.id, rank)
        assert [(r.param, r.start, r.end - r.start) for r in regions(bucket)] == [
            (f.param, f.shard_start, f.length) for f in fragments
        ]
    engine.optimizer.register_step_pre_hook(note)
    train(engine, rank, 1)
    keep(engine)
    pairs = zip(held, noted, strict=True)
    return [(tuple(p.shape), *before, p.detach().clone()) for p, before in pairs]


def twin(world: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """One process over all data: the model with its gradients, and values before any step."""
    model = seeded()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for rank in range(world):
        (model(tokens(Moment(rank, 0, 0))) / world).backward()
    return model, before


@needs_muon
@pytest.mark.parametrize(("stage", "way"), [(1, "owned"), (2, "exchanged"), (3, "exchanged")])
def test_an_update_is_torchs_own_on_the_mean_gradient(stage: int, way: str) -> None:
    model, _ = twin(2)
    expected = {
        tuple(p.flatten(1).shape): p
        for p in model.parameters()
        if p.grad is not None and p.dim() > 1
    }
    seen = [piece for rank in ranks.shared(2, gradients_and_updates, stage, way) for piece in rank]
    assert len(seen) == HIDDEN
    for shape, gradient, before, after in seen:
        alone = nn.Parameter(before.clone(memory_format=torch.preserve_format))
        alone.grad = gradient
        torch.optim.Muon([alone], lr=0.05, weight_decay=0.01).step()
        assert torch.equal(alone.detach(), after)
        if shape in expected:
            true = expected[shape].grad.reshape(shape)
            assert (gradient - true).norm() <= 1e-6 * true.norm()
        else:
            assert shape == (33, 9) and not gradient.any()


def first_step(rank: int, world: int, stage: int) -> dict[str, Tensor]:
    engine = engine_of(stage)
    train(engine, rank, 1)
    keep(engine)
    return weights(engine)


@needs_muon
def test_a_first_step_ends_where_one_process_ends() -> None:
    model, before = twin(2)
    chain = build("Muon", model.parameters(), dict(MUON["params"]), model)
    muon, adam = (m.param_groups[0]["params"] for m in chain.members)
    matrices = []
    for parameter in muon:
        if parameter.grad is not None:
            matrices.append(nn.Parameter(parameter.detach().flatten(1)))
            matrices[-1].grad = parameter.grad.flatten(1)
    torch.optim.Muon(matrices, lr=0.05, weight_decay=0.01).step()
    torch.optim.AdamW(adam, lr=3e-3, weight_decay=0.01).step()
    for found in ranks.shared(2, first_step, 2):
        for name, parameter in model.named_parameters():
            way = (parameter.detach() - before[name]).norm()
            if not name.startswith("unused"):  # a gradient of zero decays, none does not
                assert (found[name] - parameter.detach()).norm() <= 1e-2 * way, name


# ---- checkpoints


def save(rank: int, world: int, name: str, run: Run, folder: str, steps: int) -> Tensor:
    stage, way = run
    engine = engine_of(stage, OPTIMIZERS[name], 1, way)
    train(engine, rank, steps)
    engine.save_checkpoint(folder, tag="first")
    keep(engine)
    return flat(engine)


def resume(
    rank: int, world: int, name: str, run: Run, folder: str, source: str, target: str | None
) -> Tensor:
    """Loads; saves what has been loaded under `target`, or trains on."""
    (stage, way), bucket = run, SMALL if target is None else 700
    changes = {"zero_optimization": {"reduce_bucket_size": bucket}}
    engine = engine_of(stage, OPTIMIZERS[name], 1, way, **changes)
    engine.load_checkpoint(folder, tag=source)
    if target is not None:
        engine.save_checkpoint(folder, tag=target)
    else:
        train(engine, 0, 2, 2)  # all ranks on the same data: sums differ by no order
    keep(engine)
    return flat(engine)


@pytest.mark.parametrize("name", parameters(("Muon",), slow=[("Adafactor",), ("trust ratio",)]))
def test_what_was_saved_resumes_on_other_ranks_and_stages_to_the_bit(
    name: str, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    before = ranks.shared(2, save, name, (2, "owned"), folder, 2)[0]
    on = [(3, 1, "exchanged"), (1, 0, "owned"), (2, 3, "exchanged"), (2, 2, "owned")]
    tags = ["first", "a", "b", "c", "d"]
    for (world, *run), source, target in zip(on, tags, tags[1:], strict=False):
        for end in ranks.shared(world, resume, name, run, folder, source, target):
            assert torch.equal(end, before)
    expected = ranks.shared(2, resume, name, (2, "owned"), folder, "first", None)[0]
    assert not torch.equal(expected, before)
    for tag in tags[1:]:
        way = "exchanged" if tag in "ad" else "owned"
        ended = ranks.shared(2, resume, name, (2, way), folder, tag, None)
        assert torch.equal(ended[0], expected), tag


@needs_muon
def test_the_cost_of_a_matrix_is_that_of_its_products() -> None:
    """Counted by torch's own counter."""
    for shape in ((8, 8), (8, 24), (24, 8)):
        parameter = nn.Parameter(torch.randn(shape))
        parameter.grad = torch.randn(shape)
        with FlopCounterMode(display=False) as counter:
            torch.optim.Muon([parameter]).step()
        assert counter.get_total_flops() == flops(shape, 5)
