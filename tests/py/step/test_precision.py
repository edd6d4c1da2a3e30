"""bf16 and fp16 with fp32 masters, the loss scale, and what travels in which dtype."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from cases import CASES
from models import Terms
from reference import Precision, ReduceAt
from table import Batches
from tap import tapped
from terms import Weights, engine_over_terms, step_with, weights
from training import Config, assert_same, at_stage, train, train_all, twin_of
from zerort.errors import ConfigError, NonFiniteGradient, StepError
from zerort.wire import FORMATS, format_of

every_stage = pytest.mark.parametrize("stage", [0, 1, 2, 3])

BF16: Config = {"bf16": {"enabled": True}}
STATIC_FP16: Config = {"fp16": {"enabled": True, "loss_scale": 256.0}}
HUGE = 60000.0  # a gradient that overflows fp16 as soon as it is scaled


def batches(names: list[str], changes: Config) -> Batches:
    """By name, accumulation steps and stage."""
    return Batches(
        2,
        {
            (name, gas, stage): (name, gas, [{**changes, **at_stage(stage)}])
            for name in names
            for gas in (1, 3)
            for stage in (0, 1, 2, 3)
        },
        12,
    )


OF_BF16 = batches(["gpt", "mlp", "groups", "unused_on_one_rank"], BF16)
OF_FP16 = batches(["gpt", "mlp"], STATIC_FP16)


@every_stage
@pytest.mark.parametrize("gas", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", ["gpt", "mlp", "groups", "unused_on_one_rank"])
def test_bf16_trains_like_the_twin_with_fp32_masters(name: str, gas: int, stage: int) -> None:
    when: ReduceAt = "micro_batch" if stage >= 2 else "boundary"
    assert_same(
        OF_BF16[name, gas, stage][0],
        twin_of(name, 2, gas, Precision(torch.bfloat16, gathers_sums=stage == 0), when),
    )


@every_stage
@pytest.mark.parametrize("gas", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", ["gpt", "mlp"])
def test_fp16_trains_like_the_twin_under_a_static_loss_scale(
    name: str, gas: int, stage: int
) -> None:
    when: ReduceAt = "micro_batch" if stage >= 2 else "boundary"
    assert_same(
        OF_FP16[name, gas, stage][0],
        twin_of(name, 2, gas, Precision(torch.float16, 256.0, gathers_sums=stage == 0), when),
    )


@pytest.mark.parametrize("stage", [0, 1])
def test_an_fp32_wire_loses_nothing_of_a_bf16_window(stage: int) -> None:
    changes = {**BF16, **at_stage(stage), "communication_data_type": "fp32"}
    assert_same(
        ranks.shared(2, train, "mlp", 3, changes), twin_of("mlp", 2, 3, Precision(torch.bfloat16))
    )


@pytest.mark.parametrize("gas", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("dtype", [BF16, STATIC_FP16], ids=["bf16", "fp16"])
def test_gathered_sums_do_not_depend_on_buckets_and_windows(dtype: Config, gas: int) -> None:
    def variant(size: int, window: int | str) -> Config:
        return {**dtype, **at_stage(0, reduce_bucket_size=size), "zerort": {"window": window}}

    variants = [
        variant(150, "all"),
        variant(150, 1),
        variant(150, 2),
        variant(900, 2),
        variant(10**6, "all"),
    ]
    assert (
        len({found for rank in ranks.shared(2, train_all, "gpt", gas, variants) for found in rank})
        == 1
    )


def _sum_beyond_fp16(rank: int, world: int) -> tuple[Weights, int]:
    config = {
        "fp16": {"enabled": True, "loss_scale": 1.0},
        "gradient_allreduce_op": "sum",
        **at_stage(0),
    }
    engine = engine_over_terms(config)
    after = step_with(engine, HUGE, 1.0)  # finite on each rank, and in fp32 their sum is too
    return after, engine.skipped_steps


def test_a_sum_that_overflows_when_it_is_gathered_is_not_applied() -> None:
    assert ranks.shared(2, _sum_beyond_fp16) == [((0.0, 0.0), 1)] * 2


def _backward_twice_at_the_boundary(rank: int, world: int, stage: int) -> Weights:
    engine = engine_over_terms({**BF16, **at_stage(stage)}, accumulation=2)
    engine.backward(engine(1.0, 0.0), scale_wrt_gas=False)
    engine.step()
    for _ in range(2):
        engine.backward(engine(2.0, 1.0 + rank), scale_wrt_gas=False)
    with engine.no_sync():
        engine.backward(engine(4.0, 1.0), scale_wrt_gas=False)
    engine.step()
    return weights(engine)


@every_stage
def test_what_comes_after_the_first_pass_of_a_window_is_added_to_it(stage: int) -> None:
    assert ranks.shared(2, _backward_twice_at_the_boundary, stage) == [(-9.0, -4.0)] * 2


UNSCALED = {"direct", "bypass_direct"}  # refused under a loss scale
OTHERWISE_ROUNDED = {
    "mixed_dtypes",  # all of them would become one dtype
    # what comes late travels in a pass of its own, so it loses less
    "reused_more_often_checkpointed_reentrant",
}
AS_CAST = [name for name in CASES if name not in OTHERWISE_ROUNDED]


def low(offset: int) -> list[tuple[str, int, str]]:
    """Each case at a stage, in bf16 or fp16 in turn."""
    dtypes = ("bf16", "fp16")
    drawn = (
        (name, place % 3, "bf16" if name in UNSCALED else dtypes[(place + offset) % 2])
        for place, name in enumerate(AS_CAST)
    )
    return [each for each in drawn if not offset or each[0] not in UNSCALED]


# Two of four of every day, one of each dtype.
LOW = [each for place, each in enumerate(low(0)) if place // 2 % 2 == 0]
OTHER_LOW = [*(each for each in low(0) if each not in LOW), *low(1)]
IN_LOW = {
    "bf16": (BF16, Precision(torch.bfloat16)),
    "fp16": (STATIC_FP16, Precision(torch.float16, 256.0)),
}
OF_LOW = Batches(
    2,
    {
        (name, stage, dtype): (name, 3, [{**IN_LOW[dtype][0], **at_stage(stage)}])
        for name, stage, dtype in LOW + OTHER_LOW
    },
    12,
)


@pytest.mark.parametrize(
    ("name", "stage", "dtype"),
    [*LOW, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHER_LOW)],
)
def test_every_case_of_the_table_trains_like_the_twin_in_low_precision(
    name: str, stage: int, dtype: str
) -> None:
    precision = replace(IN_LOW[dtype][1], gathers_sums=stage == 0)
    when: ReduceAt = "micro_batch" if stage >= 2 else "boundary"
    assert_same(OF_LOW[name, stage, dtype][0], twin_of(name, 2, 3, precision, when))


MANY = 64


def hold_by_no_sync(engine: Any) -> None:
    with engine.no_sync():
        engine.backward(engine(1.0, 1.0))
        for _ in range(MANY - 2):
            engine.backward(engine(2.0**-9, 2.0**-9))
    engine.backward(engine(2.0**-9, 2.0**-9))
    engine.step()


def hold_by_the_boundary(engine: Any) -> None:
    engine.set_gradient_accumulation_boundary(False)
    for micro in range(MANY):
        engine.set_gradient_accumulation_boundary(micro == MANY - 1)
        step_with(engine, 2.0**-9 if micro else 1.0, 2.0**-9 if micro else 1.0)


def hold_by_the_batch_size(engine: Any) -> None:
    engine.set_train_batch_size(MANY * engine.train_batch_size())
    for micro in range(MANY):
        engine.backward(
            engine(2.0**-9 if micro else 1.0, 2.0**-9 if micro else 1.0), scale_wrt_gas=False
        )
        engine.step()


def _hold_many(rank: int, world: int, stage: int, hold: Callable[[Any], None]) -> Weights:
    engine = engine_over_terms({**BF16, **at_stage(stage), "communication_data_type": "fp32"})
    hold(engine)
    return weights(engine)


@every_stage
@pytest.mark.parametrize("hold", [hold_by_no_sync, hold_by_the_boundary, hold_by_the_batch_size])
def test_what_waits_in_bf16_is_added_up_in_fp32(hold: Callable[[Any], None], stage: int) -> None:
    """1 + 2^-9 is 1 in bf16: added up there, the others would be lost."""
    total = 1 + (MANY - 1) * 2.0**-9
    rounded = torch.tensor(total).bfloat16().item()
    assert ranks.shared(2, _hold_many, stage, hold) == [(-rounded, -rounded)] * 2


def _take_tiny_steps(rank: int, world: int, stage: int) -> Weights:
    model = Terms()
    torch.nn.init.ones_(model.a)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-12)
    engine = engine_over_terms({**BF16, **at_stage(stage)}, model=model, optimizer=optimizer)
    for _ in range(64):
        step_with(engine, 1.0, 1.0)
    return weights(engine)


@every_stage
def test_steps_too_small_for_bf16_add_up_in_the_masters(stage: int) -> None:
    assert ranks.shared(2, _take_tiny_steps, stage) == [(1 - 2.0**-6, -(2.0**-6))] * 2


def _underflow_without_scale(rank: int, world: int, stage: int) -> tuple[Weights, float]:
    model = Terms()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**20)
    config = {"fp16": {"enabled": True, "loss_scale": 2.0**12}, **at_stage(stage)}
    engine = engine_over_terms(config, model=model, optimizer=optimizer)
    return step_with(engine, 2.0**-26, 2.0**-26), engine.get_global_grad_norm()


@every_stage
def test_h_5_fp16_scales_the_loss_at_every_stage(stage: int) -> None:
    """2^-26 is no fp16 number, its 2^12-fold is. Unscaled it would be 0, divided without scaling
    2^-12 of its value.
    """
    expected = (-(2.0**-6), -(2.0**-6)), pytest.approx(2.0**-26 * 8**0.5)
    assert ranks.shared(2, _underflow_without_scale, stage) == [expected] * 2


def dynamic(power: int, **more: object) -> Config:
    return {"fp16": {"enabled": True, "initial_scale_power": power, "hysteresis": 1, **more}}


def _overflow_once(rank: int, world: int, stage: int) -> list[tuple[float, Weights, int]]:
    engine = engine_over_terms({**dynamic(8, loss_scale_window=2), **at_stage(stage)})
    seen = []
    for coefficient in (HUGE if rank == 1 else 1.0, 1.0, 1.0, 1.0):
        after = step_with(engine, coefficient, 1.0)
        seen.append((engine.loss_scale, after, engine.skipped_steps))
    return seen


@every_stage
def test_an_overflow_on_one_rank_lowers_the_scale_on_all(stage: int) -> None:
    clean = [(128.0, (-1.0, -1.0), 1), (128.0, (-2.0, -2.0), 1), (256.0, (-3.0, -3.0), 1)]
    expected = [(128.0, (0.0, 0.0), 1), *clean]
    assert ranks.shared(2, _overflow_once, stage) == [expected] * 2


def _overflow_early_in_a_window(
    rank: int, world: int, stage: int
) -> tuple[Weights, float, int, bool]:
    model = Terms()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    engine = engine_over_terms(
        {**dynamic(8), **at_stage(stage)}, 3, model=model, optimizer=optimizer
    )
    for window in range(3):
        for micro in range(3):
            step_with(engine, HUGE if (rank, window, micro) == (1, 1, 0) else 1.0, 1.0)
        if window == 1:
            assert not engine.was_step_applied()
    return weights(engine), engine.loss_scale, engine.skipped_steps, engine.was_step_applied()


@every_stage
def test_an_overflow_early_in_a_window_skips_all_of_it_and_leaves_the_momentum(stage: int) -> None:
    """Two steps of a momentum of one half: 1, then 1 + 1/2."""
    expected = ((-2.5, -2.5), 128.0, 1, True)
    assert ranks.shared(2, _overflow_early_in_a_window, stage) == [expected] * 2


def _overflow_at_the_minimum(rank: int, world: int) -> tuple[str, Weights]:
    engine = engine_over_terms(dynamic(4, min_loss_scale=16))
    with pytest.raises(NonFiniteGradient) as caught:
        step_with(engine, 1.0, HUGE if rank == 1 else 1.0)
    return str(caught.value), step_with(engine, 1.0, 1.0)


def test_an_overflow_at_the_minimum_names_rank_and_parameter() -> None:
    for message, after in ranks.shared(2, _overflow_at_the_minimum):
        assert "minimum" in message and "rank 1" in message and "parameter b" in message
        assert after == (-1.0, -1.0)


def _go_back_directly(rank: int, world: int, scaled: bool) -> Weights:
    engine = engine_over_terms(STATIC_FP16)
    loss = engine(1.0, 2.0)
    if scaled:
        engine.scale(loss).backward()
        engine.step()
        return weights(engine)
    with pytest.raises(StepError, match="scale"):
        loss.backward()
    return step_with(engine, 1.0, 2.0)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_direct_backward_must_be_scaled(scaled: bool) -> None:
    assert ranks.shared(2, _go_back_directly, scaled) == [(-1.0, -2.0)] * 2


def _train_with(rank: int, world: int, changes: Config) -> Weights:
    engine = engine_over_terms(changes)
    return step_with(engine, 1.0 + rank, 4.0)


@every_stage
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gradient_allreduce_op": "sum"}, (-3.0, -8.0)),
        ({"gradient_allreduce_op": "mean"}, (-1.5, -4.0)),
        ({"prescale_gradients": True}, (-1.5, -4.0)),
        ({"prescale_gradients": True, "gradient_predivide_factor": 2.0}, (-1.5, -4.0)),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, (-1.5, -4.0)),
        ({"communication_data_type": "bf16"}, (-1.5, -4.0)),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_scaling_and_dtypes_of_the_wire_leave_the_answer(
    changes: Config, expected: Weights, stage: int
) -> None:
    assert ranks.shared(2, _train_with, {**changes, **at_stage(stage)}) == [expected] * 2


def _add_a_little_to_one(rank: int, world: int, dtype: str) -> Weights:
    config = {"data_types": {"grad_accum_dtype": dtype}, **at_stage(2)}
    engine = engine_over_terms(config, accumulation=2)
    for coefficient in (1.0, 2.0**-9):
        engine.backward(engine(coefficient, 1.0), scale_wrt_gas=False)
        engine.step()
    return weights(engine)


@pytest.mark.parametrize(
    ("dtype", "a"), [("fp32", -(1 + 2.0**-9)), ("bf16", -1.0), ("fp16", -(1 + 2.0**-9))]
)
def test_passes_are_added_up_in_the_configured_dtype(dtype: str, a: float) -> None:
    """1 + 2^-9 is an fp16 number and no bf16 number."""
    assert ranks.shared(2, _add_a_little_to_one, dtype) == [(a, -2.0)] * 2


def _scale_under_autocast(rank: int, world: int, path: str) -> list[float]:
    config = {
        "torch_autocast": {"enabled": True, "dtype": "float16"},
        "zerort": {"trace": {"path": path}},
    }
    engine = engine_over_terms(config)
    scales = []
    for _ in range(2):  # the first overflow only uses up the hysteresis
        step_with(engine, 1e35 if rank == 1 else 1.0, 1.0)
        scales.append(engine.loss_scale)
    engine.destroy()
    return scales


def test_autocast_in_fp16_has_a_loss_scale_and_the_trace_shows_it(tmp_path: Path) -> None:
    assert (
        ranks.shared(2, _scale_under_autocast, str(tmp_path / "{rank}.json"))
        == [[65536.0, 32768.0]] * 2
    )
    events = json.loads((tmp_path / "0.json").read_text())["traceEvents"]
    assert [event["args"]["value"] for event in events if event["name"] == "loss scale"] == [
        65536.0,
        32768.0,
    ]


class _Seeing(torch.nn.Linear):
    """Remembers the dtypes of what it was called with."""

    def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> torch.Tensor:
        self.seen = x.dtype, more["inside"].dtype, more["numbers"].dtype
        return super().forward(x.to(self.weight.dtype))


def _notes_on_a_failed_forward(
    rank: int, world: int, layer: nn.Module, given: Tensor, config: Config
) -> list[str]:
    engine, *_ = zerort.initialize(
        model=layer,
        config={
            "train_batch_size": 1,
            "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
            **config,
        },
    )
    with pytest.raises(RuntimeError) as raised:
        engine(given)
    return getattr(raised.value, "__notes__", [])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take notes from Python 3.11 on")
@pytest.mark.parametrize("config", [BF16, STATIC_FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(4, 4), (2, 4)), (nn.Conv1d(4, 4, 1), (2, 4, 3)), (nn.LayerNorm(4), (2, 4))],
    ids=["linear", "convolution", "norm"],
)
def test_an_input_that_was_not_cast_is_explained(
    layer: nn.Module, shape: tuple[int, ...], config: Config
) -> None:
    (note,) = ranks.shared(1, _notes_on_a_failed_forward, layer, torch.zeros(shape), config)[0]
    dtype = "torch.bfloat16" if "bf16" in config else "torch.float16"
    assert f"cast floating-point inputs with .to({dtype})" in note


def test_another_error_of_a_forward_is_not() -> None:
    too_wide = torch.zeros(2, 5, dtype=torch.bfloat16)
    assert ranks.shared(1, _notes_on_a_failed_forward, nn.Linear(4, 4), too_wide, BF16) == [[]]


def _cast_inputs(rank: int, world: int, auto_cast: bool) -> tuple[torch.dtype, ...]:
    config = {"fp16": {"enabled": True, "loss_scale": 4.0, "auto_cast": auto_cast}}
    engine = engine_over_terms(config, model=_Seeing(4, 4))
    engine(
        torch.ones(2, 4),
        more={"inside": torch.ones(2), "numbers": torch.ones(2, dtype=torch.int64)},
    )
    return engine.module.seen


@pytest.mark.parametrize(("auto_cast", "dtype"), [(True, torch.float16), (False, torch.float32)])
def test_auto_cast_casts_floating_point_inputs_wherever_they_are(
    auto_cast: bool, dtype: torch.dtype
) -> None:
    assert ranks.shared(1, _cast_inputs, auto_cast) == [(dtype, dtype, torch.int64)]


AUTOCASTS = {
    "bf16": ({"enabled": True, "dtype": "bf16"}, Precision(autocast=torch.bfloat16)),
    "fp16": (
        {"enabled": True, "dtype": "fp16"},
        Precision(autocast=torch.float16, loss_scale=65536.0),
    ),
}
AUTOCAST = ["mlp", "gpt", "unused_on_one_rank"]
UNDER_AUTOCAST = {
    dtype: batches(AUTOCAST, {"torch_autocast": section})
    for dtype, (section, _) in AUTOCASTS.items()
}


@every_stage
@pytest.mark.parametrize("gas", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("dtype", AUTOCASTS)
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_trains_like_the_twin_under_it(
    name: str, dtype: str, gas: int, stage: int
) -> None:
    precision = replace(AUTOCASTS[dtype][1], gathers_sums=stage == 0)
    when: ReduceAt = "micro_batch" if stage >= 2 else "boundary"
    histories = UNDER_AUTOCAST[dtype][name, gas, stage][0]
    # The last bit of a weight may decide how its cast is rounded.
    assert_same(histories, twin_of(name, 2, gas, precision, when), tolerance=5e-5)


def _dtype_under_autocast(rank: int, world: int) -> tuple[torch.dtype, torch.dtype]:
    config = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    engine = engine_over_terms(config, model=torch.nn.Linear(4, 4))
    outputs = engine(torch.ones(2, 4))
    engine.backward(outputs.float().square().mean())
    engine.step()
    return outputs.dtype, engine.module.weight.dtype


def test_autocast_runs_the_forward_low_and_keeps_parameters_in_fp32() -> None:
    assert ranks.shared(2, _dtype_under_autocast) == [(torch.bfloat16, torch.float32)] * 2


def _wires_under_autocast(rank: int, world: int, autocast: Config, more: Config) -> dict[str, str]:
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1), torch.nn.Flatten(), torch.nn.Linear(8, 4))
    model.append(torch.nn.LayerNorm(4))
    config = {"torch_autocast": {"enabled": True, "dtype": "bf16", **autocast}, **more}
    config["zerort"] = {"transport": "gloo", **more.get("zerort", {})}
    engine = engine_over_terms(config, model=model)
    with tapped() as calls:
        engine.backward(engine(torch.ones(1, 2, 4)).float().square().mean())
        engine.step()
    sent = Counter(call.tensors[0].dtype for call in calls if call.op == "all_to_all_single")
    names = {
        name: list(FORMATS)[bucket.spec.wire]
        for bucket in engine._parts.boundary.flat.buckets
        for name in bucket.names
    }
    assert sent == Counter(
        format_of(bucket.spec.wire).dtype for bucket in engine._parts.boundary.flat.buckets
    )
    return names


ALL = {f"{i}.{name}" for i in (0, 2, 3) for name in ("weight", "bias")}


@pytest.mark.parametrize(
    ("autocast", "more", "low"),
    [
        ({}, {}, ALL - {"3.weight", "3.bias"}),
        ({"lower_precision_safe_modules": []}, {}, set()),
        ({"lower_precision_safe_modules": ["torch.nn.Linear"]}, {}, {"2.weight", "2.bias"}),
        ({"lower_precision_safe_modules": ["torch.nn.LayerNorm"]}, {}, {"3.weight", "3.bias"}),
        ({}, {"communication_data_type": "fp32"}, set()),
        ({}, {"communication_data_type": "bf16"}, ALL),
        ({"enabled": False, "lower_precision_safe_modules": ["torch.nn.Linear"]}, {}, set()),
    ],
    ids=lambda part: str(sorted(part) if isinstance(part, set) else part),
)
def test_gradients_of_safe_modules_travel_in_autocasts_dtype(
    autocast: Config, more: Config, low: set[str]
) -> None:
    expected = {name: "bf16" if name in low else "fp32" for name in ALL}
    assert ranks.shared(2, _wires_under_autocast, autocast, more) == [expected] * 2


def _refused(rank: int, world: int, autocast: Config, more: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        engine_over_terms({"torch_autocast": {"enabled": True, **autocast}, **more})
    return str(caught.value)


@pytest.mark.parametrize(
    ("modules", "more", "told"),
    [
        (["torch.nn.Linaer"], {}, "'torch.nn.Linaer' cannot be imported"),
        (["Linear"], {}, "'Linear' cannot be imported"),
        (["torch.nn.functional.linear"], {}, "torch.nn.functional.linear is no class of modules"),
        (["torch.nn.Linear"], {"communication_data_type": "fp32"}, "give one of them"),
    ],
)
def test_what_cannot_be_a_safe_module_is_refused(
    modules: list[str], more: Config, told: str
) -> None:
    for message in ranks.shared(2, _refused, {"lower_precision_safe_modules": modules}, more):
        assert "torch_autocast.lower_precision_safe_modules" in message and told in message


class LinearAlone(torch.nn.Linear):
    """No class that is known to be computed low."""


def _train_under_autocast(
    rank: int, world: int, kind: type[torch.nn.Linear], stage: int
) -> list[list[float]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(kind(6, 5), torch.nn.Tanh(), kind(5, 3))
    config = {"torch_autocast": {"enabled": True, "dtype": "bf16"}, **at_stage(stage)}
    engine = engine_over_terms(config, model=model)
    for step in range(3):
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        engine.backward(engine(inputs).float().square().mean())
        engine.step()
    return [parameter.flatten().tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("stage", [1, 2])
def test_what_autocast_computed_low_loses_nothing_on_a_low_wire(stage: int) -> None:
    low = ranks.shared(2, _train_under_autocast, torch.nn.Linear, stage)
    assert low == ranks.shared(2, _train_under_autocast, LinearAlone, stage)
