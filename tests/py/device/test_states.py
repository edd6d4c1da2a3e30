"""States that leave the device between two steps, on the stand-in, whose memory is counted: all are
away behind `offload_states`, and all is back to the bit behind `reload_states`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import ranks
import zerort
from homes import BOTH, OPTIMIZER, PARAM, Ran, Setting, data, engine_of, train, weights
from stand_in import Machine
from zerort.device.host import AcceleratorHost
from zerort.zero import OffloadDeviceEnum, OffloadStateTypeEnum

SETTINGS = {
    "stage 0": (Setting(0), {}),
    "stage 0, bf16": (Setting(0, "bf16", 2), {}),
    "stage 1": (Setting(1), {}),
    "stage 1, bf16, gas 3": (Setting(1, "bf16", 3), {}),
    "stage 2, bf16": (Setting(2, "bf16", frozen=True), {}),
    "stage 2, fp16 that overflows": (Setting(2, "fp16", 2, overflows=1), {}),
    "stage 2, bf16 masters": (Setting(2, "bf16", low_masters=True), {}),
    "stage 2, SGD": (Setting(2, optimizer="SGD"), {}),
    "stage 2, bf16, at home on the host": (Setting(2, "bf16", 2), OPTIMIZER),
    "stage 3": (Setting(3), {}),
    "stage 3, bf16, gas 3": (Setting(3, "bf16", 3, frozen=True), {}),
    "stage 3, bf16, shards on the host": (Setting(3, "bf16"), PARAM),
    "stage 3, bf16, all on the host": (Setting(3, "bf16"), BOTH),
}


def live(machine: Machine) -> int:
    """Bytes of the device that are in use."""
    gc.collect()
    new = torch.UntypedStorage._new_with_weak_ptr  # None where it is gone
    found = [new(weak.cdata) for weak, _, _ in machine._live if not weak.expired()]
    return sum(storage.nbytes() for storage in found if storage is not None)


def states(engine: Any) -> dict[str, list[Tensor]]:
    """What is DeepSpeed's by name, as far as it is memory of its own."""
    flat = engine._parts.boundary.flat
    lp = [p for p in engine.module.parameters() if not isinstance(p, zerort.params.sharded.Sharded)]
    return {
        "lp_params": [*lp, *(bucket.owned.tensor for bucket in flat.buckets)],
        "hp_params": [b.master for b in flat.trained if b.has_master]
        + [t for group in engine.optimizer.param_groups for t in group["params"]],
        "lp_grads": [bucket.accum.tensor for bucket in flat.trained],
        "optim_states": [
            value
            for state in engine.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.numel() > 1
        ],
    }


def values(engine: Any, machine: Machine) -> dict[str, list[Any]]:
    """Their bits, as a debugger would read them, once the device has come so far."""
    machine.sync(machine.main.clock)
    with _disable_current_modes():
        return {
            name: [t.detach().contiguous().view(-1).view(torch.uint8).tolist() for t in found]
            for name, found in states(engine).items()
        }


def on_host(machine: Machine, tensors: list[Tensor]) -> list[bool]:
    return [machine._is_hosted(tensor) for tensor in tensors if tensor.numel()]


def away_and_back(engine: Any, machine: Machine, counts: list[tuple[int, int, int]]) -> None:
    before = live(machine)
    ids = [id(tensor) for tensor in engine.module.parameters()]
    kept = values(engine, machine)
    at_home = {name: on_host(machine, found) for name, found in states(engine).items()}
    engine.offload_states()
    for found in states(engine).values():
        assert all(on_host(machine, found))
    del found
    left = live(machine)
    engine.offload_states()  # nothing is left to go
    engine.reload_states()
    engine.reload_states()
    counts.append((before, left, live(machine)))
    assert ids == [id(tensor) for tensor in engine.module.parameters()]
    assert at_home == {name: on_host(machine, found) for name, found in states(engine).items()}
    assert values(engine, machine) == kept


def ran(setting: Setting, zero: Any, rank: int, **options: Any) -> tuple[Ran, list[Any]]:
    counts: list[tuple[int, int, int]] = []
    machine = Machine()

    def between(engine: Any, step: int) -> None:
        away_and_back(engine, machine, counts)

    return train(setting, zero, rank, between=between, machine=machine, **options), counts


Found = dict[str, tuple[bool, list[Any], list[tuple[int, int, int]]]]


def every_setting(rank: int, world: int) -> Found:
    found = {}
    for name, (setting, zero) in SETTINGS.items():
        ours, counts = ran(setting, zero, rank)
        theirs = train(setting, zero, rank)
        pairs = zip(ours.weights, theirs.weights, strict=True)
        norms = [str(norm) for norm in ours.norms] == [str(norm) for norm in theirs.norms]
        same = norms and all(torch.equal(one, other) for one, other in pairs)
        found[name] = same, ours.races, counts
    return found


@ranks.once(None)
def all_settings(world: int) -> list[Found]:
    return ranks.run(world, every_setting, timeout=200)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_whose_states_leave_behind_each_step_is_the_same_to_the_bit(
    world: int, name: str
) -> None:
    for found in all_settings(world):
        same, races, _ = found[name]
        assert races == []
        assert same


@pytest.mark.parametrize("name", SETTINGS)
def test_the_devices_memory_is_given_back_and_taken_again(name: str) -> None:
    for found in all_settings(1):
        _, _, counts = found[name]
        for before, left, after in counts[1:]:
            assert left < 2048  # scalars, and what the loop itself holds
            assert before > 3 * left
            # what a backward alone needs comes with it; step counts are the stand-in's own now
            assert left < after <= before + 64


# ---- one by one


def stepped(setting: Setting, machine: Machine, zero: Any = None) -> Any:
    """An engine behind its first step."""
    engine = engine_of(setting, zero or {})
    for micro in data(setting, 0)[0]:
        engine.backward(engine(micro).float().square().mean())
        engine.step()
    return engine


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", OffloadStateTypeEnum)
def test_each_kind_goes_alone_and_another_call_adds_to_it(
    stage: int, kind: OffloadStateTypeEnum
) -> None:
    machine = Machine()
    with machine.running():
        engine = stepped(Setting(stage, "bf16", 2), machine)
        before = live(machine)
        engine.offload_states(include=[kind])
        for name, found in states(engine).items():
            assert set(on_host(machine, found)) == {name == kind}, name
        alone = live(machine)
        assert alone < before
        engine.offload_states(include=[kind.value], device=OffloadDeviceEnum.cpu)
        assert live(machine) == alone
        engine.offload_states()
        assert live(machine) < alone
        engine.reload_states(non_blocking=True)
        assert live(machine) == before
    assert machine.races == []


@pytest.mark.parametrize("stage", [2, 3])
def test_what_needs_states_in_between_is_refused_and_loses_nothing(
    stage: int, tmp_path: Path
) -> None:
    machine = Machine()
    with machine.running():
        setting = Setting(stage, "bf16")
        engine, inputs = stepped(setting, machine), data(setting, 0)[1, 0]
        parameter = next(iter(engine.module.parameters()))
        loss = engine(inputs).float().square().mean() if stage == 2 else None
        engine.offload_states()

        def gathered() -> None:
            with zerort.zero.GatheredParameters([parameter], modifier_rank=0):
                pass

        calls: list[Callable[[], object]] = [
            lambda: engine(inputs),
            lambda: torch.no_grad()(engine)(inputs),
            lambda: engine.backward(torch.zeros((), requires_grad=True)),
            engine.step,
            engine.zero_grad,
            lambda: engine.save_checkpoint(str(tmp_path)),
            lambda: engine.load_checkpoint(str(tmp_path)),
            lambda: engine.set_train_batch_size(2),
            lambda: zerort.utils.safe_get_full_fp32_param(parameter),
            lambda: zerort.utils.safe_get_local_optimizer_state(parameter, "exp_avg"),
            *([gathered] if stage == 3 else []),
            *([loss.backward] if loss is not None else []),
        ]
        for number, call in enumerate(calls):
            with pytest.raises(zerort.StepError, match=r"engine\.reload_states\(\) first"):
                call()
                pytest.fail(f"call {number} went through")
        engine.reload_states()
        for step in (1, 2):
            engine.backward(engine(data(setting, 0)[step, 0]).float().square().mean())
            engine.step()
        found = weights(engine)
    expected = train(setting, {}).weights
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("stage", [2, 3])
def test_an_evaluation_runs_while_only_the_optimizers_states_are_away(stage: int) -> None:
    machine = Machine()
    with machine.running():
        setting = Setting(stage, "bf16")
        engine, inputs = stepped(setting, machine), data(setting, 0)[1, 0]
        with torch.no_grad():
            here = engine(inputs)
            engine.offload_states(include=["optim_states", "hp_params", "lp_grads"])
            assert torch.equal(engine(inputs), here)
        with pytest.raises(zerort.StepError, match="forward"):
            engine(inputs)
        engine.reload_states()
    assert machine.races == []


def test_what_is_written_on_the_host_comes_back_and_reaches_the_masters() -> None:
    def write(engine: Any, step: int) -> None:
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.mul_(0.5)

    def write_away(engine: Any, step: int) -> None:
        engine.offload_states()
        write(engine, step)
        engine.reload_states()

    ours = train(Setting(2, "bf16"), {}, between=write_away)
    theirs = train(Setting(2, "bf16"), {}, between=write)
    pairs = zip(ours.weights, theirs.weights, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert ours.races == []


@pytest.mark.parametrize("non_blocking", [False, True])
def test_the_host_waits_for_the_copies_unless_it_is_not_to(non_blocking: bool) -> None:
    machine = Machine()
    with machine.running():
        engine = stepped(Setting(2), machine)
        for move in (engine.offload_states, engine.reload_states):
            arguments = {} if move == engine.reload_states else {"include": ["optim_states"]}
            move(**arguments, non_blocking=non_blocking)
            count = machine.main.clock[machine.main.stream_id]
            assert (machine.host.get(machine.main.stream_id, 0) < count) == non_blocking


@pytest.mark.parametrize("fails_at", [0, 3, 7])
def test_what_is_broken_off_is_brought_back(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    zeros = AcceleratorHost.zeros

    def failing(host: Any, numel: int, dtype: torch.dtype) -> Tensor:
        moved.append(numel)
        if len(moved) == fails_at + 1:
            raise KeyboardInterrupt
        return zeros(host, numel, dtype)

    def break_off(engine: Any, step: int) -> None:
        moved.clear()
        with monkeypatch.context() as patch:
            patch.setattr(AcceleratorHost, "zeros", failing)
            with pytest.raises(KeyboardInterrupt):
                engine.offload_states()
        with pytest.raises(zerort.StepError, match="reload_states"):
            engine.step()
        engine.reload_states()

    ours, theirs = train(Setting(2, "bf16"), {}, between=break_off), train(Setting(2, "bf16"), {})
    pairs = zip(ours.weights, theirs.weights, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_is_destroyed_while_its_states_are_away(stage: int) -> None:
    machine = Machine()
    with machine.running():
        engine = stepped(Setting(stage), machine)
        engine.offload_states()
        engine.destroy()
        engine.reload_states()
        with pytest.raises(zerort.StepError, match="destroy"):
            engine.offload_states()
    assert machine.races == []


# ---- when, and what may be asked for


def test_only_between_two_steps() -> None:
    machine = Machine()
    with machine.running():
        setting = Setting(2, gas=2)
        engine, inputs = stepped(setting, machine), data(setting, 0)[1, 0]

        def inside(module: Any, args: Any) -> None:
            with pytest.raises(zerort.StepError, match="inside a forward"):
                engine.offload_states()

        with engine.module.register_forward_pre_hook(inside):
            loss = engine(inputs).square().mean()
        with engine.no_sync(), pytest.raises(zerort.StepError, match="leave the context"):
            engine.offload_states()
        engine.backward(loss)
        with pytest.raises(zerort.StepError, match="in the middle of a window"):
            engine.offload_states()
        engine.step()
        with pytest.raises(zerort.StepError, match="in the middle of a window"):
            engine.offload_states()
        engine.backward(engine(inputs).square().mean())
        engine.step()
        engine.offload_states()
        engine.reload_states()


@pytest.mark.parametrize(
    "wrong", [{"include": ["params"]}, {"device": "nvme"}, {"device": "disk"}], ids=str
)
def test_what_there_is_not_is_refused_by_name(wrong: dict[str, Any]) -> None:
    engine = engine_of(Setting(1), {})
    with pytest.raises(zerort.ConfigError, match="offload_states"):
        engine.offload_states(**wrong)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_cpu_engine_takes_the_calls_and_moves_nothing(stage: int) -> None:
    engine, inputs = engine_of(Setting(stage), {}), data(Setting(stage), 0)[0, 0]
    for _ in range(2):
        engine.backward(engine(inputs).square().mean())
        engine.step()
        places = [[t.data_ptr() for t in found] for found in states(engine).values()]
        engine.offload_states()
        engine.offload_states(device="none")
        assert places == [[t.data_ptr() for t in found] for found in states(engine).values()]
        engine(inputs)  # nothing is away
        engine.reload_states()
