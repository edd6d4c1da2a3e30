"""Engines without an optimizer: they only run forward, alone and beside one that trains."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from adapters import WIDTH, data, is_held, settings
from catching import assert_told, caught
from training import keep
from weighing import alive, covered, private, reserved
from zerort.cli import main
from zerort.errors import ConfigError, PlanError, PlanMismatch, StepError
from zerort.grads.compiled import _SOUND
from zerort.zero import GatheredParameters, Init

COMPILES = tuple(map(int, torch.__version__.split(".")[:2])) >= _SOUND

STAGES = [0, 1, 2, 3]


class Net(nn.Module):
    """A stack of layers with a buffer, and weights that are tied."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(self.norm(x)))
        return self.last(x) + self.shift

    def generate(self, x: Tensor, tokens: int) -> Tensor:
        with torch.no_grad():
            for _ in range(tokens):
                x = torch.tanh(self(x))
        return x


def net(seed: int = 3) -> Net:
    torch.manual_seed(seed)
    return Net()


def reference(model: nn.Module, stage: int, **more: Any) -> Any:
    """An engine without an optimizer, whose batches and clipping are those of one that trains."""
    engine, optimizer, _, scheduler = zerort.initialize(model=model, config=settings(stage, **more))
    assert optimizer is None and scheduler is None
    keep(engine)
    return engine


def trained(model: nn.Module, stage: int) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-3)
    engine = zerort.initialize(model=model, optimizer=optimizer, config=settings(stage))[0]
    keep(engine)
    return engine


# What it computes


def computed(rank: int, world: int) -> None:
    """Every stage, from rank 0's values, in fp32 and bf16, training or evaluating."""
    with torch.no_grad():
        truth = [net()(data(step, rank)) for step in range(3)]
    for stage in STAGES:
        model = net(3 if rank == 0 else 77)
        engine = reference(model, stage)
        assert engine.optimizer is None and engine.lr_scheduler is None
        assert (engine.get_lr(), engine.get_mom(), engine.optimizer_name()) == ([], [], None)
        assert all(map(is_held, model.parameters())) == (stage == 3)
        assert all(parameter.requires_grad for parameter in model.parameters())
        for train in (False, True):
            engine.train(train)
            for grads in (False, True, False):
                with torch.set_grad_enabled(grads):
                    found = [engine(data(step, rank)).detach() for step in range(3)]
                assert all(map(torch.equal, found, truth)), (stage, train, grads)
        assert all(map(is_held, model.parameters())) == (stage == 3)
        lowered = reference(net(), stage, bf16={"enabled": True})
        with torch.no_grad():
            expected = net()
            for parameter in expected.parameters():
                parameter.data = parameter.data.bfloat16()
            low = data(0, rank, torch.bfloat16)
            assert torch.equal(lowered(low), expected(low)), stage


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_engine_without_an_optimizer_computes_what_the_model_does(world: int) -> None:
    ranks.run(world, computed)


# What it refuses


def refused(rank: int, world: int) -> None:
    for stage in STAGES:
        refused_at(stage, rank, world)


def refused_at(stage: int, rank: int, world: int) -> None:
    engine = reference(net(), stage)
    with torch.no_grad():
        truth = engine(data(0, rank))
    loss = torch.ones((), requires_grad=True)
    for call in (
        lambda: engine.backward(loss),
        lambda: engine.scale(loss),
        engine.step,
        engine.allreduce_gradients,
        lambda: engine.set_gradient_accumulation_boundary(True),
        lambda: engine.join().__enter__(),
        lambda: engine.coalesce_grad_reduction().__enter__(),
        # an older torch is refused before, whatever the engine
        *([lambda: engine.compile("eager", compiled_autograd_enabled=True)] if COMPILES else []),
    ):
        assert_told(caught(call), StepError, "only runs forward: it has no optimizer", "give")
    with engine.no_sync():
        assert_told(caught(lambda: engine.backward(loss)), StepError, "only runs forward")
    engine.zero_grad()
    engine.set_train_batch_size(8 * world)
    assert engine.gradient_accumulation_steps() == 2
    assert engine.get_global_grad_norm() is None and not engine.was_step_applied()
    assert (engine.global_steps, engine.overflow) == (0, False)
    with torch.no_grad():
        assert torch.equal(engine(data(0, rank)), truth)
    engine.destroy()
    assert_told(caught(lambda: engine.backward(loss)), StepError, "after engine.destroy()")


def test_calls_that_train_say_that_there_is_no_optimizer_and_leave_the_engine_well() -> None:
    ranks.run(2, refused)


def test_a_scheduler_without_an_optimizer_is_an_error() -> None:
    scheduler = torch.optim.lr_scheduler.ConstantLR
    with pytest.raises(ConfigError, match="without an optimizer"):
        zerort.initialize(model=net(), lr_scheduler=scheduler, config=settings(0))
    with_section = {"scheduler": {"type": "WarmupLR", "params": {}}}
    assert reference(net(), 0, **with_section).lr_scheduler is None


def one_has_none(rank: int, world: int, stage: int) -> Exception | None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0) if rank else None
    config = settings(stage)
    return caught(lambda: zerort.initialize(model=model, optimizer=optimizer, config=config))


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_without_the_others_optimizer_is_named(stage: int) -> None:
    for error in ranks.run(2, one_has_none, stage):
        assert_told(error, PlanMismatch, "rank 1")


# Models with nothing to train, and with nothing at all


def frozen(rank: int, world: int) -> None:
    """A frozen model: with an optimizer of the configuration's, and with one that was given."""
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    for stage in STAGES:
        engine = reference(net().requires_grad_(False), stage, **adam)
        assert_told(caught(engine.step), StepError, "none of its parameters required grad")
        with torch.no_grad():
            assert torch.equal(engine(data(0, rank)), net()(data(0, rank)))
        model = net().requires_grad_(False)
        given = torch.optim.AdamW(model.parameters())
        error = caught(
            lambda m=model, o=given, s=stage: zerort.initialize(
                model=m, optimizer=o, config=settings(s)
            )
        )
        assert_told(error, PlanError, "nothing to train", "give no optimizer")
    still = zerort.initialize(model=net(), config=settings(1, **adam))
    assert isinstance(still[1], torch.optim.AdamW)


def test_a_frozen_model_only_runs_forward() -> None:
    ranks.run(2, frozen)


class Bare(nn.Module):
    """Without a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def bare(rank: int, world: int, folder: str) -> None:
    for stage in STAGES:
        torch.manual_seed(rank)
        engine = reference(Bare(), stage)
        torch.manual_seed(0)
        assert torch.equal(engine(data(0, rank)), Bare()(data(0, rank)))
        engine.save_checkpoint(folder, f"stage{stage}")
        engine.module.shift.zero_()
        engine.load_checkpoint(folder, f"stage{stage}")
        assert engine.module.shift.any()
        engine.destroy()
    error = caught(
        lambda: zerort.initialize(
            model=Bare(), optimizer=lambda p: torch.optim.SGD([torch.zeros(1)]), config=settings(0)
        )
    )
    assert_told(error, PlanError, "a Bare, has no parameters")


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_model_without_a_parameter_runs_forward_too(world: int, tmp_path: Any) -> None:
    ranks.run(world, bare, str(tmp_path))


# Stage 3: passes


def longer(rank: int, world: int) -> None:
    """One rank generates more than the other, and calls once more than it."""
    engine = reference(net(), 3)
    truth = net()
    for tokens in ((5, 2), (1, 4), (3, 3)):
        found = engine.generate(data(0, rank), tokens[rank])
        assert torch.equal(found, truth.generate(data(0, rank), tokens[rank])), tokens
    if rank == 0:
        # with a graph, which no backward follows
        for call in (engine, engine.module):
            assert torch.equal(call(data(9, 0)), truth(data(9, 0)))
    assert torch.equal(engine(data(1, rank)), truth(data(1, rank)))
    engine.destroy()


def test_one_rank_may_run_more_forwards_than_another() -> None:
    ranks.run(2, longer)


def one_raises(rank: int, world: int) -> None:
    engine = reference(net(), 3)
    truth = net()
    if rank == 0:
        error = caught(lambda: engine(torch.zeros(2, WIDTH + 1)))
        assert isinstance(error, RuntimeError), error
    for step in range(2):
        assert torch.equal(engine(data(step, rank)), truth(data(step, rank)))
    engine.destroy()


def test_a_forward_that_raises_is_the_callers_own_affair() -> None:
    ranks.run(2, one_raises)


def passed_through(rank: int, world: int) -> None:
    """A gradient for the input comes through a frozen model; none comes into one that is not."""
    truth = net().requires_grad_(False)
    expected = data(0, rank).requires_grad_()
    truth(expected).square().sum().backward()
    for stage in STAGES:
        engine = reference(net().requires_grad_(False), stage)
        for _ in range(3):
            given = data(0, rank).requires_grad_()
            engine(given).square().sum().backward()
            assert torch.equal(given.grad, expected.grad), stage
        assert all(parameter.grad is None for parameter in engine.module.parameters())
    engine = reference(net(), 3)
    for _ in range(2):
        loss = engine(data(0, rank)).square().sum()
        assert_told(caught(loss.backward), StepError, "only runs forward", "torch.no_grad()")
        with torch.no_grad():
            assert torch.equal(engine(data(1, rank)), net()(data(1, rank)))
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    below = reference(net(), 1)
    below(data(0, rank)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in below.module.parameters())


def test_a_backward_goes_through_a_frozen_model_and_says_why_it_ends_in_another() -> None:
    ranks.run(2, passed_through)


# Beside an engine that trains


def preferred(policy: Any, frozen: Any, rank: int, step: int, order: int) -> None:
    """A step of DPO's kind: the reference runs before the policy or behind it."""
    given = data(step, rank)
    with torch.no_grad():
        known = frozen(given) if order == 0 else None
    found = policy(given)
    with torch.no_grad():
        known = frozen(given) if known is None else known
    policy.backward((found - known).square().mean() + found.mean())
    policy.step()


def beside(rank: int, world: int) -> None:
    truth: list[dict[str, Tensor]] = []
    for stage in STAGES:
        for first in ("policy", "reference"):
            if first == "policy":
                policy, frozen = trained(net(), stage), reference(net(4), stage)
            else:
                frozen, policy = reference(net(4), stage), trained(net(), stage)
            for step in range(4):
                preferred(policy, frozen, rank, step, order=step % 2)
            with GatheredParameters(list(policy.module.parameters())):
                found = {n: p.detach().clone() for n, p in policy.module.named_parameters()}
            with GatheredParameters(list(frozen.module.parameters())):
                for ours, theirs in zip(
                    frozen.module.parameters(), net(4).parameters(), strict=True
                ):
                    assert torch.equal(ours, theirs), stage
            truth.append(found)
    for found in truth[2:]:
        assert found.keys() == truth[0].keys()
        for name, value in found.items():
            torch.testing.assert_close(value, truth[0][name], rtol=1e-6, atol=1e-7)


def test_a_reference_beside_a_policy_changes_nothing_of_its_training() -> None:
    ranks.run(2, beside)


def survived(rank: int, world: int) -> None:
    """One engine is destroyed or collected, the other goes on."""
    for stage in (1, 3):
        for way in ("destroy", "collect"):
            policy = trained(net(), stage)
            frozen = zerort.initialize(model=net(4), config=settings(stage))[0]
            preferred(policy, frozen, rank, 0, order=0)
            if way == "destroy":
                frozen.destroy()
            del frozen
            gc.collect()
            again = reference(net(4), stage)
            for step in (1, 2):
                preferred(policy, again, rank, step, order=step % 2)
            policy.destroy()
            del policy
            gc.collect()
            with torch.no_grad():
                assert torch.equal(again(data(0, rank)), net(4)(data(0, rank))), (stage, way)


def test_an_engine_goes_on_when_the_other_has_ended() -> None:
    ranks.run(2, survived)


def judged(rank: int, world: int) -> None:
    """A policy is trained through a frozen model that looks at its outputs, as critics do."""
    found = []
    for stage in STAGES:
        for critics in (0, 3):
            policy, critic = trained(net(), stage), reference(net(4).requires_grad_(False), critics)
            norms = []
            for step in range(4):
                policy.backward(critic(policy(data(step, rank))).square().mean())
                policy.step()
                norms.append(policy.get_global_grad_norm())
            found.append(norms)
            assert all(parameter.grad is None for parameter in critic.module.parameters())
    assert all(norms == found[0] for norms in found), found


def test_a_loss_may_come_through_a_frozen_model_to_one_that_trains() -> None:
    ranks.run(2, judged)


def twice(rank: int, world: int) -> None:
    """One model in two engines: below stage 3 they share it, at stage 3 the second is refused."""
    for stage in (1, 3):
        model = net()
        policy = trained(model, stage)
        error = caught(lambda m=model, s=stage: reference(m, s))
        if stage == 3:
            assert_told(error, PlanError, "belongs to an engine of stage 3 that is alive")
        else:
            assert error is None
        policy.backward(policy(data(0, rank)).square().mean())
        policy.step()
        assert policy.was_step_applied()


def test_a_model_at_stage_3_belongs_to_one_engine() -> None:
    ranks.run(2, twice)


# What it costs, and what is off


def weighed(rank: int, world: int, transport: str) -> tuple[float, float, float]:
    """Memory of this rank's before and after a forward, and what it has brought to share, as parts
    of the whole model's.
    """
    gc.collect()
    gc.freeze()
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(6)))
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    engine = reference(model, 3, zerort={"transport": transport})
    before = covered(private(alive()))
    with torch.no_grad():
        engine(torch.zeros(1, 128))
    return before / whole, covered(private(alive())) / whole, reserved(world) / whole


@pytest.mark.parametrize("transport", ["gloo", "shared"])
def test_a_rank_keeps_its_part_of_the_values_and_nothing_else(transport: str) -> None:
    for before, after, shared in ranks.run(2, weighed, transport):
        assert 0.5 <= before < 0.51 and 0.5 <= after < 0.51
        # one bucket is gathered here, which has two turns of this rank's half
        assert shared == (0 if transport == "gloo" else pytest.approx(1, abs=0.05))


def without_features(rank: int, world: int, folder: str) -> None:
    """The configuration of an engine that trains: nothing of its features stands in the way."""
    engine = reference(
        net(),
        2,
        csv_monitor={"enabled": True, "output_path": folder},
        progressive_layer_drop={"enabled": True},  # a keyword that the model does not take
        eigenvalue={"enabled": True, "layer_name": "nowhere", "layer_num": 2},
        wall_clock_breakdown=True,
        flops_profiler={"enabled": True},
        steps_per_print=1,
    )
    with torch.no_grad():
        assert torch.equal(engine(data(0, rank)), net()(data(0, rank)))
    assert not engine.monitor.enabled and engine.get_pld_theta() is None
    assert engine.get_wall_clock_timers() == {}
    assert not os.listdir(folder)


def test_features_of_training_are_off(tmp_path: Any) -> None:
    ranks.run(2, without_features, str(tmp_path))


# What is kept and looked at


def looked_at(rank: int, world: int, folder: str) -> None:
    truth = net().state_dict()
    for stage in STAGES:
        gathers = {"stage3_gather_16bit_weights_on_model_save": True}
        config = settings(stage)
        config["zero_optimization"] |= gathers if stage == 3 else {}
        engine = zerort.initialize(model=net(), config=config)[0]
        keep(engine)
        assert engine.save_16bit_model(f"{folder}/{stage}", "weights.bin")
        found = torch.load(f"{folder}/{stage}/weights.bin", weights_only=True)
        assert all(torch.equal(found[name], truth[name]) for name in truth)
        assert set(engine.state_dict()) == {f"module.{name}" for name in truth}
        assert set(engine.module_state_dict()) == set(truth)
        weight = engine.module.layers[0].weight
        assert zerort.utils.safe_get_full_fp32_param(weight) is None or torch.equal(
            zerort.utils.safe_get_full_fp32_param(weight), truth["layers.0.weight"]
        )
        assert zerort.utils.safe_get_full_grad(weight) is None
        assert zerort.utils.safe_get_full_optimizer_state(weight, "exp_avg") is None
        engine.load_module_state_dict(net(8).state_dict())
        with torch.no_grad():
            assert torch.equal(engine(data(0, rank)), net(8)(data(0, rank))), stage
        with GatheredParameters([weight], modifier_rank=0):
            if rank == 0:
                weight.data.zero_()
        with GatheredParameters([weight]):
            assert stage < 3 or not weight.any()


def test_its_weights_can_be_saved_read_and_replaced(tmp_path: Any) -> None:
    ranks.run(2, looked_at, str(tmp_path))


def checkpointed(rank: int, world: int, folder: str) -> None:
    """Every stage's checkpoint, of an engine that trained and of one that did not, into both kinds
    at every stage.
    """
    trains = {}
    for stage in STAGES:
        engine = trained(net(), stage)
        for step in range(2):
            engine.backward(engine(data(step, rank)).square().mean())
            engine.step()
        engine.save_checkpoint(folder, f"trained{stage}")
        with torch.no_grad():
            trains[stage] = engine(data(5, rank))
        other = reference(net(8), stage)
        other.save_checkpoint(folder, f"weights{stage}", {"note": stage})
    with torch.no_grad():
        plain = net(8)(data(5, rank))
    for stage in STAGES:
        loads = reference(net(), stage)
        for source in STAGES:
            path, _ = loads.load_checkpoint(folder, f"trained{source}")
            assert path is not None and loads.global_steps == 2
            assert loads.last_load.stayed == loads.last_load.unused == ()
            assert any("state of the optimizer AdamW" in s for s in loads.last_load.not_restored)
            with torch.no_grad():
                assert torch.equal(loads(data(5, rank)), trains[source]), (stage, source)
            path, note = loads.load_checkpoint(folder, f"weights{source}")
            assert note == {"note": source} and loads.last_load.not_restored == ()
            with torch.no_grad():
                assert torch.equal(loads(data(5, rank)), plain), (stage, source)
        fresh = trained(net(), stage)
        fresh.load_checkpoint(folder, f"weights{(stage + 1) % 4}")
        assert any("AdamW starts anew" in s for s in fresh.last_load.not_restored)
        fresh.eval()
        with torch.no_grad():
            assert torch.equal(fresh(data(5, rank)), plain), stage
        fresh.backward(fresh(data(0, rank)).square().mean())
        fresh.step()
        assert fresh.was_step_applied()


def test_checkpoints_go_from_each_kind_of_engine_and_stage_to_each(tmp_path: Any) -> None:
    ranks.run(2, checkpointed, str(tmp_path))
    assert main(["ckpt", "show", str(tmp_path), "weights3"]) == 0
    for stage in (0, 3):
        tag = f"weights{stage}"
        script = tmp_path / tag / "zero_to_fp32.py"
        out = tmp_path / f"out{stage}"
        subprocess.run([sys.executable, script, tmp_path, out, "-t", tag], check=True, timeout=60)
        found = torch.load(out / "pytorch_model.bin", weights_only=True)
        assert all(torch.equal(found[name], value) for name, value in net(8).state_dict().items())


# Where the model comes from


def built(rank: int, world: int) -> None:
    truth = net()(data(0, rank)).detach()
    torch.manual_seed(3 if rank == 0 else 55)
    with Init():
        model = Net()
    assert all(map(is_held, model.parameters()))
    engine = reference(model, 3)
    with torch.no_grad():
        born = engine(data(0, rank))
    torch.testing.assert_close(born, truth)
    with torch.device("meta"):
        model = Net()
    model.shift = torch.zeros(WIDTH)
    engine = reference(model, 3)
    with torch.no_grad():
        assert engine(data(0, rank)).isfinite().all()
    assert all(map(is_held, engine.module.parameters()))


def test_a_model_that_is_born_in_parts_or_on_meta_runs_forward() -> None:
    ranks.run(2, built)


def quantized(rank: int, world: int) -> None:
    """What no bucket can hold stays whole; small parameters too, and all of them may be."""
    model = net()
    model.codes = nn.Parameter(torch.arange(40, dtype=torch.int8), requires_grad=False)
    engine = reference(model, 3)
    assert not is_held(model.codes) and is_held(model.first.weight)
    config = settings(3)
    del config["zero_optimization"]["stage3_param_persistence_threshold"]
    whole = zerort.initialize(model=net(3 if rank == 0 else 9), config=config)[0]
    keep(whole)
    assert not any(map(is_held, whole.module.parameters()))
    for each in (engine, whole):
        assert torch.equal(each(data(0, rank)), net()(data(0, rank)))


def test_what_cannot_be_sharded_is_whole() -> None:
    ranks.run(2, quantized)
