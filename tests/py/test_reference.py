"""The twin is only as good as this: it is compared with one process that has the whole batch,
written out by hand.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from cases import CASES, loss_of, momentum, plain
from reference import Case, Moment, Precision, RankSums, RankTwin, Twin
from training import assert_near

WORLD, GAS = 2, 3


def whole_batch_loss(module: torch.nn.Module, step: int) -> torch.Tensor:
    """The mean over all that the ranks see in one step."""
    moments = [Moment(rank, step, micro) for rank in range(WORLD) for micro in range(GAS)]
    return sum(
        loss_of(RankTwin(module, GAS, Precision(), RankSums({})), at) for at in moments
    ) / len(moments)


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_twin_is_one_process_with_the_whole_batch(clip: float) -> None:
    case = replace(plain, optimizer=momentum, clip=clip)
    history = Twin(case, WORLD, GAS).train()
    module = case.seeded_model()
    optimizer = momentum(module.parameters())
    for step in range(case.steps):
        optimizer.zero_grad()
        whole_batch_loss(module, step).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        for name, parameter in module.named_parameters():
            assert_near(
                history.weights[step][name], parameter.detach(), name, 1e-5 if clip else 1e-6
            )


def test_the_ways_to_call_backward_agree() -> None:
    first, *others = (
        Twin(CASES[name], WORLD, GAS).train() for name in ("mlp", "direct", "scaled_by_hand")
    )
    for other in others:
        assert other.norms == pytest.approx(first.norms, rel=1e-6)


def test_a_loss_scale_leaves_no_trace() -> None:
    case: Case = CASES["scaled_by_hand"]
    scaled = Twin(case, WORLD, GAS, Precision(loss_scale=1024.0)).train()
    assert scaled.norms == Twin(case, WORLD, GAS).train().norms


def test_an_unused_parameter_decays_and_a_frozen_one_does_not() -> None:
    unused = Twin(replace(CASES["unused_everywhere"], optimizer=momentum), WORLD, 1)
    frozen = Twin(CASES["frozen_with_decay"], WORLD, 1)
    before = unused.module.branches[1].weight.clone(), frozen.module[0].weight.clone()
    unused.train()
    frozen.train()
    assert unused.module.branches[1].weight.norm() < before[0].norm()
    assert torch.equal(frozen.module[0].weight, before[1])


def test_bf16_parameters_have_masters_in_fp32() -> None:
    tiny_steps = replace(plain, optimizer=partial(torch.optim.SGD, lr=1e-4), steps=200)
    twin = Twin(tiny_steps, 1, 1, Precision(torch.bfloat16))
    before = twin.module[0].weight.detach().clone()
    twin.train()
    assert twin.module[0].weight.dtype == torch.bfloat16
    assert not torch.equal(twin.module[0].weight, before), (
        "steps below a bf16 rounding add up in the master"
    )
