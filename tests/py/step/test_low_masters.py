"""Training without fp32 masters: parameters of 16 bits that are their own, with state of 16 bits or
of fp32 beside them.

Against a twin of plain torch over the mean of the ranks' gradients, to the bit; by the bytes that
are allocated; through checkpoints, into each other's precision too; and by what cannot be.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from weighing import alive, covered
from zerort.config import load
from zerort.errors import ConfigError
from zerort.optim.segments import Segment
from zerort.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
)

WORLD, STEPS, WIDTH, LAYERS = 2, 4, 64, 8
SMALL = 16_384
"""Bytes of step counts, ballots and scalars."""
FULL = {"bf16": {"enabled": True}}
LOW = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
LOWEST = {"bf16": {**LOW["bf16"], "bf16_optimizer_states": True}}
HALF = {"fp16": {"enabled": True, "loss_scale": 64, "fp16_master_weights_and_grads": True}}
SECTIONS = {"full": FULL, "low": LOW, "lowest": LOWEST, "half": HALF}
DTYPES = {"low": torch.bfloat16, "lowest": torch.bfloat16, "half": torch.float16}
ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4}}
BYTES = {"full": 2 + 4 + 4 + 8, "low": 2 + 2 + 8, "lowest": 2 + 2 + 4, "half": 2 + 2 + 8}
"""Of a parameter: itself and its master, the sum of its gradient, and Adam's two moments."""


some_stages = pytest.mark.parametrize(
    "stage", [0, *(pytest.param(more, marks=pytest.mark.slow) for more in (1, 2)), 3]
)


def model(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))


def batch(rank: int, number: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7 * number + rank)
    return torch.randn(4, WIDTH, generator=generator).to(dtype)


def config(kind: str, stage: int, gas: int = 1, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 3000, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 0.0,
        "optimizer": ADAM,
        "zero_optimization": zero,
        **SECTIONS[kind],
        **more,
    }


def engine_of(kind: str, stage: int, gas: int = 1, **more: Any) -> Any:
    return zerort.initialize(model=model(), config=config(kind, stage, gas, **more))[0]


def advance(engine: Any, rank: int, numbers: range) -> None:
    dtype = torch.float16 if engine.fp16_enabled() else torch.bfloat16
    for number in numbers:
        engine.backward(engine(batch(rank, number, dtype)).float().square().mean())
        engine.step()


def weights(engine: Any) -> dict[str, Tensor]:
    named = engine.module.named_parameters()
    return {name: safe_get_full_fp32_param(p).clone() for name, p in named}


def states(engine: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": safe_get_full_optimizer_state(p, key).clone()
        for name, p in engine.module.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
    }


def train(rank: int, world: int, stage: int) -> dict[str, Any]:
    found = {}
    for kind in DTYPES:
        engine = engine_of(kind, stage)
        advance(engine, rank, range(STEPS))
        found[kind] = weights(engine), states(engine)
        engine.destroy()
    return found


@ranks.once(None)
def trained(stage: int) -> list[dict[str, Any]]:
    return ranks.run(WORLD, train, stage)


def twin(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Plain torch over the mean of both ranks' gradients, which is rounded to the masters' dtype;
    the optimizer works in fp32 where its state is.
    """
    dtype = DTYPES[kind]
    scale = 64.0 if dtype == torch.float16 else 1.0
    wide = kind != "lowest"
    module = model().to(dtype)
    names, params = zip(*module.named_parameters(), strict=True)
    seen = [p.detach().float() if wide else p.detach() for p in params]
    optimizer = torch.optim.AdamW(seen, lr=0.01, weight_decay=0.1, eps=1e-4, fused=True)
    for number in range(STEPS):
        sums: list[Tensor] = []
        for rank in range(WORLD):
            loss = module(batch(rank, number, dtype)).float().square().mean() * scale
            gradients = torch.autograd.grad(loss, params)
            sums = [g.float() for g in gradients] if not sums else [
                total + g.float() for total, g in zip(sums, gradients, strict=True)
            ]  # fmt: skip
        for tensor, total in zip(seen, sums, strict=True):
            tensor.grad = (total / WORLD).to(dtype).to(tensor.dtype).div_(scale)
        optimizer.step()
        with torch.no_grad():
            for parameter, tensor in zip(params, seen, strict=True):
                parameter.copy_(tensor)
                tensor.copy_(parameter)
    kept = {
        f"{name}.{key}": optimizer.state[tensor][key]
        for name, tensor in zip(names, seen, strict=True)
        for key in ("exp_avg", "exp_avg_sq")
    }
    return {n: p.detach().float() for n, p in zip(names, params, strict=True)}, kept


@some_stages
@pytest.mark.parametrize("kind", DTYPES)
def test_parameters_that_are_their_own_masters_train_like_plain_torch(
    kind: str, stage: int
) -> None:
    want_weights, want_states = twin(kind)
    for found in trained(stage):
        have_weights, have_states = found[kind]
        assert {t.dtype for t in have_states.values()} == {
            torch.bfloat16 if kind == "lowest" else torch.float32
        }
        for name, want in want_weights.items():
            assert have_weights[name].dtype == torch.float32
            assert torch.equal(have_weights[name], want), name
        for name, want in want_states.items():
            assert torch.equal(have_states[name], want), name


def weigh(rank: int, world: int, stage: int) -> dict[str, int]:
    found = {"numel": 0}
    for kind in SECTIONS:
        gc.freeze()
        before = covered(alive())
        engine = zerort.initialize(model=model(LAYERS), config=config(kind, stage))[0]
        advance(engine, rank, range(2))
        found[kind] = covered(alive()) - before
        buckets = engine._parts.boundary.flat.buckets
        found["numel"] = sum(b.spec.numel if stage == 0 else b.spec.shard_numel for b in buckets)
        del buckets
        engine.destroy()
        del engine
        gc.unfreeze()
    return found


@some_stages
def test_what_is_given_up_takes_no_memory(stage: int) -> None:
    for found in ranks.run(WORLD, weigh, stage):
        for kind in DTYPES:
            saved = (BYTES["full"] - BYTES[kind]) * found["numel"]
            assert abs(found["full"] - found[kind] - saved) < SMALL, (kind, found)


def test_no_more_than_a_bucket_is_wide_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, most = 0, 0

    def counting(by: int, call: Any) -> Any:
        def called(segment: Segment) -> None:
            nonlocal wide, most
            before = segment.tensor.dtype
            call(segment)
            if segment.tensor.dtype != before:
                wide += by * segment.length
                most = max(most, wide)

        return called

    monkeypatch.setattr(Segment, "widen", counting(1, Segment.widen))
    monkeypatch.setattr(Segment, "narrow", counting(-1, Segment.narrow))
    engine = engine_of("low", 1)
    advance(engine, 0, range(2))
    buckets = [bucket.spec.numel for bucket in engine._parts.boundary.flat.buckets]
    assert len(buckets) > 2
    assert (wide, most) == (0, max(buckets))
    engine.destroy()


def sums(rank: int, world: int, stage: int) -> list[float]:
    """A weight of 0 after one step of SGD over micro-batches that 16 bits cannot add up."""
    found = []
    for data_types in ({}, {"grad_accum_dtype": "fp32"}):
        module = nn.Linear(WIDTH, 1, bias=False)
        nn.init.zeros_(module.weight)
        sgd = {"type": "SGD", "params": {"lr": 1.0}}
        asked = config("lowest", stage, 4, optimizer=sgd, data_types=data_types)
        engine = zerort.initialize(model=module, config=asked)[0]
        for value in (256.0, 1.0, 1.0, 1.0):
            engine.backward(engine(torch.full((1, WIDTH), value, dtype=torch.bfloat16)).sum())
            engine.step()
        found.append(weights(engine)["weight"][0, 0].item())
        engine.destroy()
    return found


@some_stages
def test_sums_are_of_the_masters_dtype_unless_another_is_asked_for(stage: int) -> None:
    assert ranks.run(WORLD, sums, stage) == [[-64.0, -65.0]] * WORLD


def resume(rank: int, world: int, folder: str, stage: int, other: int) -> dict[str, Any]:
    found = {}
    for kind in SECTIONS:
        engine = engine_of(kind, stage)
        advance(engine, rank, range(2))
        engine.save_checkpoint(folder, tag=kind)
        found[kind, "saved"] = weights(engine), states(engine)
        advance(engine, rank, range(2, STEPS))
        found[kind, "on"] = weights(engine), states(engine)
        engine.destroy()
    for kind in SECTIONS:
        for source in SECTIONS:
            engine = engine_of(kind, other)
            engine.load_checkpoint(folder, tag=source)
            found[kind, source] = weights(engine), states(engine)
            if kind == source:
                advance(engine, rank, range(2, STEPS))
                found[kind, "resumed"] = weights(engine), states(engine)
            engine.destroy()
    return found


@pytest.mark.parametrize(
    ("stage", "other"),
    [(2, 3), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((3, 0), (0, 1)))],
)
def test_a_checkpoint_goes_on_to_the_bit_and_into_any_other_precision(
    tmp_path: Path, stage: int, other: int
) -> None:
    for found in ranks.run(WORLD, resume, str(tmp_path), stage, other):
        # Beside fp32 masters stage 0 gathers rounded sums, and is another run than the others.
        for kind in DTYPES:
            for went_on, resumed in zip(found[kind, "on"], found[kind, "resumed"], strict=True):
                assert all(torch.equal(went_on[name], resumed[name]) for name in went_on), kind
        for kind in SECTIONS:
            for source in SECTIONS:
                _check_taken_over(kind, found[kind, source], found[source, "saved"])
    saved = found["lowest", "saved"][0]
    rebuilt = zerort.checkpoint.get_fp32_state_dict(tmp_path, "lowest")
    assert all(torch.equal(rebuilt[name], want) for name, want in saved.items())
    assert {tensor.dtype for tensor in rebuilt.values()} == {torch.float32}


def _check_taken_over(kind: str, loaded: Any, saved: Any) -> None:
    """Rounded to what masters and states are, and no further."""
    masters = DTYPES.get(kind, torch.float32)
    for name, want in saved[0].items():
        assert torch.equal(loaded[0][name], want.to(masters).float()), (kind, name)
    kept = torch.bfloat16 if kind == "lowest" else torch.float32
    for name, want in saved[1].items():
        assert torch.equal(loaded[1][name], want.to(kept)), (kind, name)


def test_what_a_constructor_has_made_is_as_wide_as_what_is_computed(tmp_path: Path) -> None:
    adagrad = {"type": "Adagrad", "params": {"lr": 0.1, "initial_accumulator_value": 0.3}}
    for kind, dtype in (("low", torch.float32), ("lowest", torch.bfloat16)):
        engine = engine_of(kind, 1, optimizer=adagrad)
        (begun,) = {state["sum"].dtype for state in engine.optimizer.state.values()}
        advance(engine, 0, range(2))
        (after,) = {state["sum"].dtype for state in engine.optimizer.state.values()}
        assert begun == after == dtype
        engine.destroy()


def test_an_optimizer_that_raises_leaves_masters_as_they_are_kept() -> None:
    class Failing(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            if self.state and fails:
                raise ValueError("no")
            return super().step(closure)

    fails = False
    engine = zerort.initialize(
        model=model(),
        optimizer=lambda params: Failing(params, lr=0.1),
        config={key: v for key, v in config("low", 0).items() if key != "optimizer"},
    )[0]
    advance(engine, 0, range(1))
    fails = True
    with pytest.raises(ValueError, match="no"):
        advance(engine, 0, range(1))
    dtypes = {p.dtype for group in engine.optimizer.param_groups for p in group["params"]}
    assert dtypes == {torch.bfloat16}
    engine.destroy()


def test_autocast_over_parameters_of_its_own_precision_is_torchs() -> None:
    asked = config("lowest", 2, torch_autocast={"enabled": True, "dtype": "bf16"})
    engine = zerort.initialize(model=model(), config=asked)[0]
    x = batch(0, 0, torch.float32)  # which bf16 layers would refuse
    engine.backward(engine(x).square().sum())
    own = model().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = own(x).square().sum()
    loss.backward()
    for mine, theirs in zip(engine.module.parameters(), own.parameters(), strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(safe_get_full_grad(mine), theirs.grad)
    engine.destroy()


# What the keys mean, and what they do not go with


def test_the_keys_mean_nothing_where_their_section_is_off() -> None:
    off = load({"bf16": {**LOWEST["bf16"], "enabled": False}, "train_batch_size": 1})
    assert not off.low_masters
    assert not off.wide_states
    assert load({**LOW, "train_batch_size": 1}).wide_states
    assert not load({**LOWEST, "train_batch_size": 1}).wide_states


CPU_ADAM = {
    "optimizer": {"type": "DeepSpeedCPUAdam", "params": {"fp32_optimizer_states": False}},
}


@pytest.mark.parametrize(
    ("kind", "kept"), [("full", torch.float32), ("low", torch.bfloat16), ("lowest", torch.bfloat16)]
)
def test_states_that_need_not_be_fp32_are_what_masters_are(kind: str, kept: torch.dtype) -> None:
    engine = engine_of(kind, 0, **CPU_ADAM)
    advance(engine, 0, range(1))
    assert {state["exp_avg"].dtype for state in engine.optimizer.state.values()} == {kept}
    engine.destroy()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
            "bf16: bf16_optimizer_states needs bf16_master_weights_and_grads",
        ),
        (
            {**LOW, "quantize_training": {"enabled": True}},
            "quantize_training needs fp16 or bf16 with fp32 masters",
        ),
        (
            {**LOW, "torch_autocast": {"enabled": True, "dtype": "fp16"}},
            "bf16 and torch_autocast cannot be enabled together",
        ),
        ({**HALF, **CPU_ADAM}, "fp32_optimizer_states is false, and masters are fp16"),
        ({"bf16": {"bf16_master_weights_and_grads": 1}}, "expected true or false, got 1"),
    ],
)
def test_what_cannot_be_together_is_refused_by_name(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load({"train_batch_size": 1, **section})
