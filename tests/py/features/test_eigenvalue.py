"""Block eigenvalues: as recorded and as dense Hessians say, the same on all ranks, and nothing of
the training moved by them.
"""

from __future__ import annotations

import gc
import math
import re
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import ranks
from breaking import raises_in_backward
from catching import assert_told, caught
from hessians import (
    RECORDED,
    MlpBlock,
    Net,
    batch,
    bits_of,
    engine_over,
    fill,
    model_of,
    recording,
    section,
)
from zerort.errors import ConfigError, StepError
from zerort.features import hessian, power_iteration
from zerort.features.power_iteration import relative
from zerort.grads.listener import Listener

pytestmark = pytest.mark.timeout(120)


def window(engine: Any, gas: int = 1) -> None:
    for micro in range(gas):
        engine.backward(engine(*batch(micro)))
        engine.step()


# ---- The numbers.


def special(name: str) -> nn.Module:
    """A model of the recording, with what its case's name says of it."""
    model = model_of(re.split("[ ,:]", name, maxsplit=1)[0])
    blocks = model.body.layer
    with torch.no_grad():
        if "a.weight frozen" in name:
            blocks[1].a.weight.requires_grad_(False)
        elif "frozen" in name:
            blocks[1].requires_grad_(False)
        elif "NaN" in name:
            blocks[2].b.bias.fill_(math.nan)
        elif "1e30" in name:
            blocks[2].a.weight.mul_(1e30)
    return model


def label(case: dict[str, Any]) -> str:
    return f"{case['name']}-{case['args']}-{case['scale']}-{case['seed']}"


@pytest.mark.parametrize("case", RECORDED["cases"], ids=label)
def test_a_recorded_case_replays(case: dict[str, Any]) -> None:
    arguments = dict(case["args"])
    blocks = arguments.pop("layer_num")
    engine = engine_over(
        special(case["name"]), gas=case["gas"], eigenvalue=section(blocks, **arguments)
    )
    with recording(case["seed"]) as computed:
        window(engine, case["gas"])
    found = engine.block_eigenvalue
    if not case["result"]:
        assert found is None
        return
    # under a loss scale DeepSpeed's loop is out by it where it ends after one pass
    wrong = case["scale"] ** 2 if arguments["max_iter"] == 1 else 1.0
    # at the last bits of fp32 it matters that sums are in fp64 here
    spare = 1 if arguments["tol"] < 1e-4 else 0
    assert computed.iterations == pytest.approx(case["iterations"], abs=spare)
    assert computed.raw == pytest.approx([raw / wrong for raw in case["raw"]], rel=1e-5)
    values = dict(sorted((block, value) for value, block in found.values()))
    assert list(values.values()) == pytest.approx(case["result"], rel=1e-5)
    assert len(found) == case["keys"]
    assert [name for name in found if found[name][1] == 0] == case["params_of_block_0"]


@pytest.mark.parametrize("name", RECORDED["dense"])
def test_a_fine_tolerance_finds_the_dense_hessians_eigenvalue(name: str) -> None:
    dense = RECORDED["dense"][name]
    gas = 2 if "gas 2" in name else 1
    keys = section(len(dense), tol=1e-6, max_iter=1000, stability=0.0)
    engine = engine_over(model_of(name.split(" ", maxsplit=1)[0]), gas=gas, eigenvalue=keys)
    with recording(7) as computed:
        window(engine, gas)
    tops = [block["top_by_magnitude"] for block in dense]
    assert computed.raw == pytest.approx(tops, rel=1e-5)


@pytest.mark.parametrize("row", RECORDED["post_process"], ids=lambda row: str(row["in"]))
def test_values_are_relative_to_the_largest_as_recorded(row: dict[str, Any]) -> None:
    """But for what is not finite, which counts as 0 and poisons nothing."""
    given = [float(value) for value in row["in"]]
    if not given:
        assert relative(given) == []
    elif all(map(math.isfinite, given)):
        assert relative(given) == pytest.approx([float(value) for value in row["out"]])
    else:
        plain = [value if math.isfinite(value) else 0.0 for value in given]
        assert relative(given) == relative(plain) and all(map(math.isfinite, relative(given)))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_gives_about_the_same(precision: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    keys: dict[str, Any] = {precision: {"enabled": True}}
    if precision == "fp16":
        keys[precision]["initial_scale_power"] = 8
    engine = engine_over(model_of("mlp"), eigenvalue=section(tol=1e-3), **keys)
    with recording(7) as computed:
        engine.backward(engine(*batch(0, dtype)))
        engine.step()
    tops = [block["top_by_magnitude"] for block in RECORDED["dense"]["mlp"]]
    assert computed.raw == pytest.approx(tops, rel=0.05)


# ---- Ranks.


VARIANTS = [(0, 3), (1, 1), (2, 3)]


def train(rank: int, world: int) -> list[Any]:
    """Each variant with eigenvalues and without; rank r of two has row r of the batch."""
    found = []
    for stage, gas in VARIANTS:
        bits = []
        without: list[dict[str, Any]] = [{}] if world == 2 else []
        for keys in ({"eigenvalue": section()}, *without):
            engine = engine_over(model_of("mlp"), stage, gas, **keys)
            drawn = torch.get_rng_state()
            with recording(7) as computed:
                for _ in range(2):
                    for micro in range(gas):
                        x, y = batch(micro)
                        mine = slice(rank, rank + 1) if world == 2 else slice(None)
                        engine.backward(engine(x[mine], y[mine]))
                        assert all(p.grad is None for p in engine.module.parameters()) or gas > 1
                        engine.step()
            assert torch.equal(drawn, torch.get_rng_state())
            bits.append(bits_of(engine))
            if keys:
                found.append((computed.raw, computed.iterations, engine.block_eigenvalue, bits))
    return found


@ranks.once(None)
def trained(world: int) -> list[Any]:
    return ranks.run(world, train)


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=lambda i: str(VARIANTS[i]))
def test_ranks_have_the_same_values_and_weights_are_those_of_a_run_without(variant: int) -> None:
    for results in (trained(1), trained(2)):
        raw, iterations, values, bits = results[0][variant]
        assert len(raw) == 6 and raw[:3] != raw[3:]  # the second step's are of new weights
        for other in results:
            assert other[variant][:3] == (raw, iterations, values)
            assert other[variant][3] == bits and bits[0] == bits[-1]


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=lambda i: str(VARIANTS[i]))
def test_a_batch_over_two_ranks_gives_what_it_gives_on_one(variant: int) -> None:
    assert trained(2)[0][variant][0] == pytest.approx(trained(1)[0][variant][0], rel=1e-4)


def use_a_block_on_one_rank_only(rank: int, world: int) -> Any:
    """Block 2 is in rank 0's graph alone."""
    model = model_of("mlp")
    engine = engine_over(model, 2, eigenvalue=section(tol=1e-6, max_iter=1000))
    if rank == 1:
        model.body.layer[2].forward = lambda x: x
    with recording(7) as computed:
        window(engine)
    return computed.raw, engine.block_eigenvalue


def test_a_block_that_one_rank_does_not_use_is_the_others_share() -> None:
    first, second = ranks.run(2, use_a_block_on_one_rank_only)
    assert first == second and len(first[0]) == 3
    whole = RECORDED["dense"]["mlp"][2]["top_by_magnitude"]
    assert first[0][2] == pytest.approx(whole / 2, rel=1e-5)


# ---- Failures.


class Breaks(torch.autograd.Function):
    """The identity, whose second derivative raises while `broken`, as fused kernels do."""

    broken = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return BreaksTwice.apply(gradient)


class BreaksTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if Breaks.broken:
            raise RuntimeError("derivative is not implemented")
        return gradient


class BreakingBlock(MlpBlock):
    def forward(self, x: Tensor) -> Tensor:
        return Breaks.apply(super().forward(x))


def breaking(stage: int = 0, gas: int = 1, **keys: Any) -> Any:
    return engine_over(fill(Net(BreakingBlock, 3)), stage, gas, eigenvalue=section(**keys))


def fail_on_rank_1(rank: int, world: int) -> list[Any]:
    found: list[Any] = []
    for stage, gas in ((0, 1), (1, 2), (2, 2)):
        engine = breaking(stage, gas)
        before = bits_of(engine)
        Breaks.broken = rank == 1
        error = caught(lambda e=engine, g=gas: window(e, g))
        unchanged = bits_of(engine) == before and engine.block_eigenvalue is None
        Breaks.broken = False
        window(engine, gas)
        twin = engine_over(fill(Net(MlpBlock, 3)), stage, gas)
        window(twin, gas)
        values = engine.block_eigenvalue
        found.append((error, unchanged, values, bits_of(engine) == bits_of(twin)))
    return found


def test_a_rank_that_cannot_differentiate_twice_stops_all_with_its_reason() -> None:
    results = ranks.run(2, fail_on_rank_1)
    for innocent, culprit in zip(*results, strict=True):
        for ours in (innocent, culprit):
            assert_told(
                ours[0], StepError, "rank 1", "eigenvalue", "derivative is not implemented", "MATH"
            )
            assert ours[1] and ours[3]
        assert innocent[2] == culprit[2] is not None


def test_an_own_gradient_is_no_backward_of_the_users() -> None:
    """Although it comes to the module's outputs, nothing is armed for it, nor left behind by one
    that breaks off.
    """
    engine, twin = breaking(0, 2), engine_over(fill(Net(MlpBlock, 3)), 0, 2)
    with mock.patch.object(Listener, "arm") as arm:
        window(engine, 2)
        Breaks.broken = True
        with pytest.raises(StepError):
            window(engine, 2)
        Breaks.broken = False
        window(engine, 2)
    assert not arm.called and engine.block_eigenvalue is not None
    window(twin, 2)
    window(twin, 2)
    assert bits_of(engine) == bits_of(twin)


def interrupt(rank: int, world: int) -> Any:
    """Ctrl-C on rank 1, in the midst of a product."""
    engine = breaking()
    times = hessian.Hessian.times
    calls = []

    def interrupted(block: Any, vector: Tensor) -> Tensor:
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            raise KeyboardInterrupt
        return times(block, vector)

    with mock.patch.object(hessian.Hessian, "times", interrupted):
        try:
            window(engine)
        except KeyboardInterrupt:
            first: Any = "KeyboardInterrupt"
        except StepError as error:
            first = error.with_traceback(None)
    window(engine)
    return first, engine.global_steps, bits_of(engine)


def test_an_interrupt_reaches_the_peers_and_stays_one() -> None:
    innocent, culprit = ranks.run(2, interrupt)
    assert culprit[0] == "KeyboardInterrupt"
    assert_told(innocent[0], StepError, "rank 1: KeyboardInterrupt")
    assert innocent[1:] == culprit[1:] and innocent[1] == 1


def raise_on(hits: set[int], rank: int) -> Any:
    """An engine, and a backward whose micro-batches in `hits` raise on rank 1."""
    engine = engine_over(model_of("mlp"), 2, 3, eigenvalue=section())

    def micro_batch(number: int) -> None:
        loss = engine(*batch(number))
        if rank == 1 and number in hits:
            loss = raises_in_backward(loss, ValueError("broken batch"))
        engine.backward(loss)

    return engine, micro_batch


def fail_a_micro_batch(rank: int, world: int) -> Any:
    errors = []
    for hit in (0, 2):
        engine, micro_batch = raise_on({hit}, rank)
        for number in range(3):
            errors.append(caught(lambda m=micro_batch, n=number: m(n)))
            errors.append(caught(engine.step))
        window(engine, 3)
        assert engine.global_steps == 1
        errors.append(engine.block_eigenvalue)
    return errors


def test_a_failed_micro_batch_hangs_nobody_and_the_next_window_is_computed() -> None:
    first, second = ranks.run(2, fail_a_micro_batch)
    assert all("broken batch" in str(e) for e in first if isinstance(e, Exception))
    assert sum(isinstance(e, StepError) for e in first) == 2
    assert first[6] == second[6] is not None and first[13] == second[13] is not None


def leave_out(rank: int, world: int) -> Any:
    """A direct backward on rank 1; then a rank that is out of data."""
    engine = engine_over(model_of("mlp"), 1, eigenvalue=section())
    x, y = batch()
    (engine.backward if rank == 0 else Tensor.backward)(engine(x, y))
    engine.step()
    direct = engine.block_eigenvalue
    with engine.join():
        for _ in range(2 - rank):
            engine.backward(engine(x, y))
            engine.step()
    joined = list(engine._events.readings())
    window(engine)
    return direct, joined, engine.block_eigenvalue, engine.global_steps


def test_a_window_in_which_a_rank_has_no_loss_is_left_out() -> None:
    first, second = ranks.run(2, leave_out)
    assert first == second
    assert first[0] is None and first[1] == [] and len(first[2]) == 12 and first[3] == 4


def test_a_direct_backward_is_said_once(caplog: Any) -> None:
    engine = engine_over(model_of("mlp"), eigenvalue=section())
    for _ in range(2):
        engine(*batch()).backward()
        engine.step()
    said = [r for r in caplog.records if "eigenvalues are left out" in r.getMessage()]
    assert len(said) == 1 and engine.global_steps == 2


# ---- Memory.


def kept_after(act: Any, **keys: Any) -> int:
    """How many graphs are left of two micro-batches after `act`."""
    engine = breaking(**keys)
    graphs: list[Any] = []
    for block in engine.module.body.layer:
        block.register_forward_hook(lambda m, a, out: graphs.append(weakref.ref(out)))
    act(engine)
    gc.collect()
    assert graphs
    return sum(graph() is not None for graph in graphs)


def _one(engine: Any) -> None:
    engine.backward(engine(*batch()))


def _step(engine: Any) -> None:
    _one(engine)
    engine.step()


def _drop(engine: Any) -> None:
    _one(engine)
    engine.zero_grad()


def _break_twice(engine: Any) -> None:
    Breaks.broken = True
    try:
        with pytest.raises(StepError):
            _step(engine)
    finally:
        Breaks.broken = False


def _break_once(engine: Any) -> None:
    loss = engine(*batch())
    with pytest.raises(ValueError, match="broken batch"):
        engine.backward(raises_in_backward(loss, ValueError("broken batch")))


def _destroy(engine: Any) -> None:
    _one(engine)
    engine.destroy()


def _interrupt(engine: Any) -> None:
    with (
        mock.patch.object(hessian.Hessian, "times", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        _step(engine)


@pytest.mark.parametrize("act", [_step, _drop, _break_twice, _break_once, _destroy, _interrupt])
def test_no_graph_outlives_its_boundary(act: Any) -> None:
    assert kept_after(_one) > 0  # the losses are held meanwhile
    assert kept_after(act) == 0


def test_a_window_that_is_not_due_keeps_nothing() -> None:
    assert kept_after(_one, gas_boundary_resolution=2) == 0


# ---- When, and what is shown.


def test_every_resolution_th_boundary_is_due_and_its_values_are_read(tmp_path: Path) -> None:
    engine = engine_over(model_of("mlp"), eigenvalue=section(gas_boundary_resolution=3))
    due = []
    for _ in range(4):
        window(engine)
        due.append(len(list(engine._events.readings())))
    assert due == [0, 0, 3, 0]
    engine.save_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path)
    window(engine)
    assert list(engine._events.readings()) == []
    window(engine)  # the sixth
    names = [name for name, _ in engine._events.readings()]
    assert names == [f"Train/Eigenvalues/ModelBlockParam_{i}" for i in range(3)]


def test_monitors_write_what_is_computed(tmp_path: Path) -> None:
    keys = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = engine_over(
        model_of("mlp"), csv_monitor=keys, eigenvalue=section(gas_boundary_resolution=2)
    )
    for _ in range(4):
        window(engine)
    engine.destroy()
    rows = (tmp_path / "job" / "Train_Eigenvalues_ModelBlockParam_2.csv").read_text().split()
    assert [row.split(",")[0] for row in rows] == ["step", "4", "8"]


def test_it_is_off_without_its_section() -> None:
    engine = engine_over(model_of("mlp"))
    window(engine)
    assert engine.block_eigenvalue is None


def test_verbose_logs_each_block(caplog: Any) -> None:
    caplog.set_level("INFO", "zerort")
    window(engine_over(model_of("mlp"), eigenvalue=section(verbose=True)))
    assert sum("eigenvalue of block" in record.getMessage() for record in caplog.records) == 3


# ---- Attention and checkpointing.


class Attends(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Recomputed(MlpBlock):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        call = super().forward
        return torch.utils.checkpoint.checkpoint(call, x, use_reentrant=self.reentrant)


class RecomputedReentrantly(Recomputed):
    reentrant = True


def test_fused_attention_is_computed_by_its_definition_in_a_window_that_is_due() -> None:
    engine = engine_over(fill(Net(Attends, 2)), eigenvalue=section(2))
    window(engine)
    assert len(engine.block_eigenvalue) == 4
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_run_as_they_were_written_in_a_window_that_is_due() -> None:
    """A compiled graph refuses to be kept, and has no second derivative."""
    values = []
    for compiles in (False, True):
        engine = engine_over(model_of("mlp"), eigenvalue=section(gas_boundary_resolution=2))
        if compiles:
            for block in engine.module.body.layer:
                block.compile(backend="aot_eager")
        window(engine)
        window(engine)
        values.append([value for value, _ in engine.block_eigenvalue.values()])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_checkpointed_blocks_are_computed_as_others() -> None:
    values = []
    for block in (MlpBlock, Recomputed):
        engine = engine_over(fill(Net(block, 3)), eigenvalue=section())
        window(engine)
        values.append([value for value, _ in engine.block_eigenvalue.values()])
    assert values[0] == pytest.approx(values[1])


def test_reentrant_checkpointing_is_refused_by_the_keys_name(caplog: Any) -> None:
    """Or said, where torch does not see that there is anything to differentiate."""
    model = Net(MlpBlock, 3)
    model.body.layer[1] = RecomputedReentrantly(4)
    engine = engine_over(fill(model), eigenvalue=section())
    with pytest.raises(StepError, match=r"eigenvalue: .* use_reentrant=False"):
        window(engine)
    engine = engine_over(fill(Net(RecomputedReentrantly, 3)), eigenvalue=section())
    window(engine)
    assert engine.block_eigenvalue is None
    assert "use_reentrant=False" in caplog.text


# ---- Configuration.


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_iter": 0}, "eigenvalue.max_iter"),
        ({"gas_boundary_resolution": 0}, "eigenvalue.gas_boundary_resolution"),
        ({"layer_num": -1}, "eigenvalue.layer_num"),
        ({"layer_num": 0}, "eigenvalue: enabled without layer_num"),
        ({"tol": 0}, "eigenvalue.tol"),
        ({"stability": -1e-9}, "eigenvalue.stability"),
        ({"layer_name": ""}, "eigenvalue.layer_name"),
        ({"layer_name": "body..layer"}, "eigenvalue.layer_name"),
        ({"layer_name": "body.layers"}, "eigenvalue.layer_name: .* has no 'layers'"),
        ({"layer_name": "bert.encoder.layer"}, "Net has no 'bert'"),
        ({"layer_name": "inp"}, "eigenvalue.layer_num: .* Linear; it has no module 0"),
        ({"layer_num": 4}, "eigenvalue.layer_num: .* no module 3, got 4"),
        ({"tolerance": 1}, "eigenvalue.tolerance: unknown key"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        engine_over(model_of("mlp"), eigenvalue={**section(), **keys})


def test_stage_3_is_refused() -> None:
    with pytest.raises(ConfigError, match="eigenvalue is not there at stage 3"):
        engine_over(model_of("mlp"), 3, eigenvalue=section())


def test_a_section_that_is_off_asks_for_nothing() -> None:
    engine = engine_over(model_of("mlp"), 3, eigenvalue={**section(), "enabled": False})
    assert engine.block_eigenvalue is None


def test_the_start_is_the_same_for_all_and_moves_no_generator() -> None:
    shapes = [torch.Size((3, 4)), torch.Size((7,))]
    before = torch.get_rng_state()
    first, second = power_iteration.start_of(shapes), power_iteration.start_of(shapes)
    assert torch.equal(first, second) and first.shape == (19,)
    assert torch.equal(before, torch.get_rng_state())
