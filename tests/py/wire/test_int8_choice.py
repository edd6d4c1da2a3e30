"""Who asks for int8, what of a model is sent so, and what it goes together with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from hills import Hills, Variant, take_step, weights_of
from stand_in import Machine
from training import keep
from zerort.config import load
from zerort.errors import ConfigError
from zerort.step.precision import Precision
from zerort.wire import FORMATS

INT8 = {"wire": "int8"}


class Several(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Embedding(255, 257)  # 65535 elements
        self.large = nn.Embedding(256, 256)
        self.bag = nn.EmbeddingBag(10, 4)
        self.linear = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.conv = nn.Conv1d(4, 4, 3)
        self.scalar = nn.Parameter(torch.zeros(()))
        self.wide = nn.Parameter(torch.zeros(7, 7, dtype=torch.float64))


def wires_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, str]:
    model = Several()
    for name, parameter in model.named_parameters():
        if name != "wide":
            parameter.data = parameter.to(dtype)
    settings = load({"train_micro_batch_size_per_gpu": 1, **config})
    number = Precision.of(settings).wires(model)
    return {name: list(FORMATS)[number(p)] for name, p in model.named_parameters()}


BYTES = {"large.weight", "linear.weight", "conv.weight"}


def expected(others: str) -> dict[str, str]:
    names = [name for name, _ in Several().named_parameters()]
    found = {name: "int8" if name in BYTES else others for name in names}
    return found | {"wide": "fp64"}


def test_vectors_scalars_and_small_embeddings_are_sent_in_16_bits() -> None:
    assert wires_of({"zerort": INT8}) == expected("bf16")
    assert wires_of({"zerort": INT8}, torch.bfloat16) == expected("bf16")
    assert wires_of({"zerort": INT8}, torch.float16) == expected("fp16")


def test_or_as_communication_data_type_says_or_as_autocast_computes() -> None:
    wide = {"zerort": INT8, "communication_data_type": "fp32"}
    assert wires_of(wide) == expected("fp32")
    autocast = {"enabled": True, "dtype": "float16"}
    assert wires_of({"zerort": INT8, "torch_autocast": autocast}) == expected("fp16")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_feedback_is_on_by_default_where_no_rank_shards_gradients(stage: int) -> None:
    def feedback(zero: dict[str, Any], **runtime: Any) -> bool:
        return load(
            {"zero_optimization": {"stage": stage, **zero}, "zerort": runtime}
        ).wire_feedback

    assert feedback({}, **INT8) == (stage < 2)
    assert feedback({}, **INT8, wire_error_feedback="auto") == (stage < 2)
    assert feedback({}, **INT8, wire_error_feedback=True)
    assert not feedback({}, **INT8, wire_error_feedback=False)
    assert not feedback({"zero_quantized_gradients": True})
    assert feedback({"zero_quantized_gradients": True}, wire_error_feedback="checkpoint")


def test_deepspeeds_key_asks_for_bytes() -> None:
    assert load({"zero_optimization": {"zero_quantized_gradients": True}}).wire == "int8"
    assert load({"zero_optimization": {"zero_quantized_gradients": False}}).wire is None
    both = {"zero_optimization": {"zero_quantized_gradients": True}, "zerort": INT8}
    assert load(both).wire == "int8"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"zero_optimization": {"zero_quantized_gradients": True}, "zerort": {"wire": "bf16"}},
            'is zerort.wire "int8", and zerort.wire is "bf16": give one',
        ),
        (
            {"zerort": {"wire": "bf16", "wire_error_feedback": True}},
            'only zerort.wire "int8" has error feedback: leave one out',
        ),
        ({"zerort": {"wire_error_feedback": "checkpoint"}}, "has error feedback: leave one out"),
        ({"zerort": {**INT8, "wire_error_feedback": "always"}}, "wire_error_feedback: expected"),
        ({"zerort": {**INT8, "wire_error_feedback": 1}}, "wire_error_feedback: expected"),
        ({"zero_optimization": {"zeropp_loco_param": {"err_beta": 0.8}}}, "wire_error_feedback"),
    ],
)
def test_what_contradicts_itself_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(config)


# What it goes together with: a run comes near to fp32's, and ranks agree.

TOGETHER: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}},
    "low masters": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    "predivide": {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
    "bf16 sums": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
}


def distances(rank: int, world: int) -> dict[str, tuple[float, list[Tensor]]]:
    found = {}
    for name, more in TOGETHER.items():
        for stage, gas in ((0, 2), (2, 2)):
            runs = []
            for runtime in (INT8, {"wire": "fp32"}):
                engine = Variant(stage, gas, more={**more, "zerort": runtime}).engine(rank)
                for step in range(4):
                    take_step(engine, step, gas)
                runs.append([weight.float() for weight in weights_of(engine)])
                keep(engine)
            most = max(float((a - b).abs().max()) for a, b in zip(*runs, strict=True))
            found[f"{name}, stage {stage}"] = most, runs[0]
    return found


def test_low_precision_predivision_and_narrow_sums_come_near_to_fp32() -> None:
    first, second = ranks.shared(2, distances)
    for name, (most, weights) in first.items():
        # a group's largest is about 30 x 4, a code is a 127th of it, and a step takes a tenth
        assert 0 < most < 0.6, name
        assert all(map(torch.equal, weights, second[name][1])), name


def beside_a_host(rank: int, world: int) -> list[list[Tensor]]:
    """Weights with the optimizer at home on the host, and without."""
    found = []
    with Machine().running():
        for zero in ({}, {"offload_optimizer": {"device": "cpu"}}):
            engine = Variant(2, 2, True, zero=zero, more={"bf16": {"enabled": True}}).engine(rank)
            for step in range(3):
                take_step(engine, step, 2)
            found.append(weights_of(engine))
            engine.destroy()
    return found


def test_an_optimizer_on_the_host_gets_the_same_sums() -> None:
    for here, away in ranks.run(2, beside_a_host):
        assert all(map(torch.equal, here, away))


def whole(rank: int, world: int) -> list[list[Tensor]]:
    """Weights of an optimizer that steps whole matrices, whose parts are exchanged."""
    found = []
    for stage in (0, 2):
        model = Hills(rank)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "Muon", "params": {"lr": 0.05}},
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 900},
            "zerort": {**INT8, "whole_padding": 0.0},
        }
        engine = zerort.initialize(model=model, config=config)[0]
        for step in range(3):
            take_step(engine, step)
        found.append(weights_of(engine))
        keep(engine)
    return found


def test_exchanged_parameters_are_reduced_as_bytes_too() -> None:
    first, second = ranks.shared(2, whole)
    for one, other in zip(first, second, strict=True):
        assert all(map(torch.equal, one, other))
        assert all(bool(weight.isfinite().all()) for weight in one)
