"""What goes wrong at stage 3 gets one error that names the culprit, on every rank, and afterwards
training goes on as if it had not happened.
"""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import routes
import zerort
from catching import assert_told, caught
from logged import log_lines
from routes import Net, engine_over, loss_of
from zerort.memory import FlatBucket
from zerort.memory.guards import guards

Step = Callable[[Any, nn.Module, int, int], None]


def good_step(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    x = routes.data(step, rank)
    engine.backward(loss_of(engine(x)))
    engine.step()
    routes.twin_step(twin, x, lambda loss: loss.backward())  # type: ignore[no-untyped-call]


def between_good_steps(rank: int, bad: Step, model: nn.Module | None = None) -> None:
    """Two good steps, the bad one, two good ones; then parameters are the twin's, which has made
    the good ones alone.
    """
    torch.manual_seed(0)
    model = Net() if model is None else model
    twin = copy.deepcopy(model)
    engine = engine_over(model)
    for step in range(2):
        good_step(engine, twin, rank, step)
    bad(engine, twin, rank, 2)
    for step in range(3, 5):
        good_step(engine, twin, rank, step)
    worst = routes.compare(engine, twin)
    assert worst < 1e-6, worst
    engine.destroy()


class Bomb(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("a bomb in the backward")


def at_block(engine: Any, index: int, what: Callable[[Tensor], Tensor]) -> Any:
    """Until removed, `what` is done to a block's output."""
    block = engine.module.blocks[index]
    return block.register_forward_hook(lambda module, args, out: what(out))


def explode(out: Tensor) -> Tensor:
    raise ValueError("a bomb in the forward")


def raise_in_a_training_forward(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    x = routes.data(step, rank)
    if rank == 1:
        handle = at_block(engine, 1, explode)
        with pytest.raises(ValueError, match="a bomb in the forward"):
            engine(x)
        handle.remove()
        return
    engine.backward(loss_of(engine(x)))
    with pytest.raises(zerort.StepError, match="rank 1: ValueError: a bomb in the forward"):
        engine.step()


def call_something_that_a_failed_rank_does_not(
    engine: Any, twin: nn.Module, rank: int, step: int
) -> None:
    x = routes.data(step, rank)
    if rank == 1:
        handle = at_block(engine, 1, explode)
        assert_told(caught(lambda: engine(x)), ValueError, "a bomb in the forward")
        handle.remove()
        return
    engine.backward(loss_of(engine(x)))
    error = caught(lambda: look_at([engine.module.out.weight]))
    assert_told(error, zerort.StepError, "rank 0 calls GatheredParameters", "rank 1 has failed")


def raise_in_an_evaluation(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    x = routes.data(step, rank)
    with torch.no_grad():
        if rank == 1:
            handle = at_block(engine, 2, explode)
            with pytest.raises(ValueError, match="a bomb in the forward"):
                engine(x)
            handle.remove()
        else:
            engine(x)


def raise_in_a_backward(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    x = routes.data(step, rank)
    handle = at_block(engine, 1, Bomb.apply) if rank == 1 else None
    loss = loss_of(engine(x))
    if handle is not None:
        handle.remove()
        with pytest.raises(ValueError, match="a bomb in the backward"):
            engine.backward(loss)
        engine.step()  # void
        return
    engine.backward(loss)
    with pytest.raises(zerort.StepError, match="rank 1: ValueError: a bomb in the backward"):
        engine.step()


def train_one_forward_more(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    x = routes.data(step, rank)
    loss = loss_of(engine(x))
    with pytest.raises(zerort.StepError, match="ranks are at different places: rank 0 begins a"):
        if rank == 0:
            engine(x)
        else:
            engine.backward(loss)


def differentiate_a_backward(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    x = routes.data(step, rank).requires_grad_()
    loss = loss_of(engine(x))
    with pytest.raises(zerort.StepError, match=r"create_graph=True at stage 3.*Use stage 2"):
        torch.autograd.grad(loss, x, create_graph=True)
    params = list(engine.module.parameters())
    loss = loss_of(engine(x))
    with pytest.raises(zerort.StepError, match=r"create_graph=True at stage 3.*Use stage 2"):
        torch.autograd.grad(loss, params, create_graph=True)


def write_in_a_forward(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    written = engine.module.blocks[1]

    def in_its_call(module: nn.Module, args: Any) -> None:
        with torch.no_grad():
            written.scale.add_(1.0)

    def while_it_is_held(module: nn.Module, args: Any) -> None:
        with zerort.zero.GatheredParameters([written.scale]):
            in_its_call(module, args)

    def by_what_torch_does_not_know(module: nn.Module, args: Any) -> None:
        with torch.no_grad():
            scribble(written.scale)

    for where, how in (
        (written, in_its_call),
        (engine.module.out, while_it_is_held),
        (engine.module.out, by_what_torch_does_not_know),
    ):
        handle = where.register_forward_pre_hook(how)
        with (
            torch.no_grad(),
            pytest.raises(zerort.StepError, match=r"blocks\.1\.scale was written"),
        ):
            engine(routes.data(step, rank))
        handle.remove()


@torch.library.custom_op("zerort_tests::scribble", mutates_args=("x",))
def scribble(x: Tensor) -> None:
    x.add_(1.0)


def touch_outside(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    weight = engine.module.out.weight
    name = "out.weight is sharded"
    touches: list[Callable[[], object]] = [
        lambda: weight + 1,
        weight.sum,
        lambda: torch.stack([weight, weight]),
        lambda: weight.add_(1),
        lambda: nn.init.zeros_(weight),
        lambda: torch._foreach_add_([weight], 1.0),
        lambda: torch.add(torch.ones(1), 1.0, out=weight),
        lambda: setattr(weight, "data", torch.zeros(1)),
        weight.numpy,
        weight.data_ptr,
        lambda: copy.deepcopy(weight),
        lambda: pickle.dumps(weight),
        lambda: weight[0],
        weight.item,
        lambda: weight.T,
        lambda: float(weight[0, 0]),
        lambda: list(weight),
        lambda: engine.module.load_state_dict(twin.state_dict()),
    ]
    for touch in touches:
        error = caught(touch)
        assert error is not None
        assert name in str(error) or ".weight is sharded" in str(error), error
        assert "GatheredParameters" in str(error)
    assert (weight.shape, weight.dtype, weight.numel(), weight.ndim, weight.requires_grad) == (
        (routes.WIDTH, routes.WIDTH),
        torch.float32,
        routes.WIDTH**2,
        2,
        True,
    )
    assert isinstance(weight, nn.Parameter)
    assert "out.weight" in repr(weight)
    assert all(value.is_meta for value in engine.module.state_dict().values())


def read_an_alias_when_it_is_freed(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    """An elementwise read of memory that has been given back would end the process."""
    kept: list[Tensor] = []
    scale = engine.module.blocks[1].scale
    handle = at_block(engine, 1, lambda out: kept.append(scale.detach()[:2]) or out)
    with torch.no_grad():
        engine(routes.data(step, rank))
    handle.remove()
    if guards():
        told = "the values of blocks.1", "are sharded, and something reads the memory"
        assert_told(caught(lambda: kept[0] + 1), RuntimeError, *told)


def export_its_memory(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    weight = engine.module.out.weight
    with zerort.zero.GatheredParameters([weight]):
        kept = weight.detach().numpy()
        before = kept.copy()
    with torch.no_grad():
        engine(routes.data(step, rank))
    assert (kept == before).all()


def look_at(params: list[nn.Parameter], do: Callable[[], object] = lambda: None) -> None:
    with zerort.zero.GatheredParameters(params):
        do()


def call_together_what_is_not(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    params = list(engine.module.parameters())
    error = caught(lambda: look_at(params[:1] if rank else params[-1:]))
    assert_told(error, zerort.StepError, "together, with the same arguments")
    error = caught(lambda: engine.save_checkpoint("/never") if rank else look_at(params))
    assert_told(error, zerort.StepError, "rank 0 calls Gathered", "rank 1 calls save_checkpoint()")


def write_without_a_rank(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    weight = engine.module.out.weight
    error = caught(lambda: look_at([weight], lambda: nn.init.ones_(weight)))
    assert_told(error, zerort.StepError, "out.weight was written inside GatheredParameters")


def raise_inside_gathered(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    weight = engine.module.out.weight
    error = caught(lambda: raise_inside(weight, rank))
    assert (str(error) == "inside") == (rank == 1)


def raise_inside(weight: Tensor, rank: int) -> None:
    with zerort.zero.GatheredParameters([weight], modifier_rank=0):
        if rank == 1:
            raise ValueError("inside")


def step_inside_gathered(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    x = routes.data(step, rank)
    engine.backward(loss_of(engine(x)))
    error = caught(lambda: look_at(list(engine.module.parameters()), engine.step))
    assert_told(error, zerort.StepError, "step() inside GatheredParameters")
    load = partial(engine.load_checkpoint, "/nowhere")
    error = caught(lambda: look_at(list(engine.module.parameters()), load))
    assert_told(error, zerort.StepError, "load_checkpoint() inside GatheredParameters")
    engine.step()
    routes.twin_step(twin, x, lambda loss: loss.backward())  # type: ignore[no-untyped-call]


def evaluate_on_another_thread(engine: Any, twin: nn.Module, rank: int, step: int) -> None:
    errors: list[Exception | None] = []

    def evaluate(out: Tensor) -> Tensor:
        x = routes.data(step, rank)
        thread = threading.Thread(target=lambda: errors.append(caught(lambda: engine(x))))
        thread.start()
        thread.join()
        return out

    handle = at_block(engine, 1, evaluate)
    with torch.no_grad():
        engine(routes.data(step, rank))
    handle.remove()
    assert_told(errors[0], zerort.StepError, "a forward at stage 3 while another thread")


BAD: list[Step] = [
    evaluate_on_another_thread,
    raise_in_a_training_forward,
    call_something_that_a_failed_rank_does_not,
    raise_in_an_evaluation,
    raise_in_a_backward,
    train_one_forward_more,
    differentiate_a_backward,
    write_in_a_forward,
    touch_outside,
    read_an_alias_when_it_is_freed,
    export_its_memory,
    call_together_what_is_not,
    write_without_a_rank,
    raise_inside_gathered,
    step_inside_gathered,
]


def act(rank: int, world: int, name: str) -> None:
    between_good_steps(rank, next(bad for bad in BAD if bad.__name__ == name))


@pytest.mark.parametrize("name", [bad.__name__ for bad in BAD])
def test_it_is_named_and_training_goes_on(name: str) -> None:
    ranks.shared(2, act, name, timeout=60)


def run_out_of_memory(rank: int, world: int) -> None:
    engine = engine_over(Net(), routes.settings(zerort={"timeout": 8}))
    x = routes.data(0, rank)
    for _ in range(2):
        engine.backward(loss_of(engine(x)))
        engine.step()
    if rank == 1:

        def bring(bucket: Any) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        FlatBucket.bring = bring  # type: ignore[method-assign]
    engine(x)


def test_a_rank_without_memory_for_a_gather_is_named_by_all() -> None:
    here, there = ranks.attempt(2, run_out_of_memory, timeout=60)
    assert isinstance(here, ranks.Raised) and isinstance(there, ranks.Raised)
    assert (here.kind, there.kind) == ("CommError", "CommError")
    assert re.search(r"rank 1: no memory for the \d+ bytes of unit \d \(\w+", there.message)
    assert "stage3_max_live_parameters" in there.message
    # Its reason reaches the others with its last words, which a rank of these tests has not.
    assert "rank 1" in here.message, here.message


def start_without_room(rank: int, world: int) -> list[str]:
    lines = log_lines()
    engine_over(Net(), routes.settings(room=10, cap=10))
    return [line for line in lines if "more than room for 10" in line]


def test_a_unit_that_is_larger_than_room_is_named_once() -> None:
    first, second = ranks.shared(2, start_without_room)
    assert len(first) == 1 and second == []
    assert "blocks." in first[0]


def outlive_the_engine(rank: int, world: int) -> None:
    engine = engine_over(Net())
    module, weight = engine.module, engine.module.out.weight
    with zerort.zero.GatheredParameters([weight]):
        kept = weight.detach().clone()
    engine.destroy()
    touches: list[Callable[[], object]] = [
        lambda: weight + 1,
        weight.data_ptr,
        lambda: pickle.dumps(weight),
        weight.zero_,
        lambda: module(routes.data(0, rank)),
    ]
    for touch in touches:
        assert_told(caught(touch), zerort.StepError, "is sharded")
    assert weight.detach().is_meta and weight.shape == kept.shape
    with zerort.zero.GatheredParameters([weight]):
        assert torch.equal(weight, kept)


def test_a_parameter_whose_engine_is_gone_says_so() -> None:
    ranks.shared(2, outlive_the_engine)


def hold_twice(rank: int, world: int) -> None:
    engine = engine_over(Net())
    weight = engine.module.out.weight
    x = routes.data(0, rank)
    with torch.no_grad():
        before = engine(x)
        with (
            zerort.zero.GatheredParameters([weight]),
            zerort.zero.GatheredParameters([weight]),
            zerort.zero.GatheredParameters([weight, engine.module.inp.weight]),
        ):
            inside = engine(x)
        with zerort.zero.GatheredParameters(list(engine.module.parameters())):
            whole = engine(x)
    assert torch.equal(before, inside) and torch.equal(before, whole)


def test_what_is_held_twice_is_not_taken_for_everything() -> None:
    ranks.shared(2, hold_twice)


def be_a_stray(rank: int, world: int) -> list[str]:
    orders = [[0, 1, 2, 3], [3, 1, 0, 2], [1, 3, 2, 0], [2, 0, 3, 1], [0, 3, 1, 2]]
    lines = log_lines()
    engine = engine_over(Net(order=lambda order, call: orders[call % 5]))
    for step in range(12):
        engine.backward(loss_of(engine(routes.data(step, rank))))
        engine.step()
    return [line for line in lines if "in another order every time" in line]


def test_a_pass_that_never_follows_its_list_is_named_once() -> None:
    first, second = ranks.shared(2, be_a_stray)
    assert first == second or (first and second)
    assert any("the forward of Net needs" in line for line in first), first
    assert len(set(first)) == len(first)
