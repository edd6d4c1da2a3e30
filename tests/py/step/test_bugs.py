"""Six bugs of DeepSpeed 0.19.8 that train on with wrong weights and no error, and their neighbours.

The weights are minus the gradient (see `Terms`), so every assertion is the gradient that must have
been applied. Each docstring says what an engine with the bug ends with.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from models import Terms
from terms import Weights, engine_over_terms, step_with, weights
from training import at_stage

below_3 = pytest.mark.parametrize("stage", [0, 1, 2])
every_stage = pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])


def _use_one_vector_a_rank(rank: int, world: int, stage: int) -> Weights:
    engine = engine_over_terms(at_stage(stage, reduce_bucket_size=10**6))
    return step_with(engine, a=1.0) if rank == 0 else step_with(engine, b=10.0)


@every_stage
def test_h_1_ranks_that_use_different_parameters_do_not_swap_their_gradients(stage: int) -> None:
    """Filling buckets by arrival pairs rank 0's `a` with rank 1's `b`: (-5.5, 0) and (0, -5.5), or
    the two swapped.
    """
    assert ranks.shared(2, _use_one_vector_a_rank, stage) == [(-0.5, -5.0)] * 2


def _leave_b_out_of_the_third_step(rank: int, world: int, stage: int) -> Weights:
    engine = engine_over_terms(at_stage(stage))
    for _ in range(2):  # the first boundary exchanges the launch order, and with it the buffers
        step_with(engine, a=1.0, b=1.0)
    return step_with(engine, a=1.0)


@every_stage
def test_h_2_a_parameter_unused_now_does_not_get_the_last_gradient_again(stage: int) -> None:
    """A buffer that is not cleared for the parameter that did not come moves `b` once more: (-3,
    -3).
    """
    assert ranks.shared(2, _leave_b_out_of_the_third_step, stage) == [(-3.0, -2.0)] * 2


def _go_back_twice(rank: int, world: int, stage: int, forwards_first: bool) -> Weights:
    engine = engine_over_terms(at_stage(stage))
    if forwards_first:
        losses = engine(1.0, 1.0), engine(2.0, 4.0)
        for loss in losses:
            engine.backward(loss)
    else:
        engine.backward(engine(1.0, 1.0))
        engine.backward(engine(2.0, 4.0))
    engine.step()
    return weights(engine)


@every_stage
@pytest.mark.parametrize("forwards_first", [False, True])
def test_h_3_two_backwards_before_a_step_add_up(stage: int, forwards_first: bool) -> None:
    """A second reduction that overwrites the first's result ends with the second gradient alone:
    (-2, -4).
    """
    assert ranks.shared(2, _go_back_twice, stage, forwards_first) == [(-3.0, -5.0)] * 2


def _zero_between_micro_batches(rank: int, world: int, stage: int) -> Weights:
    engine = engine_over_terms(at_stage(stage), accumulation=2)
    engine.backward(engine(64.0, 64.0))
    engine.step()
    engine.zero_grad()
    return step_with(engine, a=2.0, b=4.0)


@every_stage
def test_h_4_zero_grad_drops_gradients_that_are_reduced_already(stage: int) -> None:
    """Clearing only `.grad` keeps the first micro-batch in the reduced shard: (-33, -34)."""
    assert ranks.shared(2, _zero_between_micro_batches, stage) == [(-1.0, -2.0)] * 2


def _zero_before_the_step(rank: int, world: int, stage: int) -> Weights:
    engine = engine_over_terms(at_stage(stage))
    engine.backward(engine(64.0, 64.0))
    engine.zero_grad()
    return step_with(engine, a=2.0, b=4.0)


@every_stage
def test_h_4_zero_grad_drops_a_whole_backward_of_the_boundary(stage: int) -> None:
    """The boundary's backward has travelled at every stage; kept, it gives (-66, -68)."""
    assert ranks.shared(2, _zero_before_the_step, stage) == [(-2.0, -4.0)] * 2


def _bypass_the_outputs_directly(rank: int, world: int, stage: int) -> Weights:
    engine = engine_over_terms(at_stage(stage), accumulation=4)
    for _ in range(4):
        loss = engine(a=1.0) + 8.0 * engine.module.b.sum()
        loss.backward()
        engine.step()
    return weights(engine)


@below_3
def test_h_6_a_term_that_bypasses_the_outputs_counts_once(stage: int) -> None:
    """Dividing by the accumulation steps in a hook on the outputs misses the term: (-1, -32)."""
    assert ranks.shared(2, _bypass_the_outputs_directly, stage) == [(-1.0, -8.0)] * 2


class _Aside(Terms):
    """Keeps the term with `b` beside its output."""

    def forward(self, a: float, b: float) -> Tensor:
        self.side = b * self.b.sum()
        return a * self.a.sum()


def _take_a_term_from_beside_the_outputs(rank: int, world: int, stage: int) -> Weights:
    engine = engine_over_terms(at_stage(stage), accumulation=4, model=_Aside())
    for _ in range(4):
        loss = engine(1.0, 8.0)
        (loss + engine.module.side).backward()
        engine.step()
    return weights(engine)


@every_stage
def test_h_6_a_term_from_beside_the_outputs_counts_once(stage: int) -> None:
    """The same without a parameter in the loss, which stage 3 refuses."""
    assert ranks.shared(2, _take_a_term_from_beside_the_outputs, stage) == [(-1.0, -8.0)] * 2


class _RaiseOnce(torch.autograd.Function):
    """The identity; its backward raises while `armed`."""

    armed = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if _RaiseOnce.armed:
            raise ArithmeticError("the user's own backward")
        return gradient


class _Fragile(Terms):
    """`Terms` whose `a` comes after a node that may raise; `b` has its gradient by then."""

    def forward(self, a: float, b: float) -> Tensor:
        return a * _RaiseOnce.apply(self.a).sum() + b * self.b.sum()


def _retry_a_backward_that_raised(rank: int, world: int, stage: int) -> Weights:
    engine = engine_over_terms(at_stage(stage), model=_Fragile())
    step_with(engine, 1.0, 1.0)
    _RaiseOnce.armed = True
    with pytest.raises(ArithmeticError):
        engine.backward(engine(64.0, 64.0))
    _RaiseOnce.armed = False
    return step_with(engine, 2.0, 4.0)


@every_stage
def test_a_backward_that_raised_leaves_nothing_behind(stage: int) -> None:
    """What had arrived before the exception, kept, would be added to the retry: (-3, -69)."""
    assert ranks.shared(2, _retry_a_backward_that_raised, stage) == [(-3.0, -5.0)] * 2


def _train_on_zeros(rank: int, world: int, stage: int) -> Weights:
    engine = engine_over_terms({**at_stage(stage), "bf16": {"enabled": True}})
    step_with(engine, 0.0, 0.0)
    return step_with(engine, 1.0, 2.0)


@every_stage
def test_a_gradient_of_zeros_is_a_gradient_in_bf16(stage: int) -> None:
    """DeepSpeed's bf16 optimizer divides by the norm and raises."""
    assert ranks.shared(2, _train_on_zeros, stage) == [(-1.0, -2.0)] * 2


def _start_with_odd_shapes(rank: int, world: int, stage: int) -> float:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scalar = nn.Parameter(torch.tensor(2.0))
            self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())

        def forward(self) -> Tensor:
            return self.scalar * self.turned[2, 1]

    engine = engine_over_terms(at_stage(stage), model=Odd())
    engine.backward(engine())
    engine.step()
    module = engine.module
    with zerort.zero.GatheredParameters([module.turned, module.scalar]):
        return module.turned[2, 1].item() + 100 * module.scalar.item()


@every_stage
def test_scalar_and_transposed_parameters_keep_their_elements_apart(stage: int) -> None:
    """Element (2, 1) is 5 and gets the scalar, 2, as its gradient; the scalar gets 5. Read in
    another order it is 4.
    """
    assert ranks.shared(2, _start_with_odd_shapes, stage) == [3.0 + 100 * -3.0] * 2
