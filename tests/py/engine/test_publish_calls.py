"""The engine's calls while updated parameters are on their way, and what becomes of a run in which
they do not arrive.
"""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from catching import assert_told, caught
from late import LAYERS, WIDTH, data, engine_of, row, sending_late, step, under_way
from logged import log_lines
from training import keep
from zerort.checkpoint import get_fp32_state_dict
from zerort.errors import CommError
from zerort.memory import unintercepted
from zerort.params.arriving import Arriving
from zerort.run.publication import Publication
from zerort.step import overlap
from zerort.step.events import Feature
from zerort.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

Weights = dict[str, Tensor]


def weights_of(engine: Any) -> Weights:
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


# Calls that read, write or move all parameters, or end the engine: what they leave is what they
# leave where the step has waited. Each returns weights.


def saved(engine: Any, rank: int, folder: Path) -> Weights:
    engine.save_checkpoint(folder)
    return get_fp32_state_dict(folder)


def exported(engine: Any, rank: int, folder: Path) -> Weights:
    engine.save_16bit_model(folder, "model.safetensors")
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def loaded(engine: Any, rank: int, folder: Path) -> Weights:
    engine.save_checkpoint(folder)
    with sending_late(rank):
        step(engine, rank)
    engine.load_checkpoint(folder)
    return weights_of(engine)


def loaded_by_module(engine: Any, rank: int, folder: Path) -> Weights:
    state = {name: torch.full_like(p, 0.5) for name, p in engine.module.named_parameters()}
    with sending_late(rank):
        step(engine, rank)
    engine.load_module_state_dict(state)
    assert not under_way(engine)
    return weights_of(engine)


def evaluated(engine: Any, rank: int, folder: Path) -> Weights:
    with torch.no_grad():
        out = engine(torch.eye(WIDTH))
    assert not under_way(engine)
    return {"out": out}


def evaluated_by_module(engine: Any, rank: int, folder: Path) -> Weights:
    engine.eval()
    with torch.inference_mode():
        out = engine.module(torch.eye(WIDTH)).clone()
    assert not under_way(engine)
    engine.train()
    return {"out": out}


def master(engine: Any, rank: int, folder: Path) -> Weights:
    found = safe_get_full_fp32_param(engine.module[0].weight)
    safe_set_full_fp32_param(engine.module[1].weight, torch.ones(WIDTH, WIDTH))
    assert found is not None and not under_way(engine)
    return {"master": found, **weights_of(engine)}


def stepped_without_use(engine: Any, rank: int, folder: Path) -> Weights:
    """A step whose forward has used one layer: nothing has waited for the others."""
    engine.backward(engine.module[0](data(rank)).square().mean())
    assert len(under_way(engine)) in (0, LAYERS - 1)
    with sending_late(rank):
        engine.step()
    return weights_of(engine)


def accumulated(engine: Any, rank: int, folder: Path) -> Weights:
    """A backward while others are on their way, and a window that is dropped."""
    engine.backward(engine.module[0](data(rank)).square().mean())
    engine.zero_grad()
    engine.backward(engine.module[3](data(rank)).square().mean())
    engine.step()
    return weights_of(engine)


def destroyed(engine: Any, rank: int, folder: Path) -> Weights:
    engine.destroy()
    assert not any(isinstance(p, Arriving) for p in engine.module.parameters())
    return weights_of(engine)


def collected(engine: Any, rank: int, folder: Path) -> Weights:
    """The last owner of the engine goes, and its model stays."""
    model = engine.module
    engines.clear()
    del engine
    gc.collect()
    with torch._C.DisableTorchFunctionSubclass():
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def replanned(engine: Any, rank: int, folder: Path) -> Weights:
    from zerort.config import load
    from zerort.tune.relocate import relocate

    parts = engine._parts
    step(engine, rank)
    engine.backward(engine(data(rank)).square().mean())
    engine._transaction.part.meet()
    config = load({**engine.config, "zero_optimization": {"stage": 2, "reduce_bucket_size": 600}})
    parts.boundary.exchange.prepare()
    with mock.patch.object(parts.boundary.exchange, "prepare"):
        relocate(parts, parts.relocation.plan_of(config, None))
    engine.step()
    step(engine, rank)
    return weights_of(engine)


def offloaded(engine: Any, rank: int, folder: Path) -> Weights:
    engine.offload_states()
    assert not under_way(engine)
    engine.reload_states()
    return weights_of(engine)


CALLS: dict[str, Callable[[Any, int, Path], Weights]] = {
    call.__name__: call
    for call in (
        saved,
        exported,
        loaded,
        loaded_by_module,
        evaluated,
        evaluated_by_module,
        master,
        stepped_without_use,
        accumulated,
        destroyed,
        offloaded,
        collected,
    )
}
engines: list[Any] = []
"""Of the call that runs; nothing else holds it."""


def make_every_call(rank: int, world: int, publish: str) -> dict[str, Weights]:
    found: dict[str, Weights] = {}
    told: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    torch.distributed.broadcast_object_list(told)
    for name, call in CALLS.items():
        engines.append(engine_of(publish))
        step(engines[0], rank)
        with sending_late(rank):
            step(engines[0], rank)
        assert bool(under_way(engines[0])) == (publish == "overlapped")
        weights = call(engines[0], rank, Path(told[0]) / name)
        found[name] = {key: value.clone() for key, value in weights.items()}
        for engine in engines:
            keep(engine)
        engines.clear()
    return found


@ranks.once(maxsize=None)
def every_call(publish: str) -> list[dict[str, Weights]]:
    return ranks.run(2, make_every_call, publish)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_finds_updated_parameters_whole(name: str) -> None:
    for found, right in zip(every_call("overlapped"), every_call("step"), strict=True):
        assert found[name].keys() == right[name].keys()
        for key, tensor in found[name].items():
            assert torch.equal(tensor, right[name][key]), key


class Reader(Feature):
    """Hears that parameters have the new values, and reads one past its class, as features do."""

    name = "reader"

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.read: list[Tensor] = []

    @unintercepted
    def published(self) -> None:
        self.read.append(self.parameter.detach().clone())


def listen(rank: int, world: int) -> list[list[Tensor]]:
    """What a feature reads behind each update, overlapped or not."""
    found = []
    for publish in ("overlapped", "step"):
        engine = engine_of(publish)
        reader = Reader(engine.module[3].weight)
        engine._events.add(reader)
        for _ in range(3):
            with sending_late(rank):
                step(engine, rank)
        found.append(reader.read)
        keep(engine)
    return found


def test_a_feature_that_hears_of_new_values_finds_them() -> None:
    for overlapped, waited in ranks.shared(2, listen):
        assert len(waited) == 3
        assert all(map(torch.equal, overlapped, waited))


# Updates that are lost.


def lose_a_peer(rank: int, world: int, use: str) -> list[Exception | None]:
    """What rank 0 hears whose peer ends in the middle of sending its updates."""
    engine = engine_of("overlapped")
    step(engine, rank)
    send, sent = Publication._send, []

    def ending(self: Publication, flight: Any) -> Any:
        sent.extend([flight] if flight.state.work is None else [])
        if rank == 1 and len(sent) == 2:
            os._exit(7)
        return send(self, flight)

    engine.backward(engine(data(rank)).square().mean())
    with mock.patch.object(Publication, "_send", ending):
        engine.step()
    last = engine.module[3].weight
    uses: dict[str, Callable[[], object]] = {
        "a value": lambda: last.data + 0,
        "a forward": lambda: engine(data(rank)),
        "a step": lambda: step(engine, rank),
        "a save": lambda: engine.save_checkpoint(tempfile.mkdtemp()),
    }
    return [
        caught(uses[use]),
        caught(lambda: last + 0),
        caught(lambda: engine.backward(torch.ones(1, requires_grad=True).sum())),
        caught(lambda: engine.save_checkpoint(tempfile.mkdtemp())),
        caught(engine.step),
        caught(engine.destroy),
    ]


@pytest.mark.parametrize(
    "use",
    [
        "a value",
        "a forward",
        *(pytest.param(u, marks=pytest.mark.slow) for u in ("a step", "a save")),
    ],
)
def test_lost_updates_are_told_where_they_are_asked_for_and_end_the_engine(use: str) -> None:
    survivor, _ = ranks.attempt(2, lose_a_peer, use)
    assert isinstance(survivor, ranks.Returned), survivor
    first, again, backward, save, then, destroyed = survivor.value
    for error in (first, again):
        assert_told(error, CommError, "all_gather of bucket", "rank 1 (process")
    for error in (backward, then):
        assert_told(error, CommError, "after ranks have parted", "all_gather of bucket")
    assert isinstance(save, zerort.errors.ZerortError), save
    assert destroyed is None


# A choice.


def publish_by_choice(rank: int, world: int, waited: float) -> tuple[list[bool], list[str]]:
    """Whether something is on its way behind each step, where waiting is said to take so long."""
    lines = log_lines(logging.INFO)
    engine, found = engine_of("auto"), []
    published = overlap.Overlap.published
    with mock.patch.object(overlap.Overlap, "published", lambda self, _: published(self, waited)):
        for number in range(9):
            step(engine, rank)
            found.append(bool(under_way(engine)))
            if number == 6 and rank == 1:
                alias = engine.module[2].weight.data
            if number == 7 and rank == 1:
                del alias
    keep(engine)
    return found, [line for line in lines if "updated parameters" in line]


def test_auto_overlaps_what_is_worth_it_once_it_is_known_and_while_nobody_has_an_alias() -> None:
    (here, said), (there, told) = ranks.run(2, publish_by_choice, 10.0)
    assert here == [False] * 5 + [True] * 4
    assert there == [False] * 5 + [True, True, False, True]  # it has one in the eighth
    assert len(said) == 1 and "from now on arrive beside the next forward" in said[0]
    assert len(told) == 1 and "view of parameter 2.weight" in told[0]


def test_auto_leaves_it_at_a_step_that_waits_where_nothing_is_won() -> None:
    for found, said in ranks.shared(2, publish_by_choice, 0.0):
        assert not any(found)
        assert all("too little" in line for line in said)


def publish_nothing(rank: int, world: int) -> None:
    for stage in (0, 3):
        engine = engine_of("overlapped", stage=stage, stage3_param_persistence_threshold=0)
        for _ in range(2):
            step(engine, rank)
            assert not under_way(engine)
            assert not any(isinstance(p, Arriving) for p in engine.module.parameters())
        keep(engine)


def test_at_stages_0_and_3_nothing_is_on_its_way_behind_a_step() -> None:
    ranks.shared(2, publish_nothing)


def test_one_rank_has_nothing_to_wait_for() -> None:
    engine = engine_of("overlapped")
    step(engine, 0)
    assert not under_way(engine)


# Compiled modules.


def whole(model: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def by_layers(model: nn.Module, backend: Any) -> nn.Module:
    for layer in model:
        layer.compile(backend=backend)
    return model


def wrapped_layers(model: nn.Module, backend: Any) -> nn.Module:
    for index, layer in enumerate(model):
        model[index] = torch.compile(layer, backend=backend)
    return model


COMPILED = [whole, in_place, by_layers, wrapped_layers]


def train_compiled(rank: int, world: int) -> dict[str, tuple[list[int], list[int], bool]]:
    """By the way in which it is compiled: graphs compiled up to each step, buckets that were on
    their way behind the first of layers that are compiled by themselves, and whether weights are
    right.
    """
    plain = engine_of("step", model=_plain_row())
    for _ in range(5):
        step(plain, rank)
    right, found = weights_of(plain), {}
    for compile_ in COMPILED:
        torch._dynamo.reset()
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        engine = engine_of("overlapped", model=compile_(_plain_row(), backend))
        counts, left = [], []
        for _ in range(5):
            with sending_late(rank):
                step(engine, rank)
            counts.append(len(graphs))
        now = dict(zip(right, weights_of(engine).values(), strict=True))
        same = all(torch.equal(now[name], right[name]) for name in right)
        if compile_ in (by_layers, wrapped_layers):
            step(engine, rank)
            engine.module[0](data(rank))
            left.append(len(under_way(engine)))
        found[compile_.__name__] = (counts, left, same)
        keep(engine)
    return found


def _plain_row() -> nn.Sequential:
    model = row()
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    return model


@ranks.once(maxsize=None)
def compiled() -> list[dict[str, tuple[list[int], list[int], bool]]]:
    return ranks.run(2, train_compiled)


@pytest.mark.parametrize("way", [way.__name__ for way in COMPILED])
def test_a_compiled_module_waits_in_front_of_its_frame_and_is_not_compiled_again(way: str) -> None:
    for found in compiled():
        counts, left, same = found[way]
        assert same
        # the first layer's input needs no gradient, and the others share a graph
        assert set(counts) == {2 if "layers" in way else 1}, counts
        assert left in ([], [LAYERS - 1])
