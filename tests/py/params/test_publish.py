"""Updated parameters that arrive beside the next forward: who asks for one waits for its bucket,
whatever way it asks, and everybody else goes on.

Rank 1 sends late, so that on rank 0 `step` has returned while half of each parameter is old. What
is right is what the same steps give with `"publish": "step"`.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import ranks
import zerort
from late import LAYERS, WIDTH, Named, data, engine_of, sending_late, step, under_way
from training import at_stage, keep, train_all
from zerort.params.arriving import Arriving

Use = Callable[[nn.Module, nn.Parameter], Any]
"""Something that reads the parameter, of the model's second layer, and returns what it has read."""


def _loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    return _loaded(file.getvalue())


def _forked(model: nn.Module, parameter: nn.Parameter) -> Tensor:
    """What a process finds that is forked now."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with torch._C.DisableTorchFunctionSubclass():
                os.write(writes, parameter.detach().double().sum().numpy().tobytes())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writes)
    return torch.frombuffer(bytearray(os.read(reads, 8)), dtype=torch.float64)[0]


def _in_thread(model: nn.Module, parameter: nn.Parameter) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(parameter.detach().clone()))
    thread.start()
    thread.join()
    return found[0]


def _averaged(model: nn.Module, parameter: nn.Parameter) -> Tensor:
    average = AveragedModel(model)
    assert not any(isinstance(p, Arriving) for p in average.parameters())
    average.update_parameters(model)
    return average.module[1].weight.detach()


def _vector_written(model: nn.Module, parameter: nn.Parameter) -> Tensor:
    vector = nn.utils.parameters_to_vector(model.parameters())
    return vector[WIDTH * WIDTH : 2 * WIDTH * WIDTH].view(WIDTH, WIDTH)


def _average_by_foreach(model: nn.Module, parameter: nn.Parameter) -> Tensor:
    copies = [torch.zeros_like(p) for p in model.parameters()]
    torch._foreach_lerp_(copies, [p.detach() for p in model.parameters()], 1.0)
    return copies[1]


def _gathered(model: nn.Module, parameter: nn.Parameter) -> Tensor:
    gathered = zerort.zero.GatheredParameters(list(model.parameters()))
    with gathered, torch._C.DisableTorchFunctionSubclass():
        return parameter.detach().clone()


def _outside_optimizer(model: nn.Module, parameter: nn.Parameter) -> Tensor:
    outside = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.zeros(WIDTH, WIDTH)
    outside.step()
    parameter.grad = None
    return parameter.detach()


USES: dict[str, Use] = {
    "data": lambda _, p: p.data.clone(),
    "detach": lambda _, p: p.detach().clone(),
    "clone": lambda _, p: p.clone(),
    "arithmetic": lambda _, p: p + 0.0,
    "from the right": lambda _, p: 0.0 + p,
    "numpy": lambda _, p: torch.from_numpy(p.detach().numpy().copy()),
    "tolist": lambda _, p: torch.tensor(p.tolist()),
    "address": lambda _, p: (p.data_ptr(), p.detach().clone())[1],
    "storage": lambda _, p: (
        torch.tensor(p.untyped_storage().tolist(), dtype=torch.uint8)
        .view(torch.float32)
        .view(WIDTH, WIDTH)
    ),
    "dlpack": lambda _, p: torch.from_dlpack(p.detach()).clone(),
    "view": lambda _, p: p.T.T.clone(),
    "sum of a list": lambda _, p: torch.stack([p, p])[0],
    "deepcopy": lambda _, p: copy.deepcopy(p).detach(),
    "copy": lambda _, p: copy.copy(p).detach().clone(),
    "pickle": lambda _, p: pickle.loads(pickle.dumps(p)).detach(),
    "parameter of it": lambda m, p: (nn.Parameter(m[2].weight).detach().clone(), p.data)[0],
    "constructor of its class": lambda _, p: type(p)(p.detach().clone()).detach(),
    "state dict": lambda m, _: m.state_dict()["1.weight"].clone(),
    "state dict of variables": lambda m, _: m.state_dict(keep_vars=True)["1.weight"] + 0.0,
    "copied model": lambda m, _: copy.deepcopy(m)[1].weight.detach(),
    "pickled model": lambda m, _: pickle.loads(pickle.dumps(m))[1].weight.detach(),
    "saved model": lambda m, _: _saved(m)[1].weight.detach(),
    "saved state": lambda m, _: _saved(m.state_dict())["1.weight"],
    "moved": lambda m, _: m.to("cpu")[1].weight.detach().clone(),
    "average": _averaged,
    "average of lists": _average_by_foreach,
    "vector": _vector_written,
    "optimizer": _outside_optimizer,
    "written by name": lambda _, p: (p.data.mul_(1.0), p.detach().clone())[1],
    "functional call": lambda m, _: torch.func.functional_call(
        m[1], dict(m[1].named_parameters()), (torch.eye(WIDTH),)
    ).t(),
    "by another module": lambda _, p: F.linear(torch.eye(WIDTH), p).t(),
    "its own module": lambda m, _: m[1](torch.eye(WIDTH)).t(),
    "within no_grad": lambda m, _: _no_grad(m),
    "method of its class": lambda _, p: p.doubled() / 2,
    "printed": lambda _, p: (repr(p), p.detach().clone())[1],
    "formatted": lambda _, p: (f"{p}", p.detach().clone())[1],
    "gathered": _gathered,
    "thread": _in_thread,
    "full_like": lambda m, p: torch.full_like(p, 0.0) + p,
}


def _no_grad(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model[1](torch.eye(WIDTH)).t()


def use_in_every_way(rank: int, world: int, publish: str) -> dict[str, tuple[bool, Tensor]]:
    """By use: whether the parameter was on its way before and is itself behind it, and what was
    read.
    """
    engine, found = engine_of(publish), {}
    for name, use in USES.items():
        with sending_late(rank):
            step(engine, rank)
        parameter = engine.module[1].weight
        waited = isinstance(parameter, Arriving)
        read = use(engine.module, parameter)
        here = type(parameter) is Named
        found[name] = (waited and here, read.detach().clone())
    step(engine, rank)
    keep(engine)
    return found


@ranks.once(maxsize=None)
def uses(publish: str) -> list[dict[str, tuple[bool, Tensor]]]:
    return ranks.shared(2, use_in_every_way, publish)


@pytest.mark.parametrize("name", USES)
def test_whoever_asks_for_values_waits_for_them(name: str) -> None:
    for found, right in zip(uses("overlapped"), uses("step"), strict=True):
        waited, read = found[name]
        assert waited, "the parameter was not on its way, or is not itself"
        assert torch.equal(read, right[name][1])


def ask_for_metadata(rank: int, world: int) -> None:
    engine = engine_of("overlapped")
    step(engine, rank)
    parameter = engine.module[1].weight
    before = under_way(engine)
    assert len(before) == LAYERS and isinstance(parameter, nn.Parameter | Named)
    assert parameter.shape == (WIDTH, WIDTH) and parameter.dtype is torch.float32
    assert parameter.requires_grad and parameter.grad is None and parameter.is_leaf
    assert parameter.numel() == WIDTH * WIDTH and len(parameter) == WIDTH
    assert torch.zeros_like(parameter).sum() == 0 and parameter in {parameter}
    assert dict(engine.module.named_parameters())["1.weight"] is parameter
    nn.utils.clip_grad_norm_(engine.module.parameters(), 1.0)
    engine.zero_grad()
    parameter.register_hook(lambda _: None).remove()
    assert engine.module.train() is engine.module and under_way(engine) == before
    engine.destroy()


def test_who_asks_for_metadata_does_not_wait() -> None:
    ranks.shared(2, ask_for_metadata)


def forward_in_parts(rank: int, world: int) -> list[int]:
    """How many buckets have come when each layer has run."""
    engine, x, came = engine_of("overlapped"), data(rank), []
    step(engine, rank)  # in the order that was guessed
    step(engine, rank)
    assert engine._parts.reduction.published == [3, 2, 1, 0]  # of which 3 is the first layer's
    for layer in engine.module:
        x = layer(x)
        came.append(LAYERS - len(under_way(engine)))
        assert not layer._forward_pre_hooks
    engine.destroy()
    return came


def test_each_module_waits_for_its_own_bucket_and_they_come_in_the_order_of_a_forward() -> None:
    assert ranks.shared(2, forward_in_parts) == [[1, 2, 3, 4]] * 2


class Extension(nn.Linear):
    """Reads its weight past torch's functions."""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(x, self.weight)


def read_past_torch(rank: int, world: int) -> list[list[Tensor]]:
    found = []
    for publish in VARIANTS:
        torch.manual_seed(0)
        layers = (Extension(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        engine, outs = engine_of(publish, nn.Sequential(*layers)), []
        for _ in range(3):
            with sending_late(rank):
                step(engine, rank)
            outs.append(engine.module(data(rank)).detach().clone())
        found.append(outs)
        keep(engine)
    return found


def test_a_module_waits_that_reads_its_parameters_past_torch() -> None:
    for overlapped, waited in ranks.shared(2, read_past_torch):
        assert all(map(torch.equal, overlapped, waited))


VARIANTS = ("overlapped", "step")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("case", "accumulation", "more"),
    [
        ("mlp", 1, {}),
        ("mlp", 3, {"bf16": {"enabled": True}}),
        ("frozen_then_unfrozen_with_adamw", 1, {"fp16": {"enabled": True}}),
    ],
)
def test_bits_are_those_of_a_step_that_waits(
    stage: int, case: str, accumulation: int, more: dict[str, Any]
) -> None:
    variants = [{**at_stage(stage), **more, "zerort": {"publish": publish}} for publish in VARIANTS]
    for one, other in ranks.shared(2, train_all, case, accumulation, variants):
        assert one == other


def count_calls(rank: int, world: int, layers: int) -> int:
    """Python's calls in an update that is published beside the forward, and in the wait for it, of
    a model of so many layers in one bucket.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    engine = engine_of("overlapped", model, reduce_bucket_size=10**6)
    for _ in range(3):
        step(engine, rank)
    executor, count = engine._parts.reduction.executor, 0

    def note(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and "zerort" in frame.f_code.co_filename

    executor.publication.land()
    sys.setprofile(note)
    executor.publish(overlapped=True)
    executor.publication.land()
    sys.setprofile(None)
    assert not any(layer._forward_pre_hooks for layer in model)
    keep(engine)
    return count


def test_guards_cost_no_call_for_a_parameter_or_a_module() -> None:
    few, many = (ranks.shared(2, count_calls, layers) for layers in (2, 40))
    assert few == many and few[0] > 10
