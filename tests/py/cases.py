"""The table of what is trained: every way of using an engine whose answer the twin knows."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models import (
    VOCABULARY,
    WIDTH,
    Branches,
    Checkpointed,
    DrawnBranches,
    MixedDtypes,
    OddShapes,
    Reused,
    Tied,
    TinyGPT,
    WithCollective,
    linear,
    mlp,
    partly_frozen,
)
from reference import MICRO_BATCH, Case, Moment
from zerort.optim import Lion

# ---- micro-batches: forward and backward, on an engine or on the twin


def loss_of(engine: Any, at: Moment, *args: Any) -> Tensor:
    """Mean squared distance of the outputs from random targets, in fp32 or better."""
    first = next(engine.module.parameters())
    inputs, targets = at.randn(2, MICRO_BATCH, WIDTH).to(first.device)
    return (engine(inputs.to(first.dtype), *args) - targets).square().mean()


def regress(engine: Any, at: Moment) -> None:
    engine.backward(loss_of(engine, at))


def predict_tokens(engine: Any, at: Moment) -> None:
    device = next(engine.module.parameters()).device
    engine.backward(engine(at.tokens(VOCABULARY, MICRO_BATCH, 12).to(device)))


def use_the_same_branches(engine: Any, at: Moment) -> None:
    engine.backward(loss_of(engine, at, (0, 2)))


def leave_a_branch_out_on_rank_1(engine: Any, at: Moment) -> None:
    engine.backward(loss_of(engine, at, (0, 1, 2, 3) if at.rank == 0 else (0, 1, 3)))


def use_a_branch_per_rank(engine: Any, at: Moment) -> None:
    engine.backward(loss_of(engine, at, (at.rank,)))


def use_a_branch_per_step(engine: Any, at: Moment) -> None:
    engine.backward(loss_of(engine, at, (at.step % 4,)))


def use_a_branch_per_micro_batch(engine: Any, at: Moment) -> None:
    engine.backward(loss_of(engine, at, (at.micro % 4,)))


def run_backwards_on_rank_1(engine: Any, at: Moment) -> None:
    engine.backward(loss_of(engine, at, (0, 1, 2, 3) if at.rank == 0 else (3, 2, 1, 0)))


def reuse_more_often_on_rank_1(engine: Any, at: Moment) -> None:
    """From the second step on, when it is known how often a gradient comes."""
    engine.backward(loss_of(engine, at, 4 if at.rank == 1 and at.step > 0 else 2))


def skip_a_layer_on_rank_1(engine: Any, at: Moment) -> None:
    engine.backward(loss_of(engine, at, None if at.rank == 0 else 2))


def go_twice(engine: Any, at: Moment) -> None:
    regress(engine, at)
    regress(engine, replace(at, step=at.step + 50))


def go_forward_twice_then_back_twice(engine: Any, at: Moment) -> None:
    losses = loss_of(engine, at), loss_of(engine, replace(at, step=at.step + 50))
    for loss in losses:
        engine.backward(loss)


def go_back_twice_over_one_graph(engine: Any, at: Moment) -> None:
    loss = loss_of(engine, at)
    engine.backward(loss, retain_graph=True)
    engine.backward(loss)


def penalize_the_gradient(engine: Any, at: Moment) -> None:
    loss = loss_of(engine, at)
    slopes = torch.autograd.grad(loss, list(engine.module.parameters()), create_graph=True)
    engine.backward(loss + 0.1 * sum(slope.square().sum() for slope in slopes))


def penalize_the_curvature(engine: Any, at: Moment) -> None:
    """A Hessian-vector product in the loss: three graphs deep in the end."""
    loss, parameters = loss_of(engine, at), list(engine.module.parameters())
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    curvature = torch.autograd.grad(
        sum(slope.sum() for slope in slopes), parameters, create_graph=True
    )
    engine.backward(loss + 0.01 * sum(product.square().sum() for product in curvature))


def decayed_loss_of(engine: Any, at: Moment) -> Tensor:
    """A loss with a term that never goes through the module's outputs."""
    return loss_of(engine, at) + 0.05 * sum(p.square().sum() for p in engine.module.parameters())


def bypass_the_outputs(engine: Any, at: Moment) -> None:
    engine.backward(decayed_loss_of(engine, at))


def bypass_the_outputs_directly(engine: Any, at: Moment) -> None:
    decayed_loss_of(engine, at).backward()


def call_backward_directly(engine: Any, at: Moment) -> None:
    loss_of(engine, at).backward()


def scale_by_hand(engine: Any, at: Moment) -> None:
    engine.scale(loss_of(engine, at)).backward()


def do_not_divide_by_accumulation(engine: Any, at: Moment) -> None:
    engine.backward(loss_of(engine, at), scale_wrt_gas=False)


def hold_a_backward(engine: Any, at: Moment) -> None:
    with engine.no_sync():
        regress(engine, replace(at, step=at.step + 50))
    regress(engine, at)


def drop_a_backward(engine: Any, at: Moment) -> None:
    """Drops the window's micro-batches before this one too."""
    regress(engine, replace(at, step=at.step + 50))
    engine.zero_grad()
    regress(engine, at)


def scale_by_hand_then_let_the_engine(engine: Any, at: Moment) -> None:
    scale_by_hand(engine, at)
    regress(engine, replace(at, step=at.step + 50))


def evaluate_in_between(engine: Any, at: Moment) -> None:
    regress(engine, at)
    engine.eval()
    with torch.no_grad():
        loss_of(engine, at)
    loss_of(engine, at)  # a graph that nobody uses
    engine.train()


def use_drawn_branches(engine: Any, at: Moment) -> None:
    """Another selection in another order for every rank, step and micro-batch; the first branch
    always trains.
    """
    draw = random.Random(f"{at}")
    others = range(1, len(engine.module.branches))
    order = [0, *draw.sample(others, draw.randint(0, len(others)))]
    draw.shuffle(order)
    engine.backward(loss_of(engine, at, order))


# ---- what happens between steps


def freeze_at(frozen: dict[int, bool], module: nn.Module, step: int) -> None:
    """Freezes or unfreezes the first layer before the steps in `frozen`."""
    if step in frozen:
        next(module.children()).requires_grad_(not frozen[step])


# ---- optimizers, groups, schedules

adamw = partial(torch.optim.AdamW, lr=0.01, eps=1e-3, weight_decay=0.1)
momentum = partial(torch.optim.SGD, lr=0.2, momentum=0.9, weight_decay=0.1)
nesterov = partial(torch.optim.SGD, lr=0.2, momentum=0.9, nesterov=True)
adagrad = partial(torch.optim.Adagrad, lr=0.1, eps=1e-3)
OTHER_ELEMENTWISE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, lr=0.01, eps=1e-3, weight_decay=0.1),
    "amsgrad": partial(torch.optim.AdamW, lr=0.01, eps=1e-3, amsgrad=True, fused=True),
    "adamax": partial(torch.optim.Adamax, lr=0.01, eps=1e-3),
    "adadelta": partial(torch.optim.Adadelta, lr=1.0, eps=1e-3),
    "nadam": partial(torch.optim.NAdam, lr=0.01, eps=1e-3),
    "radam": partial(torch.optim.RAdam, lr=0.01, eps=1e-3),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, eps=1e-3, momentum=0.9, centered=True),
    "rprop": partial(torch.optim.Rprop, lr=0.01),
    "asgd": partial(torch.optim.ASGD, lr=0.1),
    "lion": partial(Lion, lr=0.01, weight_decay=0.1),
}
"""Each treats every element alone, so each runs on shards."""
halving = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)


def weights_and_biases(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups; their parameters alternate in the model."""
    named = list(module.named_parameters())
    return [
        {
            "params": [p for name, p in named if name.endswith("weight")],
            "lr": 0.1,
            "weight_decay": 0.2,
        },
        {"params": [p for name, p in named if not name.endswith("weight")], "lr": 0.4},
    ]


def matrices(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.dim() == 2]


def last_layer_only(module: nn.Module) -> list[nn.Parameter]:
    return list(list(module.children())[-1].parameters())


plain = Case(mlp, regress)
gpt = Case(TinyGPT, predict_tokens, optimizer=adamw)

CASES: dict[str, Case] = {
    "linear": Case(linear, regress),
    "mlp": plain,
    "gpt": gpt,
    "gpt_clipped": replace(gpt, clip=0.3),
    # models as they are
    "frozen": Case(partly_frozen, regress),
    "frozen_with_decay": Case(partly_frozen, regress, optimizer=momentum),
    "tied": Case(Tied, regress),
    "unused_everywhere": Case(Branches, use_the_same_branches),
    "unused_everywhere_with_momentum": Case(Branches, use_the_same_branches, optimizer=momentum),
    "unused_everywhere_with_adamw": Case(Branches, use_the_same_branches, optimizer=adamw),
    "unused_on_one_rank": Case(Branches, leave_a_branch_out_on_rank_1),
    "another_unused_each_step": Case(Branches, use_a_branch_per_step, optimizer=momentum),
    "another_used_each_micro_batch": Case(Branches, use_a_branch_per_micro_batch),
    "another_used_on_each_rank": Case(Branches, use_a_branch_per_rank),
    "other_order_on_one_rank": Case(Branches, run_backwards_on_rank_1),
    "odd_shapes": Case(OddShapes, regress),
    "odd_shapes_with_adamw": Case(OddShapes, regress, optimizer=adamw),
    "mixed_dtypes": Case(MixedDtypes, regress),
    "groups": Case(mlp, regress, optimizer=momentum, groups=weights_and_biases),
    "groups_with_adamw": Case(mlp, regress, optimizer=adamw, groups=weights_and_biases),
    "not_in_the_optimizer": Case(mlp, regress, groups=last_layer_only),
    "reused": Case(Reused, regress),
    "reused_checkpointed_reentrant": Case(partial(Reused, reentrant=True), regress),
    "reused_more_often_checkpointed_reentrant": Case(
        partial(Reused, reentrant=True), reuse_more_often_on_rank_1
    ),
    "reused_checkpointed": Case(partial(Reused, reentrant=False), regress),
    "checkpointed_reentrant": Case(partial(Checkpointed, reentrant=True), regress),
    "checkpointed": Case(partial(Checkpointed, reentrant=False), regress),
    "collective_in_backward": Case(WithCollective, skip_a_layer_on_rank_1),
    # ways to call backward
    "two_backwards": Case(mlp, go_twice),
    "two_forwards_then_two_backwards": Case(mlp, go_forward_twice_then_back_twice),
    "retained_graph": Case(mlp, go_back_twice_over_one_graph),
    "gradient_penalty": Case(mlp, penalize_the_gradient),
    "hessian_vector_product": Case(mlp, penalize_the_curvature),
    "bypass": Case(mlp, bypass_the_outputs),
    "bypass_direct": Case(mlp, bypass_the_outputs_directly),
    "direct": Case(mlp, call_backward_directly),
    "scaled_by_hand": Case(mlp, scale_by_hand),
    "scaled_by_hand_and_by_the_engine": Case(mlp, scale_by_hand_then_let_the_engine),
    "held_in_no_sync": Case(mlp, hold_a_backward),
    "dropped_by_zero_grad": Case(mlp, drop_a_backward, optimizer=momentum),
    "not_divided": Case(mlp, do_not_divide_by_accumulation),
    "evaluated_in_between": Case(mlp, evaluate_in_between),
    # between steps
    "frozen_after_a_step": Case(
        mlp, regress, optimizer=adamw, before=partial(freeze_at, {1: True})
    ),
    "frozen_then_unfrozen": Case(
        mlp, regress, optimizer=momentum, before=partial(freeze_at, {1: True, 2: False})
    ),
    "frozen_then_unfrozen_with_adamw": Case(
        mlp, regress, optimizer=adamw, before=partial(freeze_at, {1: True, 3: False}), steps=5
    ),
    "unfrozen_after_a_step": Case(
        partly_frozen, regress, optimizer=momentum, before=partial(freeze_at, {1: False})
    ),
    # optimizers, clipping, schedules
    "momentum": Case(mlp, regress, optimizer=momentum),
    "nesterov": Case(mlp, regress, optimizer=nesterov),
    "adamw": Case(mlp, regress, optimizer=adamw),
    "adagrad": Case(mlp, regress, optimizer=adagrad),
    **{name: Case(mlp, regress, optimizer=make) for name, make in OTHER_ELEMENTWISE.items()},
    "clipped": replace(plain, clip=0.1),
    "clip_not_reached": replace(plain, clip=1e3),
    "scheduled": Case(mlp, regress, optimizer=momentum, scheduler=halving),
}

WHOLE: dict[str, Case] = {
    "adafactor": Case(mlp, regress, optimizer=partial(torch.optim.Adafactor, lr=0.1)),
}
"""Optimizers that look at whole parameters: for a stage that keeps them whole."""
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    WHOLE["muon"] = Case(
        mlp, regress, optimizer=partial(torch.optim.Muon, lr=0.01), groups=matrices
    )

DRAWN: dict[str, Case] = {
    f"drawn_{seed}": Case(
        partial(DrawnBranches, seed), use_drawn_branches, optimizer=momentum, clip=0.5
    )
    for seed in range(12)
}
"""Models and uses at random, the same ones each time."""
