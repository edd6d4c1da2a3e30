"""What an engine holds of a parameter can be read and written by the parameter, at every stage."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ranks
import zerort
from models import mlp
from training import keep
from zerort import utils

RATE = 0.5
STAGES = [0, 1, 2, 3]


def settings(stage: int, dtype: str = "fp32", **more: Any) -> dict[str, Any]:
    """Small buckets, so that some parameters are split; nothing is whole at stage 3 but what has
    to be.
    """
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 100,
            "stage3_param_persistence_threshold": 20,
        },
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
        **more,
    }


def engine_over(stage: int, dtype: str = "fp32", optimizer: Any = None, **more: Any) -> Any:
    torch.manual_seed(3)
    model = mlp()
    model[0].bias.requires_grad_(False)
    optimizer = optimizer or (lambda params: torch.optim.Adam(params, lr=RATE))
    engine, *_ = zerort.initialize(
        model=model, optimizer=optimizer, config=settings(stage, dtype, **more)
    )
    keep(engine)
    return engine


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 8, generator=generator).to(dtype)


def averaged(model: nn.Module, x: Tensor, world: int) -> list[Tensor | None]:
    """The mean gradient of each parameter, by torch alone."""
    model.zero_grad()
    model(x).square().mean().backward()
    found: list[Tensor | None] = []
    for parameter in model.parameters():
        if parameter.grad is None:
            found.append(None)
            continue
        total = parameter.grad.float()
        dist.all_reduce(total)
        found.append(total / world)
    return found


def whole(engine: Any) -> list[Tensor]:
    """The module's parameters as every rank has them."""
    params = list(engine.module.parameters())
    with zerort.zero.GatheredParameters(params):
        return [parameter.detach().clone() for parameter in params]


def gradients(rank: int, world: int, stage: int) -> dict[str, Any]:
    torch.manual_seed(3)
    twin = mlp()
    twin[0].bias.requires_grad_(False)
    engine = engine_over(stage, optimizer=lambda params: torch.optim.SGD(params, lr=RATE))
    params = list(engine.module.parameters())
    before = [utils.safe_get_full_grad(p) for p in params]
    engine.backward(engine(batch(rank, 0)).square().mean())
    got = [utils.safe_get_full_grad(p) for p in params]
    local = [utils.safe_get_local_grad(p) for p in params]
    utils.safe_set_full_grad(params[0], torch.full_like(got[0], 0.25))
    utils.safe_update_full_grad_vectorized(params[2:], lambda g, p: torch.zeros_like(g))
    values = whole(engine)
    engine.step()
    return {
        "before": before,
        "got": got,
        "want": averaged(twin, batch(rank, 0), world),
        "local": [None if piece is None else piece.numel() for piece in local],
        "moved": [a - b for a, b in zip(values, whole(engine), strict=True)],
        "norm": engine.get_global_grad_norm(),
        "after": [utils.safe_get_full_grad(p) for p in params],
    }


def masters(rank: int, world: int, stage: int, dtype: str) -> dict[str, Any]:
    engine = engine_over(stage, dtype)
    params = list(engine.module.parameters())
    numbers = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    empty = [utils.safe_get_full_optimizer_state(p, "exp_avg") for p in params]
    engine.backward(engine(batch(rank, 0, numbers)).float().square().mean())
    engine.step()
    read = [utils.safe_get_full_fp32_param(p) for p in params]
    same = all(torch.equal(a.to(numbers), b) for a, b in zip(read, whole(engine), strict=True))
    state = [utils.safe_get_full_optimizer_state(p, "exp_avg") for p in params]
    value = torch.linspace(0, 1, params[0].numel()).reshape(params[0].shape)
    utils.safe_set_full_fp32_param(params[0], value)
    utils.safe_set_full_optimizer_state(params[0], value + 1, "exp_avg_sq")
    found = {
        "empty": empty,
        "read": read,
        "same": same,
        "state": [None if s is None else tuple(s.shape) for s in state],
        "written": torch.equal(utils.safe_get_full_fp32_param(params[0]), value),
        "there": torch.equal(whole(engine)[0], value.to(numbers)),
        "second": torch.equal(
            utils.safe_get_full_optimizer_state(params[0], "exp_avg_sq"), value + 1
        ),
    }
    piece = utils.safe_get_local_fp32_param(params[2])
    utils.safe_set_local_fp32_param(params[2], torch.full_like(piece, 7.0))
    utils.safe_set_local_optimizer_state(params[2], torch.full_like(piece, 9.0), "exp_avg")
    found["sevens"] = bool((utils.safe_get_full_fp32_param(params[2]) == 7).all())
    found["nines"] = bool((utils.safe_get_full_optimizer_state(params[2], "exp_avg") == 9).all())
    local = utils.safe_get_local_optimizer_state(params[2], "exp_avg")
    found["local"] = (piece.numel(), local.numel())
    engine.backward(engine(batch(rank, 1, numbers)).float().square().mean())
    engine.step()  # it goes on
    return found


@ranks.once(None)
def gradients_at(stage: int) -> list[dict[str, Any]]:
    return ranks.shared(2, gradients, stage)


@ranks.once(None)
def masters_at(stage: int, dtype: str) -> list[dict[str, Any]]:
    return ranks.shared(2, masters, stage, dtype)


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_is_the_mean_over_ranks_between_backward_and_step(stage: int) -> None:
    for found in gradients_at(stage):
        assert found["before"] == [None] * 4
        for got, want in zip(found["got"], found["want"], strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        assert found["after"] == [None] * 4


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_replaced_is_what_the_step_applies_and_clips_by(stage: int) -> None:
    for found in gradients_at(stage):
        moved = found["moved"]
        torch.testing.assert_close(moved[0], torch.full_like(moved[0], 0.25 * RATE))
        assert not any(part.abs().max() for part in moved[1:])
        assert found["norm"] == pytest.approx((moved[0].numel() * 0.25**2) ** 0.5)


@pytest.mark.parametrize("stage", STAGES)
def test_local_fragments_of_a_gradient_make_up_the_parameter(stage: int) -> None:
    by_rank = [found["local"] for found in gradients_at(stage)]
    sizes = [None if g is None else g.numel() for g in gradients_at(stage)[0]["got"]]
    for parts, numel in zip(zip(*by_rank, strict=True), sizes, strict=True):
        if numel is None or stage == 0:
            assert set(parts) == {numel}
        else:
            assert sum(parts) == numel


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_masters_and_state_are_read_and_written_whole(stage: int, dtype: str) -> None:
    first, other = masters_at(stage, dtype)
    for found in (first, other):
        assert found["empty"] == [None] * 4
        assert found["same"] and found["written"] and found["there"] and found["second"]
        assert [shape is None for shape in found["state"]] == [False, True, False, False]
        assert all(part.dtype == torch.float32 for part in found["read"])
    assert all(map(torch.equal, first["read"], other["read"]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_reads_and_writes_its_own_fragment(stage: int, dtype: str) -> None:
    found = masters_at(stage, dtype)
    assert all(each["sevens"] and each["nines"] for each in found)
    assert all(each["local"][0] == each["local"][1] for each in found)
    total = sum(each["local"][0] for each in found)
    assert total == 16 * 8 * (2 if stage == 0 else 1)


def windows(rank: int, world: int, stage: int) -> dict[str, Any]:
    """Two micro-batches a step, and a loss scale."""
    engine = engine_over(
        stage, "fp16", gradient_accumulation_steps=2, fp16={"enabled": True, "loss_scale": 8.0}
    )
    params = list(engine.module.parameters())
    weight = params[2]
    read = []
    for step in range(2):
        engine.backward(engine(batch(rank, step, torch.float16)).float().square().mean())
        read.append(utils.safe_get_full_grad(weight))
        if step == 0:
            engine.step()
    torch.manual_seed(3)
    twin = mlp().half()
    wanted = []
    for step in range(2):
        found = averaged(twin, batch(rank, step, torch.float16), world)[2]
        wanted.append(found)
    engine.step()
    return {"read": read, "wanted": wanted, "reduced": utils.safe_get_full_grad(weight)}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_gradient_is_that_of_the_window_so_far_times_the_loss_scale(stage: int) -> None:
    for found in ranks.shared(2, windows, stage):
        one, both = found["read"]
        first, second = (part * 8 / 2 for part in found["wanted"])
        if stage == 3:  # reduced in every micro-batch
            torch.testing.assert_close(one, first, rtol=0.01, atol=1e-3)
        torch.testing.assert_close(both, first + second, rtol=0.01, atol=1e-3)
        assert found["reduced"] is None


HELD = [(0, "bf16"), (1, "fp16"), (2, "fp32"), (3, "bf16")]


def held_back(rank: int, world: int) -> list[dict[str, Any]]:
    return [hold_back(rank, world, stage, dtype) for stage, dtype in HELD]


def hold_back(rank: int, world: int, stage: int, dtype: str) -> dict[str, Any]:
    """Two backwards within `no_sync`, reduced behind it."""
    scaled = {"fp16": {"enabled": True, "loss_scale": 8.0}} if dtype == "fp16" else {}
    engine = engine_over(
        stage, dtype, optimizer=lambda params: torch.optim.SGD(params, lr=RATE), **scaled
    )
    numbers = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    params = list(engine.module.parameters())
    weight, scale = params[2], engine.loss_scale
    torch.manual_seed(3)
    twin = mlp().to(numbers)
    read, own, total = [], [], torch.zeros(weight.shape)
    with engine.no_sync():
        for step in range(2):
            x = batch(rank, step, numbers)
            engine.backward(engine(x).float().square().mean())
            read.append(utils.safe_get_full_grad(weight))
            twin.zero_grad()
            (twin(x).float().square().mean() * scale).backward()
            total = total + list(twin.parameters())[2].grad.float()
            own.append(total)
        frozen = utils.safe_get_full_grad(params[1])
        utils.safe_set_full_grad(weight, torch.full((weight.numel(),), scale * (rank + 1)))
        utils.safe_set_full_grad(params[3], torch.zeros(params[3].shape))
    engine.allreduce_gradients()
    reduced = [utils.safe_get_full_grad(p) for p in params[2:]]
    before = whole(engine)
    engine.step()
    moved = [(a - b).float() for a, b in zip(before, whole(engine), strict=True)]
    return {"read": read, "own": own, "frozen": frozen, "reduced": reduced, "moved": moved} | {
        "scale": scale
    }


@pytest.mark.parametrize("case", range(len(HELD)), ids=[f"{d}-{s}" for s, d in HELD])
def test_what_no_sync_keeps_on_a_rank_can_be_read_and_replaced(case: int) -> None:
    for found in (by_rank[case] for by_rank in held_back_on_two()):
        for got, want in zip(found["read"], found["own"], strict=True):
            torch.testing.assert_close(got.float(), want, rtol=0.01, atol=1e-3)
        assert found["frozen"] is None
        weight, bias = found["reduced"]
        torch.testing.assert_close(weight.float(), torch.full(weight.shape, 1.5 * found["scale"]))
        assert not bias.any()
        moved = found["moved"]
        torch.testing.assert_close(
            moved[2], torch.full(moved[2].shape, 1.5 * RATE), rtol=0.02, atol=0.0
        )
        assert not moved[3].any()


@ranks.once(None)
def held_back_on_two() -> list[list[dict[str, Any]]]:
    return ranks.shared(2, held_back)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_to_read_what_waits_moves_nothing_and_to_replace_it_leaves_nothing_else(dtype: str) -> None:
    engine = engine_over(1, dtype)
    weight = engine.module[2].weight
    x = batch(0, 0, weight.dtype)
    with engine.no_sync():
        engine.backward(engine(x).float().square().mean())
        own = utils.safe_get_full_grad(weight)
        if dtype == "bf16":  # it waits in a sum, and another engine's backward has left this
            weight.grad = torch.ones_like(weight)
            torch.testing.assert_close(utils.safe_get_full_grad(weight), own + 1)
        assert weight.grad is not None
        utils.safe_get_full_grad(weight).zero_()
        assert utils.safe_get_full_grad(weight).any()
        utils.safe_set_full_grad(weight, torch.full(weight.shape, 0.5))
        assert (utils.safe_get_full_grad(weight) == 0.5).all()
    engine.allreduce_gradients()
    assert (utils.safe_get_full_grad(weight) == 0.5).all()


def misused(rank: int, world: int) -> dict[str, Any]:
    engine = engine_over(2)
    params = list(engine.module.parameters())
    engine.backward(engine(batch(rank, 0)).square().mean())
    engine.step()
    said = {}

    def attempt(name: str, call: Any) -> None:
        try:
            call()
        except zerort.StepError as error:
            said[name] = str(error)

    attempt("another parameter", lambda: utils.safe_get_full_fp32_param(params[2 * rank]))
    attempt("no such state", lambda: utils.safe_get_full_optimizer_state(params[0], "exp"))
    wrong = torch.zeros(5 if rank else params[0].numel())
    attempt("wrong size", lambda: utils.safe_set_full_fp32_param(params[0], wrong))
    attempt("no gradient", lambda: utils.safe_set_full_grad(params[0], torch.zeros(8, 16)))
    attempt("local", lambda: utils.safe_set_local_fp32_param(params[0], torch.zeros(1)))
    said["unknown"] = utils.safe_get_full_fp32_param(nn.Parameter(torch.zeros(2)))
    kept = copy.copy(params)
    engine.destroy()
    said["destroyed"] = utils.safe_get_full_fp32_param(kept[0])
    said["local of destroyed"] = utils.safe_get_local_fp32_param(kept[0])
    return said


def test_a_call_that_cannot_be_raises_on_all_ranks() -> None:
    said = ranks.shared(2, misused)
    for each in said:
        assert "rank 0 calls safe_get_full_fp32_param() with 0.weight" in each["another parameter"]
        assert "rank 1 calls safe_get_full_fp32_param() with 2.weight" in each["another parameter"]
        assert "exp_avg, exp_avg_sq" in each["no such state"]
        assert "expected 128 elements" in each["wrong size"]
        assert "has no gradient on this rank" in each["no gradient"]
        assert "this rank's fragment has" in each["local"]
        assert each["unknown"] is each["destroyed"] is each["local of destroyed"] is None
