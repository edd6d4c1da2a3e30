"""What is at home on the host: the whole path of steps, on a device whose host is another place.

The stand-in follows what is over before what, the host's own work in memory that copies use
included, and refuses an operation that takes memory of both. Weights, norms and what the host waits
for are compared with the same run without offloading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import ranks
import stand_in
import zerort
from homes import BOTH, OPTIMIZER, PARAM, Ran, Setting, engine_of, train, weights
from stand_in import Machine, Site
from zerort.device import Accelerator
from zerort.device.host import AcceleratorMark
from zerort.memory import FlatBucket, HostRoom, Memory
from zerort.memory.masters import HostMaster
from zerort.memory.sums import HostSums
from zerort.start.homes import Traffic

RATIO = {"offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 0.5}}
PAGEABLE = {"offload_optimizer": {"device": "cpu"}}
OLD = {"cpu_offload": True}
SETTINGS = {
    "stage 1": (Setting(1), OPTIMIZER),
    "stage 1, bf16, gas 3": (Setting(1, "bf16", 3), OPTIMIZER),
    "stage 2, bf16": (Setting(2, "bf16"), OLD),
    "stage 2, gas 3": (Setting(2, gas=3), PAGEABLE),
    "stage 2, fp16 that overflows": (Setting(2, "fp16", overflows=1), OPTIMIZER),
    "stage 2, frozen parts": (Setting(2, "bf16", frozen=True), OPTIMIZER),
    "stage 2, bf16 masters": (Setting(2, "bf16", 2, low_masters=True), OPTIMIZER),
    "stage 3, bf16 masters": (Setting(3, "bf16", low_masters=True), BOTH),
    "stage 2, SGD": (Setting(2, optimizer="SGD"), OPTIMIZER),
    "stage 3": (Setting(3), BOTH),
    "stage 3, shards alone, bf16, gas 3": (Setting(3, "bf16", 3), PARAM),
    "stage 3, bf16, gas 3": (Setting(3, "bf16", 3), BOTH),
    "stage 3, optimizer alone": (Setting(3, "bf16"), OPTIMIZER),
    "stage 3, half of it": (Setting(3, "bf16"), RATIO),
    "stage 3, fp16 that overflows": (Setting(3, "fp16", overflows=1, frozen=True), BOTH),
}


def same(ours: Ran, theirs: Ran) -> bool:
    pairs = zip(ours.weights, theirs.weights, strict=True)
    norms = [str(norm) for norm in ours.norms] == [str(norm) for norm in theirs.norms]
    return norms and all(torch.equal(one, other) for one, other in pairs)


Found = dict[str, tuple[bool, list[Any], list[list[str]], list[list[str]]]]


@ranks.once(None)
def ran(world: int) -> list[Found]:
    """By rank and name: whether bits are equal, races, and what the host waited for, with and
    without.
    """
    return ranks.run(world, every_setting, timeout=200)


def every_setting(rank: int, world: int) -> Found:
    found = {}
    for name, (setting, zero) in SETTINGS.items():
        ours, theirs = train(setting, zero, rank), train(setting, {}, rank)
        found[name] = same(ours, theirs), ours.races, ours.syncs, theirs.syncs
    return found


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_bits_are_those_without_offloading_and_no_access_races(world: int, name: str) -> None:
    for found in ran(world):
        equal, races, _, _ = found[name]
        assert races == []
        assert equal


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_host_waits_once_more_at_the_boundary_and_never_in_a_backward(
    world: int, name: str
) -> None:
    for found in ran(world):
        _, _, ours, theirs = found[name]
        for with_homes, without in zip(ours[1:], theirs[1:], strict=True):
            assert "backward" not in with_homes
            assert "copy" not in with_homes
            assert len(with_homes) <= len(without) + 1


@pytest.mark.parametrize("name", ["stage 2, gas 3", "stage 3, bf16, gas 3"])
def test_a_step_copies_what_the_start_has_logged(name: str) -> None:
    setting, zero = SETTINGS[name]
    counts: list[tuple[int, int]] = []
    ours = train(setting, zero, between=lambda engine, _: counts.append(crossed(engine)))
    traffic = Traffic.of(ours.engine._parts.boundary.flat)
    before, after = counts[-2:]
    assert traffic.sums > 0
    assert (traffic.shards > 0) == (setting.stage == 3)
    assert after[0] - before[0] == setting.gas * traffic.sums
    added = (setting.gas - 1) * traffic.sums
    assert after[1] - before[1] == added + traffic.values_there


def crossed(engine: Any) -> tuple[int, int]:
    host = engine._parts.boundary.flat.trained[0].sums._room.host
    return host.received, host.sent


def test_memory_of_the_device_has_no_masters_sums_or_states() -> None:
    ours = train(Setting(2, "bf16"), OPTIMIZER)
    flat, machine = ours.engine._parts.boundary.flat, ours.machine
    assert all(bucket.is_on_host for bucket in flat.trained)
    for bucket in flat.trained:
        for tensor in (bucket.master, bucket.accum.tensor):
            assert machine._is_hosted(tensor)
        assert not machine._is_hosted(bucket.values.tensor)
    for state in ours.engine.optimizer.state.values():
        assert not machine._known(state["exp_avg"])


# ---- what orders host and device


ORDERED = {"bf16": (Setting(2, "bf16", 2), OPTIMIZER), "shards": (Setting(3, "bf16", 2), BOTH)}


def without_each(rank: int, world: int) -> dict[Site, bool]:
    machines = [train(setting, zero).machine for setting, zero in ORDERED.values()]
    sites = {site for machine in machines for site in machine.sites if site[0] == "host.py"}
    raced = {}
    for site in sorted(sites):
        dropped = [Machine(dropped=site) for _ in ORDERED]
        for machine, (setting, zero) in zip(dropped, ORDERED.values(), strict=True):
            try:
                train(setting, zero, machine=machine)
            except AssertionError:
                machine.races.append(site)
        raced[site] = any(machine.races for machine in dropped)
    return raced


def test_without_a_call_that_orders_copies_an_access_races() -> None:
    (raced,) = ranks.run(1, without_each, timeout=100)
    assert len(raced) >= 2
    assert [site for site, found in raced.items() if not found] == []


# ---- writes outside of steps


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_written_between_steps_reaches_the_masters(stage: int, dtype: str) -> None:
    def clamp(engine: Any, step: int) -> None:
        params = list(engine.module.parameters())
        with zerort.zero.GatheredParameters(params, modifier_rank=0), torch.no_grad():
            for parameter in params:
                if stage == 2:
                    parameter.data.clamp_(-0.05, 0.05)
                else:
                    parameter.clamp_(-0.05, 0.05)

    zero = OPTIMIZER if stage == 2 else BOTH
    ours = train(Setting(stage, dtype), zero, between=clamp)
    theirs = train(Setting(stage, dtype), {}, between=clamp)
    assert same(ours, theirs)
    assert ours.races == []


def test_a_write_of_the_same_bits_with_other_signs_is_seen() -> None:
    def flip(engine: Any, step: int) -> None:
        for parameter in engine.module.parameters():
            parameter.data.neg_()

    assert same(
        train(Setting(2, "bf16"), OPTIMIZER, between=flip),
        train(Setting(2, "bf16"), {}, between=flip),
    )


# ---- an optimizer that somebody listens to


def test_a_step_that_is_listened_to_is_one_step() -> None:
    heard: list[int] = []

    def listen(engine: Any, step: int) -> None:
        if step == 0:
            engine.optimizer.register_step_post_hook(lambda *_: heard.append(1))

    ours = train(Setting(2, "bf16", steps=4), OPTIMIZER, between=listen)
    assert len(heard) == 3
    assert same(ours, train(Setting(2, "bf16", steps=4), {}))


def test_each_bucket_of_a_step_is_on_its_way_before_the_next_is_updated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    step = torch.optim.AdamW.step

    def counting(optimizer: Any, *args: Any) -> Any:
        events.append("step")
        return step(optimizer, *args)

    def tracing(engine: Any, number: int) -> None:
        events.append("end")

    monkeypatch.setattr(torch.optim.AdamW, "step", counting)
    ours = train(Setting(2, "bf16"), OPTIMIZER, between=tracing)
    buckets = len(ours.engine._parts.boundary.flat.trained)
    assert buckets > 2
    assert events == (["step"] * buckets + ["end"]) * 3


# ---- checkpoints


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_goes_on_with_and_without_offloading(stage: int, tmp_path: Path) -> None:
    setting = Setting(stage, "bf16", steps=2)
    homes = BOTH if stage == 3 else OPTIMIZER
    ends = []
    for number, (first, second) in enumerate([({}, {}), (homes, {}), ({}, homes), (homes, homes)]):
        folder = str(tmp_path / str(number))

        def save(engine: Any, step: int, folder: str = folder) -> None:
            if step == setting.steps - 1:
                with _disable_current_modes():  # files are read into memory of nobody's
                    engine.save_checkpoint(folder)

        machine = Machine()

        def load(engine: Any, step: int, folder: str = folder, machine: Machine = machine) -> None:
            if step == 0:
                with _disable_current_modes():
                    engine.load_checkpoint(folder)
                # at addresses, perhaps, of what the device had before
                for value in torch.utils._pytree.tree_leaves(dict(engine.optimizer.state)):
                    if isinstance(value, torch.Tensor):
                        machine.forget(value)

        train(setting, first, between=save)
        ends.append(train(setting, second, between=load, machine=machine))
    for end in ends[1:]:
        assert same(end, ends[0])
        assert end.races == []


# ---- by parameter


@pytest.mark.parametrize("zero", [OPTIMIZER, BOTH], ids=["optimizer", "both"])
def test_masters_gradients_and_states_are_read_and_written_by_parameter(zero: Any) -> None:
    def look(engine: Any, step: int) -> None:
        parameter = next(iter(engine.module.parameters()))
        master = zerort.utils.safe_get_full_fp32_param(parameter)
        state = zerort.utils.safe_get_full_optimizer_state(parameter, "exp_avg")
        seen.append((master, state))
        zerort.utils.safe_set_full_fp32_param(parameter, master * 0.5)
        zerort.utils.safe_set_full_optimizer_state(parameter, state * 2, "exp_avg")

    runs = []
    for homes in (zero, {}):
        seen: list[Any] = []
        runs.append((train(Setting(3, "bf16"), homes, between=look), seen))
    (ours, mine), (theirs, others) = runs
    assert same(ours, theirs)
    assert ours.races == []
    for left, right in zip(mine, others, strict=True):
        assert torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])


# ---- parameters that no optimizer has


@pytest.mark.parametrize("trains", [True, False])
def test_shards_of_a_frozen_base_are_at_home_on_the_host(trains: bool) -> None:
    found = []
    for zero in (BOTH if trains else PARAM, {}):
        machine = Machine()
        with machine.running():
            torch.manual_seed(0)
            model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))
            model[0].requires_grad_(False)
            model[2].requires_grad_(False)
            config = Setting(3, "bf16").config(zero)
            if not trains:
                del config["optimizer"]
            params = [p for p in model.parameters() if p.requires_grad] if trains else None
            engine = zerort.initialize(model=model, config=config, model_parameters=params)[0]
            for value in range(3):
                outputs = engine(torch.full((2, 16), 1.0 + value, dtype=torch.bfloat16))
                if trains:
                    engine.backward(outputs.float().square().mean())
                    engine.step()
            found.append([outputs.detach().clone(), *weights(engine)])
        assert machine.races == []
        held = [b for b in engine._parts.boundary.flat.buckets if not isinstance(b, FlatBucket)]
        assert held
        assert all(bucket.shard_on_host == bool(zero) for bucket in held)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ---- where there is nothing to offload to


def test_a_cpu_engine_takes_the_keys_and_keeps_its_memory() -> None:
    for stage, zero in ((1, OPTIMIZER), (2, OLD), (3, BOTH)):
        engines = [engine_of(Setting(stage, "bf16"), homes) for homes in (zero, {})]
        for engine in engines:
            for value in range(2):
                inputs = torch.full((2, 16), 1.0 + value, dtype=torch.bfloat16)
                engine.backward(engine(inputs).float().square().mean())
                engine.step()
        assert not any(b.is_on_host for b in engines[0]._parts.boundary.flat.trained)
        ours, theirs = map(weights, engines)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_cpus_adam_asks_for_a_home_by_itself() -> None:
    ours = train(Setting(2, "bf16", optimizer="DeepSpeedCPUAdam"), {})
    assert all(bucket.is_on_host for bucket in ours.engine._parts.boundary.flat.trained)
    assert same(ours, train(Setting(2, "bf16", optimizer="Adam"), {}))


def test_an_optimizer_that_steps_on_an_accelerator_only_is_refused() -> None:
    config = Setting(2).config(OPTIMIZER)
    config["optimizer"]["params"]["capturable"] = True
    with Machine().running(), pytest.raises(zerort.ConfigError, match="capturable=True"):
        zerort.initialize(model=torch.nn.Linear(4, 4), config=config)


# ---- one by one: who reads or writes on the host waits for the copy


def on_host() -> HostRoom:
    return HostRoom(Accelerator(torch.device("cpu", 0)).host(pinned=True))


@pytest.mark.parametrize("waits", [True, False])
def test_a_master_is_written_behind_the_copy_of_it(waits: bool) -> None:
    machine = Machine()
    with machine.running():
        owned = Memory.zeros(128, torch.float32, torch.device("cpu"))
        master = HostMaster(owned, torch.float32, on_host())
        master.follow()
        master.lead()
        if waits:
            master.ready()
        master.tensor.add_(1.0)
    assert bool(machine.races) != waits


@pytest.mark.parametrize("waits", [True, False])
def test_sums_are_read_behind_the_copy_of_them(waits: bool) -> None:
    machine = Machine()
    with machine.running():
        sums = HostSums(on_host(), 128, torch.float32)
        sums.open(add=False).tensor.fill_(1.0)
        sums.close()
        total = (sums.whole if waits else sums._memory).tensor.sum()
    assert total == 128
    assert bool(machine.races) != waits


def test_a_sum_waits_for_the_copy_of_the_sum_before_the_last() -> None:
    machine = Machine()
    with machine.running():
        room = on_host()
        sums = [HostSums(room, 128, torch.float32) for _ in range(5)]
        behind, copied = [], []
        for each in sums:
            into = each.open(add=False)
            copies = machine.streams[-1]
            behind.append(machine.current.clock.get(copies.stream_id, 0))
            into.tensor.fill_(1.0)
            each.close()
            copied.append(copies.clock[copies.stream_id])
        assert [each.whole.tensor.sum() for each in sums] == [128.0] * 5
    for number in range(2, 5):  # the second landing is made behind the first copy
        assert copied[number - 2] <= behind[number] < copied[number - 1]
    assert machine.races == []


ORDERS = {
    "the sum behind the copy out of its landing": (AcceleratorMark, "order", False),
    "the copy behind the sum": (stand_in.Stream, "wait_stream", False),
    "the old sum behind its copy": (AcceleratorMark, "order", True),
    "none": (None, "", True),
}


@pytest.mark.parametrize("name", ORDERS)
def test_sums_and_their_copies_are_in_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, adds = ORDERS[name]
    machine = Machine()
    with machine.running():
        room = on_host()
        sums = [HostSums(room, 128, torch.float32) for _ in range(3)]
        for each in sums:  # the landings are made
            each.open(add=False).tensor.fill_(1.0)
            each.close()
        if owner is not None:
            monkeypatch.setattr(owner, method, lambda *_: None)
        for each in sums[-1:] if adds else sums:
            each.open(add=adds).tensor.add_(1.0)
            each.close()
        total = sums[-1].whole.tensor.sum()
    assert owner is not None or total == 256
    assert bool(machine.races) == (owner is not None)


@pytest.mark.parametrize("waits", [True, False])
def test_a_shard_is_written_behind_the_copy_of_it(waits: bool) -> None:
    machine = Machine()
    with machine.running():
        engine = engine_of(Setting(3), BOTH)
        buckets = engine._parts.boundary.flat.buckets
        bucket = next(bucket for bucket in buckets if bucket.shard_on_host)
        bucket.bring()
        if waits:
            bucket.ready()
        bucket.owned.tensor.add_(1.0)
    assert bool(machine.races) != waits


@pytest.mark.parametrize(("stage", "zero"), [(2, OPTIMIZER), (3, BOTH)])
def test_a_gradient_is_read_and_replaced_before_the_step(stage: int, zero: Any) -> None:
    found = []
    for homes in (zero, {}):
        machine = Machine()
        with machine.running():
            engine = engine_of(Setting(stage, "bf16"), homes)
            parameter = engine.module[-1].weight
            inputs = torch.ones(2, 16, dtype=torch.bfloat16)
            engine.backward(engine(inputs).float().square().mean())
            gradient = zerort.utils.safe_get_full_grad(parameter)
            zerort.utils.safe_set_full_grad(parameter, gradient * 2)
            engine.step()
            found.append((gradient, float(engine.get_global_grad_norm()), *weights(engine)))
        assert machine.races == []
    ours, theirs = found
    assert ours[1] == theirs[1]
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[2:], theirs[2:], strict=True))
