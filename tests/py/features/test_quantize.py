"""Quantized training: values and schedule as recorded, masters untouched, ranks alike, and a run
that resumes equals one that was not interrupted.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from hessians import batch, bits_of, engine_over, model_of, section
from zerort.config.quantize import QuantizeTraining
from zerort.errors import CheckpointError, ConfigError
from zerort.features.quantize import QuantizedTraining
from zerort.features.quantize_schedule import Schedule, factor
from zerort.features.quantize_values import quantized

pytestmark = pytest.mark.timeout(120)

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "moq.json").read_text("utf-8"))
LATER = "v0.18.9"


def wave(shape: list[int], amp: float, shift: float, dtype: str = "float32") -> Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    values = (amp * torch.sin(0.7 * i) + shift).reshape(shape).float()
    return values.to(getattr(torch, dtype))


# ---- Values.


@pytest.mark.parametrize(
    "row", RECORDED["quantize"], ids=lambda r: f"{r['bits']}-{r['type'][0]}-{r['groups']}"
)
def test_values_are_those_recorded(row: dict[str, Any]) -> None:
    given = wave(row["shape"], row["amp"], row["shift"], row.get("dtype", "float32"))
    symmetric = row["type"] == "symmetric"
    if isinstance(row[LATER], str):
        with pytest.raises(ValueError, match="24 values do not make 5 groups"):
            quantized(given, row["bits"], groups=row["groups"])
        return
    found = quantized(given, row["bits"], groups=row["groups"], symmetric=symmetric)
    assert found.dtype == given.dtype and found.shape == given.shape
    truth = [float(value) for value in row[LATER]]
    if any(map(math.isnan, truth)):  # the scale is 0: the values stay
        assert torch.equal(found, given)
    else:
        assert found.flatten().tolist() == pytest.approx(truth, rel=1e-6, abs=1e-8)


def test_stochastic_rounding_has_the_values_as_its_mean() -> None:
    recorded = RECORDED["stochastic"]
    given, noise = torch.tensor([recorded["input"]]), torch.Generator().manual_seed(3)
    many = [quantized(given, recorded["bits"], noise=noise) for _ in range(4000)]
    assert len({tuple(each.flatten().tolist()) for each in many}) > 1
    mean = torch.stack(many).mean(0).flatten().tolist()
    assert mean == pytest.approx(recorded["mean of 4000"], abs=5e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("values", [torch.zeros(2, 3), torch.empty(0, 3), torch.full((2, 2), -2.0)])
def test_what_has_no_scale_stays_as_it_is(bits: int, values: Tensor) -> None:
    found = quantized(values, bits)
    assert found.shape == values.shape and found.isfinite().all()
    if values.numel() and not values.any():
        assert not found.any()
    if bits > 2:
        assert torch.equal(quantized(values, bits, symmetric=False), values)


@pytest.mark.parametrize(
    "keys", [{"symmetric": False}, {"noise": torch.Generator()}], ids=["asymmetric", "stochastic"]
)
def test_below_three_bits_there_is_one_way(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="2 bits are symmetric"):
        quantized(torch.ones(2, 2), 2, **keys)


def test_a_transposed_parameter_is_grouped_by_its_indices() -> None:
    values = wave([4, 6], 0.5, 0.1)
    turned = values.t().contiguous().t()
    assert torch.equal(quantized(turned, 4, groups=4), quantized(values, 4, groups=4))


# ---- The schedule.


def settings(start: int, target: int, period: int, offset: int = 0, **keys: Any) -> Any:
    return QuantizeTraining.model_validate(
        {
            "enabled": True,
            "quantize_bits": {"start_bits": start, "target_bits": target},
            "quantize_schedule": {"quantize_period": period, "schedule_offset": offset},
            **keys,
        }
    )


def of(row: dict[str, Any], layers: int) -> Schedule:
    return Schedule.of(
        settings(row["start"], row["target"], row["period"], row.get("offset", 0)), layers
    )


OLD = [row for row in RECORDED["schedule"] if row["version"] == "v0.5.10" and not row.get("extra")]
NEW = [row for row in RECORDED["schedule"] if row["version"] == LATER]


@pytest.mark.parametrize("row", OLD, ids=lambda row: f"{row['period']}-{row['offset']}")
def test_the_schedule_of_layers_replays(row: dict[str, Any]) -> None:
    """There a step counts six times, and six times a layer with eigenvalues."""
    layers = row["layer_num"] if row["eigen"] else 1
    schedule = of(row, layers)
    factors = [factor(value) for value in row["eigen"] or [0.0]]
    stride = row["rows"][0][0] or 6
    for qsteps, was_due, bits, periods in row["rows"]:
        schedule.qsteps += stride - 1
        if row["eigen"]:
            assert schedule.falls(layers) == was_due
        schedule.advance(factors)
        assert (schedule.qsteps, schedule.bits, schedule.periods) == (qsteps, bits, periods)


@pytest.mark.parametrize("row", NEW, ids=lambda row: f"{row['start']}-{row['period']}")
def test_the_schedule_of_one_layer_replays(row: dict[str, Any]) -> None:
    schedule, changes = of(row, 1), []
    before: tuple[int, ...] = ()
    for number in range(row["steps"]):
        if number in row.get("overflow", ()):
            continue
        schedule.advance([row.get("factor", 1)])
        now = (schedule.bits[0], schedule.periods[0])
        if now != before:
            changes.append([schedule.qsteps, *now])
        before = now
    assert changes == row["rows"]


def test_parameters_outside_the_blocks_take_nothing_from_the_first() -> None:
    """A layer of their own, whose periods only double."""
    row = next(row for row in OLD if row["eigen"])
    schedule = of(row, 4)
    factors = [*map(factor, row["eigen"]), 1]
    for qsteps, _, bits, periods in row["rows"]:
        schedule.qsteps = qsteps - 1
        schedule.advance(factors)
        assert schedule.bits[:3] == bits and schedule.periods[:3] == periods
    assert (schedule.bits[3], schedule.periods[3]) == (12, 24 * 2**4)


def test_a_factor_is_that_of_its_eigenvalue() -> None:
    assert [[value, factor(value)] for value, _ in RECORDED["factor"]] == RECORDED["factor"]


def test_below_the_offset_nothing_happens_and_then_it_begins_at_zero() -> None:
    mixed = {"fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.25}}
    schedule = Schedule.of(settings(8, 6, 2, offset=3, **mixed), 1)
    seen = []
    for _ in range(6):
        schedule.advance([1])
        seen.append((schedule.begun, schedule.qsteps, schedule.bits[0], schedule.ratios[0]))
    assert seen == [
        (False, 1, 8, 1.0),
        (False, 2, 8, 1.0),
        (True, 0, 8, 0.75),
        (True, 1, 8, 0.5),
        (True, 2, 7, 1.0),
        (True, 3, 7, 0.75),
    ]


def test_mixed_values_replay() -> None:
    """The share of the parameter stops at 0, where DeepSpeed goes a step below."""
    schedule = Schedule.of(
        settings(4, 3, 3, fp16_mixed_quantize={"enabled": True, "quantize_change_ratio": 0.3}), 1
    )
    given = wave([2, 3], 0.5, 0.1)
    for qsteps, bits, period, ratio, values in RECORDED["mixed"]:
        schedule.advance([1])
        assert (schedule.qsteps, schedule.bits[0], schedule.periods[0]) == (qsteps, bits, period)
        assert schedule.ratios[0] == pytest.approx(max(0.0, ratio), abs=1e-12)
        share = schedule.ratios[0]
        found = share * given + (1 - share) * quantized(given, bits)
        truth = RECORDED["mixed"][-1][4] if ratio < 0 else values
        assert found.flatten().tolist() == pytest.approx(truth, rel=1e-5)


# ---- Steps.


class Linear(nn.Module):
    """A loss that is linear in a matrix, a transposed one and a vector, so that their gradients are
    the input, whatever the parameters are rounded to.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 6))
        self.turned = nn.Parameter(torch.randn(6, 4).t())
        self.vector = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.matrix + self.turned).float() * x).sum() + self.vector.float().sum() * x.sum()


def moq(period: int = 2, start: int = 8, target: int = 4, **keys: Any) -> dict[str, Any]:
    return {
        "enabled": True,
        "quantize_bits": {"start_bits": start, "target_bits": target},
        "quantize_schedule": {"quantize_period": period, "schedule_offset": 0},
        **keys,
    }


BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}
STOCHASTIC = {"quantize_algo": {"q_type": "symmetric", "rounding": "stochastic"}}


def step(engine: Any, number: int, rank: int = 0) -> None:
    drawn = torch.Generator().manual_seed(10 * number + rank)
    engine.backward(engine(0.1 * torch.randn(4, 6, generator=drawn)))
    engine.step()


def masters_of(engine: Any) -> list[list[float]]:
    return [bucket.master.tolist() for bucket in engine._parts.boundary.flat.trained]


def compare_with_a_run_without(rank: int, world: int) -> list[Any]:
    found = []
    for stage in (0, 1, 2):
        for keys in (moq(), moq(**STOCHASTIC), moq(fp16_mixed_quantize={"enabled": True})):
            runs = []
            for section_ in (keys, {}):
                engine = engine_over(Linear(), stage, quantize_training=section_, **BF16)
                for number in range(5):
                    step(engine, number, rank)
                runs.append((engine, masters_of(engine), bits_of(engine)))
            found.append(
                {
                    "masters": runs[0][1] == runs[1][1],
                    "vector": runs[0][2]["vector"] == runs[1][2]["vector"],
                    "levels": len(runs[0][0].module.matrix.unique()),
                    "bits": runs[0][2],
                    "state": runs[0][0]._events.state(),
                }
            )
    return found


def test_masters_are_untouched_and_ranks_round_alike() -> None:
    results = ranks.run(2, compare_with_a_run_without)
    for rows in zip(*results, strict=True):
        assert all(row["masters"] and row["vector"] for row in rows)
        assert rows[0]["bits"] == rows[1]["bits"] and rows[0]["state"] == rows[1]["state"]
        assert rows[0]["state"]["quantize_training"]["bits"] == [6]
    first, second = ([row["bits"] for row in results[0][i : i + 3]] for i in (3, 6))
    assert first == second  # stage 0 rounds what it has summed to the wire's dtype


def test_parameters_are_the_masters_rounded() -> None:
    engine = engine_over(Linear(), quantize_training=moq(quantize_groups=2), **BF16)
    for number in range(5):
        step(engine, number)
        bits = engine._events.find(QuantizedTraining).schedule.bits[0]
        for parameter in (engine.module.matrix, engine.module.turned):
            master = zerort.utils.safe_get_full_fp32_param(parameter)
            truth = quantized(master.bfloat16(), bits, groups=2)
            assert torch.equal(parameter, truth)
    assert bits == 6


def test_it_trains_to_the_twins_weights() -> None:
    """Plain torch: gradients of rounded parameters, applied to masters in fp32."""
    engine = engine_over(model_of("mlp"), quantize_training=moq(1), lr=0.05, **BF16)
    twin = model_of("mlp").bfloat16()
    masters = [p.detach().float() for p in model_of("mlp").bfloat16().parameters()]
    schedule = Schedule.of(settings(8, 4, 1), 1)
    for number in range(6):
        x, y = batch(number % 3, torch.bfloat16)
        engine.backward(engine(x, y))
        engine.step()
        twin(x, y).backward()
        schedule.advance([1])
        with torch.no_grad():
            for parameter, master in zip(twin.parameters(), masters, strict=True):
                master.sub_(0.05 * parameter.grad.float())
                low = master.bfloat16()
                parameter.copy_(quantized(low, schedule.bits[0]) if low.dim() > 1 else low)
                parameter.grad = None
    for ours, truth in zip(engine.module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, truth, rtol=0.02, atol=1e-3)
    assert schedule.bits == [5]


def test_a_skipped_step_rounds_nothing_and_does_not_count() -> None:
    engine = engine_over(Linear(), quantize_training=moq(**STOCHASTIC), **FP16)
    step(engine, 0)
    before, state = bits_of(engine), engine._events.state()
    engine.backward(engine(torch.full((4, 6), math.inf)))
    engine.step()
    assert engine.skipped_steps == 1
    assert bits_of(engine) == before and engine._events.state() == state
    step(engine, 1)
    assert engine._events.state() != state


def test_stochastic_rounding_is_another_one_in_each_step_and_moves_no_generator() -> None:
    engine = engine_over(
        Linear(), lr=0.0, quantize_training=moq(1000, start=4, **STOCHASTIC), **BF16
    )
    drawn, seen = torch.get_rng_state(), set()
    for _ in range(4):
        step(engine, 0)
        seen.add(tuple(engine.module.matrix.flatten().tolist()))
    assert len(seen) == 4 and torch.equal(drawn, torch.get_rng_state())


@pytest.mark.parametrize("stage", [0, 2])
def test_what_is_written_between_steps_reaches_the_masters(stage: int) -> None:
    engine = engine_over(Linear(), stage, lr=0.0, quantize_training=moq(), **BF16)
    step(engine, 0)
    before = zerort.utils.safe_get_full_fp32_param(engine.module.matrix).clone()
    engine.module.matrix.data[1, 2] = 7.0
    step(engine, 1)
    after = zerort.utils.safe_get_full_fp32_param(engine.module.matrix)
    before[1, 2] = 7.0
    assert torch.equal(before, after)


# ---- Checkpoints.


def run(engine: Any, first: int, last: int, dtype: torch.dtype) -> None:
    for number in range(first, last):
        engine.backward(engine(*batch(number % 3, dtype)))
        engine.step()


MIXED = {"fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.2}}
KINDS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "bf16": ({"quantize_training": moq(3, **STOCHASTIC), **BF16}, torch.bfloat16),
    "fp16": ({"quantize_training": moq(3, **MIXED), **FP16}, torch.float16),
    "eigenvalue": (
        {"quantize_training": moq(1, eigenvalue=section(2), **MIXED), **BF16},
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_resumes_inside_a_period_equals_one_that_was_not_interrupted(
    kind: str, stage: int, tmp_path: Path
) -> None:
    keys, dtype = KINDS[kind]
    engine = engine_over(model_of("mlp"), stage, **keys)
    run(engine, 0, 4, dtype)
    engine.save_checkpoint(tmp_path)
    at_save = bits_of(engine)
    run(engine, 4, 9, dtype)
    resumed = engine_over(model_of("mlp"), stage, **keys)
    run(resumed, 0, 1, dtype)
    resumed.load_checkpoint(tmp_path)
    assert bits_of(resumed) == at_save
    run(resumed, 4, 9, dtype)
    assert bits_of(resumed) == bits_of(engine)
    assert masters_of(resumed) == masters_of(engine)
    assert resumed._events.state() == engine._events.state()


def test_a_checkpoint_holds_the_masters_and_one_before_the_first_step_is_not_rounded(
    tmp_path: Path,
) -> None:
    engine = engine_over(Linear(), quantize_training=moq(), **BF16)
    plain = bits_of(engine)
    engine.save_checkpoint(tmp_path, "none")
    step(engine, 0)
    engine.save_checkpoint(tmp_path, "one")
    saved = zerort.checkpoint.get_fp32_state_dict(tmp_path, "one")["matrix"]
    assert torch.equal(saved, zerort.utils.safe_get_full_fp32_param(engine.module.matrix))
    assert not torch.equal(saved.bfloat16(), engine.module.matrix)
    engine.load_checkpoint(tmp_path, "none")
    assert bits_of(engine) == plain


def test_a_checkpoint_of_other_layers_or_fewer_bits_is_refused(tmp_path: Path) -> None:
    engine = engine_over(model_of("mlp"), quantize_training=moq(1), **BF16)
    run(engine, 0, 3, torch.bfloat16)
    engine.save_checkpoint(tmp_path)
    layered = moq(1, eigenvalue=section())
    other = engine_over(model_of("mlp"), quantize_training=layered, **BF16)
    before, state = bits_of(other), other._events.state()
    with pytest.raises(CheckpointError, match="saved with 1 layers, and there are 4"):
        other.load_checkpoint(tmp_path)
    assert bits_of(other) == before and other._events.state() == state
    higher = engine_over(model_of("mlp"), quantize_training=moq(1, target=7), **BF16)
    with pytest.raises(CheckpointError, match="saved with 6 bits, fewer than target_bits, 7"):
        higher.load_checkpoint(tmp_path)


def test_from_a_checkpoint_without_it_it_starts_anew(tmp_path: Path) -> None:
    engine_over(Linear(), **BF16).save_checkpoint(tmp_path)
    engine = engine_over(Linear(), quantize_training=moq(1), **BF16)
    state = engine._events.state()
    step(engine, 0)
    engine.load_checkpoint(tmp_path)
    assert engine._events.state() == state


# ---- Eigenvalues steer it.


def steer(rank: int, world: int, stage: int) -> Any:
    keys = moq(2, eigenvalue=section(gas_boundary_resolution=1))
    engine = engine_over(model_of("mlp"), stage, quantize_training=keys, **BF16)
    due = []
    for number in range(4):
        x, y = batch(number % 3, torch.bfloat16)
        engine.backward(engine(x[rank::world], y[rank::world]))
        engine.step()
        due.append([value for _, value in engine._events.readings()])
    return due, engine._events.state(), bits_of(engine)


@pytest.mark.parametrize("stage", [0, 2])
def test_eigenvalues_steer_the_bits_alike_on_all_ranks(stage: int) -> None:
    first, second = ranks.run(2, steer, stage)
    assert first == second
    due, state, _ = first
    # computed where bits of a block fall, and nowhere else
    assert [bool(values) for values in due] == [False, True, False, False]
    periods = [2 * 2 * factor(value) for value in due[1]]
    assert state["quantize_training"]["periods"] == [*periods, 2 * 2 * 2]
    assert state["quantize_training"]["bits"] == [7, 7, 7, 6]
    assert len(set(periods)) > 1


def test_verbose_logs_each_fall(caplog: Any) -> None:
    caplog.set_level("INFO", "zerort")
    engine = engine_over(Linear(), quantize_training=moq(quantize_verbose=True), **BF16)
    for number in range(4):
        step(engine, number)
    said = [r.getMessage() for r in caplog.records if "quantize_training" in r.getMessage()]
    assert said == [
        "quantize_training: layer 0 has 7 bits from step 2 on, for 2 steps",
        "quantize_training: layer 0 has 6 bits from step 4 on, for 4 steps",
    ]


# ---- Configuration.


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"quantize_bits": {"target_bits": 0}}, "quantize_bits.target_bits"),
        ({"quantize_bits": {"start_bits": 17, "target_bits": 8}}, "quantize_bits.start_bits"),
        ({"quantize_bits": {"start_bits": 8}}, "quantize_bits.target_bits: required"),
        (
            {"quantize_bits": {"start_bits": 4, "target_bits": 8}},
            "target_bits is 8, above start_bits, 4",
        ),
        ({"quantize_schedule": {"quantize_period": 0}}, "quantize_schedule.quantize_period"),
        ({"quantize_schedule": {"schedule_offset": -1}}, "quantize_schedule.schedule_offset"),
        ({"quantize_groups": 0}, "quantize_training.quantize_groups"),
        ({"quantize_groups": 5}, "quantize_groups: .* 24 elements of matrix, got 5"),
        ({"quantize_algo": {"q_type": "ternary"}}, "quantize_algo.q_type"),
        ({"quantize_algo": {"rounding": "up"}}, "quantize_algo.rounding"),
        ({"quantize-algo": {}}, "quantize-algo: unknown key"),
        (
            {"quantize_bits": {"target_bits": 2}, "quantize_type": "asymmetric"},
            "target_bits is 2: below 3 bits",
        ),
        ({"quantize_bits": {"target_bits": 1}, **STOCHASTIC}, "below 3 bits"),
        (
            {"quantize_type": "asymmetric", "quantize_algo": {"q_type": "symmetric"}},
            "give one of them",
        ),
        ({"fp16_mixed_quantize": {"quantize_change_ratio": 2}}, "quantize_change_ratio"),
        ({"eigenvalue": {"enabled": True}}, "quantize_training.eigenvalue: enabled without"),
        (
            {"eigenvalue": section(layer_name="layers")},
            "quantize_training.eigenvalue.layer_name: .* has no 'layers'",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named_by_its_path(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        engine_over(Linear(), quantize_training={"enabled": True, **keys}, **BF16)


@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        (3, BF16, "quantize_training is not there at stage 3"),
        (0, {}, "quantize_training needs fp16 or bf16"),
        (0, {"torch_autocast": {"enabled": True}}, "quantize_training needs fp16 or bf16"),
        (0, {**BF16, "eigenvalue": section()}, "are both enabled: keep one"),
    ],
)
def test_what_does_not_go_with_it_is_refused(stage: int, more: Any, said: str) -> None:
    keys = moq(eigenvalue=section()) if "eigenvalue" in more else moq()
    with pytest.raises(ConfigError, match=said):
        engine_over(model_of("mlp"), stage, quantize_training=keys, **more)


def test_a_section_that_is_off_rounds_nothing_whatever_is_in_it() -> None:
    off = {**moq(eigenvalue=section()), "enabled": False}
    engine = engine_over(Linear(), quantize_training=off)
    step(engine, 0)
    assert engine._events.state() == {} and engine.block_eigenvalue is None


def test_the_older_place_of_the_type_counts() -> None:
    read = QuantizeTraining.model_validate({"quantize_type": "Asymmetric"})
    assert not read.symmetric and read.quantize_bits.target_bits == 8
