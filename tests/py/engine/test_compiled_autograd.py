"""Compiled autograd: a backward that torch captures and compiles trains to the same bits, buckets
leave between its pieces, and where it cannot work somebody says so.

Models are as small as they can be: each structure of a backward is traced anew. The backends run
torch's own kernels, so that a difference can only be the engine's.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import compiled_autograd as private

import ranks
import zerort
from cases import CASES
from catching import assert_told, caught
from logged import log_lines
from models import Terms
from reference import History
from terms import engine_over_terms, step_with
from terms import weights as terms
from training import Config, at_stage, config_of, digest, engine_for, keep, take_step, weights
from zerort.errors import ConfigError, StepError
from zerort.grads import compiled

STAGES = (0, 1, 2, 3)

Job = tuple[str, int, Config]
"""A case's name, accumulation steps, and a configuration."""


def compile_with(engine: Any, backend: Any = "eager", **options: Any) -> Any:
    """Compiled autograd on; nothing falls back to what is not compiled."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    engine.compile(backend, options, compiled_autograd_enabled=True)
    return engine


def _history(rank: int, job: Job, backend: str | None) -> History:
    name, gas, changes = job
    case = CASES[name]
    engine = engine_for(case, config_of(case, gas, changes))
    if backend is not None:
        torch._dynamo.reset()
        compile_with(engine, backend)
    history = History()
    for step in range(case.steps):
        case.before(engine.module, step)
        take_step(engine, case, rank, step, gas)
        history.weights.append(weights(engine))
        history.norms.append(float(engine.get_global_grad_norm()))
    keep(engine)
    return history


def differing(rank: int, world: int, jobs: list[Job]) -> list[Job]:
    """Those that end otherwise with a compiled backward."""
    warnings.filterwarnings("error", "Dynamo")  # such as about hooks that it traces
    return [
        job
        for job in jobs
        if digest(_history(rank, job, None)) != digest(_history(rank, job, "eager"))
    ]


@pytest.mark.parametrize(
    ("world", "gas", "stages"),
    [
        pytest.param(1, 1, (1, 3), marks=pytest.mark.slow),
        (2, 2, (1, 3)),
        pytest.param(2, 2, (0, 2), marks=pytest.mark.slow),
    ],
)
def test_a_compiled_backward_trains_to_the_bits_of_the_plain_one(
    world: int, gas: int, stages: tuple[int, ...]
) -> None:
    jobs = [("linear", gas, at_stage(stage)) for stage in stages]
    assert ranks.run(world, differing, jobs, timeout=170.0) == [[]] * world


def not_resumed(rank: int, world: int, jobs: list[Job], folder: str) -> list[Job]:
    """Those that a checkpoint in the middle makes end otherwise."""
    return [
        job
        for number, job in enumerate(jobs)
        if digest(_history(rank, job, "eager")) != digest(_halves(rank, job, f"{folder}/{number}"))
    ]


def _halves(rank: int, job: Job, folder: str) -> History:
    """As `_history`, over two engines."""
    name, gas, changes = job
    case, history = CASES[name], History()
    middle = case.steps // 2
    torch._dynamo.reset()
    for steps in (range(middle), range(middle, case.steps)):
        engine = compile_with(engine_for(case, config_of(case, gas, changes)))
        if steps.start:
            engine.load_checkpoint(folder)
        for step in steps:
            case.before(engine.module, step)
            take_step(engine, case, rank, step, gas)
            history.weights.append(weights(engine))
            history.norms.append(float(engine.get_global_grad_norm()))
        if not steps.start:
            engine.save_checkpoint(folder)
        engine.destroy()
    return history


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_with_compiled_backwards_ends_as_the_uninterrupted_one(
    world: int, tmp_path: Path
) -> None:
    jobs = [("linear", gas, at_stage(stage)) for gas in (1, 3) for stage in STAGES]
    found = ranks.run(world, not_resumed, jobs, str(tmp_path), timeout=580.0)
    assert found == [[]] * world


def test_freezing_between_steps_and_masters_change_nothing_of_that() -> None:
    fp16 = {"amp": {"enabled": True, "opt_level": "O2", "loss_scale": 256}}
    jobs = [("frozen_then_unfrozen", 1, {**fp16, **at_stage(1)})]
    assert ranks.run(2, differing, jobs, timeout=170.0) == [[]] * 2


ODD_WAYS = [
    "unused_on_one_rank",
    "retained_graph",
    "checkpointed",
    "reused_checkpointed",
    "direct",
    "gpt_clipped",
    "scaled_by_hand",
    "two_forwards_then_two_backwards",
    "groups",
    "gradient_penalty",
]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a GPT's takes minutes to trace
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ODD_WAYS)
def test_odd_ways_to_go_backward_do_too(name: str, stage: int) -> None:
    if (name, stage) == ("gradient_penalty", 3):
        pytest.skip("stage 3 refuses create_graph")
    jobs = [(name, 2, at_stage(stage))]
    assert ranks.run(2, differing, jobs, timeout=880.0) == [[]] * 2


def _distance(rank: int, world: int, name: str, gas: int, backend: str) -> float:
    job = (name, gas, at_stage(1))
    plain, compiled = (_history(rank, job, chosen) for chosen in (None, backend))
    pairs = zip(plain.weights[-1].values(), compiled.weights[-1].values(), strict=True)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "gas", "backend"),
    [
        ("mlp", 1, "inductor"),
        # what a backward within the backward brings is added up before it joins `.grad`
        ("reused_checkpointed_reentrant", 2, "eager"),
        ("checkpointed_reentrant", 2, "eager"),
    ],
)
def test_other_kernels_and_orders_of_sums_differ_by_rounding_alone(
    name: str, gas: int, backend: str
) -> None:
    assert max(ranks.run(2, _distance, name, gas, backend, timeout=580.0)) < 1e-6


# ---- overlap

WIDTH = 4


class Chain(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def _events(rank: int, world: int, stage: int, layers: int) -> list[str]:
    """Pieces of the graph and launches, in their order in the backward of the third step."""
    warnings.filterwarnings("error", "Dynamo")
    events: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*values: Any) -> Any:
            events.append("piece")
            return graph.forward(*values)

        return run

    all_to_all = dist.all_to_all_single

    def launch(*buffers: Tensor, **options: Any) -> Any:
        events.append("launch")
        return all_to_all(*buffers, **options)

    config = {
        **at_stage(stage, reduce_bucket_size=1),
        "zerort": {"window": "all", "transport": "gloo"},
    }
    engine = compile_with(engine_over_terms(config, model=Chain(layers)), backend)
    dist.all_to_all_single = launch
    try:
        for _ in range(3):
            loss = engine(torch.ones(2, WIDTH))
            events.clear()
            engine.backward(loss)
            found = list(events)
            engine.step()
    finally:
        dist.all_to_all_single = all_to_all
    keep(engine)
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stage", "layers"),
    [
        pytest.param(2, 4, marks=pytest.mark.slow),
        (3, 3),
        # more hooks of one kind than torch traces a function for before it gives up (8)
        pytest.param(2, 10, marks=pytest.mark.slow),
        pytest.param(3, 10, marks=pytest.mark.slow),
    ],
)
def test_buckets_of_a_module_compiled_whole_leave_between_the_pieces(
    stage: int, layers: int
) -> None:
    for events in ranks.run(2, _events, stage, layers, timeout=580.0):
        last = len(events) - events[::-1].index("piece")
        assert events[:last].count("launch") >= layers - 2
        assert events[events.index("launch") :].count("piece") >= layers - 2


ROOM = 2 * 128  # two layers, each in a bucket of its own, which is padded to 128 elements


def _most_that_is_whole(rank: int, world: int, compiles: bool) -> list[int]:
    """Elements, in the last backward's hooks on inputs of layers."""
    layers = 4
    section = at_stage(3, reduce_bucket_size=1, stage3_max_live_parameters=ROOM)
    engine = engine_over_terms(section, model=Chain(layers))
    if compiles:
        compile_with(engine)
    gatherer, found = engine._parts.passes.gatherer, []
    look = torch.compiler.disable(lambda grad: found.append(gatherer.live))
    for layer in engine.module.layers:
        layer.weight.register_hook(look)
    for _ in range(3):
        loss = engine(torch.ones(2, WIDTH))
        found.clear()
        engine.backward(loss)
        engine.step()
    keep(engine)
    return found


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_backward_frees_what_older_nodes_do_not_read(compiles: bool) -> None:
    for found in ranks.run(1, _most_that_is_whole, compiles, timeout=170.0):
        assert found and max(found) <= ROOM


# ---- what goes wrong


class Failing(Terms):
    """Its backward raises once, on the rank that is told to."""

    fails = False

    def forward(self, a: float | None = None, b: float | None = None) -> Tensor:
        loss = super().forward(a, b)

        def hook(grad: Tensor) -> None:
            if self.fails:
                raise ValueError("out of luck")

        loss.register_hook(hook)
        return loss * 1.0


def _fail_once(rank: int, world: int, stage: int) -> tuple[str, tuple[float, float]]:
    engine = compile_with(engine_over_terms(at_stage(stage), model=Failing()))
    step_with(engine, 1.0, 1.0)
    engine.module.fails = rank == 1
    error = caught(lambda: step_with(engine, 1.0, 1.0))
    engine.module.fails = False
    after = step_with(engine, 1.0, 1.0)
    keep(engine)
    return f"{type(error).__name__}: {error}", after


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_an_exception_in_a_compiled_backward_fails_the_micro_batch_on_all_ranks(stage: int) -> None:
    (innocent, after), (culprit, again) = ranks.run(2, _fail_once, stage, timeout=170.0)
    assert "out of luck" in culprit and not culprit.startswith("StepError")
    assert innocent.startswith("StepError") and "rank 1: " in innocent and "out of luck" in innocent
    assert after == again == (-2.0, -2.0)


def _in_a_context_of_ones_own(rank: int, world: int) -> list[Any]:
    found: list[Any] = []
    for compiles in (False, True):
        torch._dynamo.reset()
        engine = engine_over_terms({"fp16": {"enabled": True, "loss_scale": 2.0}})
        if compiles:
            compile_with(engine)

        def within(backward: Any, engine: Any = engine) -> Exception | None:
            loss = engine(1.0, 1.0)
            with private._enable(torch.compile(backend="eager")):
                error = caught(lambda: backward(loss))
            if error is None:
                engine.step()
            return error

        found += [within(engine.backward), within(lambda loss, e=engine: e.scale(loss).backward())]
        engine.scale(engine(1.0, 1.0)).backward()  # outside it is as ever
        engine.step()
        found.append(terms(engine))
        keep(engine)
    return found


def test_a_backward_in_a_context_of_ones_own_is_refused_with_the_way_out() -> None:
    ((by_call, direct, after, compiled, again, last),) = ranks.run(1, _in_a_context_of_ones_own)
    for error in (by_call, direct, again):
        assert_told(
            error, StepError, "compiled-autograd", "engine.compile(compiled_autograd_enabled"
        )
    assert compiled is None
    assert after == (-1.0, -1.0) and last == (-2.0, -2.0)


def _without_it(rank: int, world: int) -> tuple[Exception | None, bool]:
    engine = engine_over_terms()
    del private._enable
    return caught(lambda: compile_with(engine)), engine.is_compiled


def test_a_torch_that_has_it_not_is_named_and_nothing_is_compiled() -> None:
    ((error, compiled),) = ranks.run(1, _without_it)
    assert_told(error, ConfigError, "compiled_autograd_enabled", torch.__version__)
    assert not compiled


class ManyKinds(nn.Module):
    """Parameters of more kinds than the compiler's limit of recompilations, by rank and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.ParameterList(
            nn.Parameter(torch.ones((2,) * rank, dtype=dtype))
            for rank in range(6)
            for dtype in (torch.float32, torch.float64)
        )

    def forward(self) -> Tensor:
        return sum((p.double().sum() for p in self.kinds), torch.zeros((), dtype=torch.float64))


def _of_many_kinds(rank: int, world: int) -> list[float]:
    model = ManyKinds()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    engine = compile_with(zerort.initialize(model=model, optimizer=optimizer, config=config)[0])
    for _ in range(3):
        engine.backward(engine())
        engine.step()
    keep(engine)
    return [float(p.detach().double().mean()) for p in model.kinds]


@pytest.mark.slow
def test_gradients_of_many_kinds_do_not_reach_the_compilers_limit() -> None:
    assert ranks.run(1, _of_many_kinds, timeout=170.0) == [[0.25] * 12]


def _with_one_that_breaks_hooks(rank: int, world: int) -> tuple[Exception | None, bool]:
    """As in torch 2.6, which knows no graph task in such a hook."""

    def hook_outside_a_task(tensors: Any, hook: Any, *, mode: str) -> Any:
        def fails(gradient: Tensor) -> None:
            raise AssertionError("expected this hook to be called inside a backward call")

        return tensors[0].register_hook(fails)

    engine = engine_over_terms()
    compiled._SOUND = (99, 0)
    torch.autograd.graph.register_multi_grad_hook = hook_outside_a_task
    return caught(lambda: compile_with(engine)), engine.is_compiled


def test_a_torch_whose_context_breaks_hooks_is_named_and_nothing_is_compiled() -> None:
    ((error, compiled),) = ranks.run(1, _with_one_that_breaks_hooks)
    assert_told(error, ConfigError, torch.__version__, "expected this hook")
    assert not compiled


def _called_twice(rank: int, world: int) -> tuple[list[str], list[int], tuple[float, float]]:
    """Lines about overlap; whether the backward is compiled after each call."""
    lines, pieces = log_lines(), [0]

    def backend(graph: Any, inputs: Any) -> Any:
        pieces[-1] += 1
        return graph.forward

    engine = engine_over_terms()
    engine.compile("eager")
    step_with(engine, 1.0, 1.0)
    for _ in range(2):
        pieces.append(0)
        compile_with(engine, backend, fullgraph=True)
        step_with(engine, 1.0, 1.0)
    keep(engine)
    return [line for line in lines if "compiled whole" in line], pieces, terms(engine)


def test_a_second_call_adds_the_flag_and_a_third_changes_nothing() -> None:
    ((lines, pieces, after),) = ranks.run(1, _called_twice)
    assert len(lines) == 1 and after == (-3.0, -3.0)
    assert pieces[0] == 0 < pieces[1]


def _advice(rank: int, world: int) -> list[str]:
    lines = log_lines()
    keep(compile_with(engine_over_terms()))
    return [line for line in lines if "compiled whole" in line]


def test_with_the_flag_nobody_is_told_that_nothing_overlaps() -> None:
    assert ranks.run(1, _advice) == [[]]
