"""What memory will be needed is said before it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zerort import zero
from zerort.config import load_part
from zerort.errors import ConfigError
from zerort.forecast import Job, forecast, of_size
from zerort.memory import Kind
from zerort.zero.estimates import SECTIONS, Counted, rank_bytes, state_bytes

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
LOW: dict[str, Any] = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
LOWEST: dict[str, Any] = {"bf16": {**LOW["bf16"], "bf16_optimizer_states": True}}
HALF: dict[str, Any] = {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}
SGD: dict[str, Any] = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
MOMENTUM: dict[str, Any] = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
ON_HOST = {"device": "cpu"}
P, ROOM = 10**9, 6 * 10**7


def settings(stage: int, more: dict[str, Any], **keys: Any) -> Any:
    return load_part({**more, "zero_optimization": {"stage": stage, **keys}}, SECTIONS)


@pytest.mark.parametrize(
    ("stage", "more", "values", "rest"),
    [
        (0, BF16, 2, 16),
        (1, BF16, 2, 16 / 4),
        (2, BF16, 2, 16 / 4),
        (2, LOW, 2, 10 / 4),
        (2, LOWEST, 2, 6 / 4),
        (2, HALF, 2, 10 / 4),
        (2, {}, 4, 12 / 4),
        (2, BF16 | SGD, 2, 8 / 4),
        (2, BF16 | MOMENTUM, 2, 12 / 4),
        (2, BF16 | {"data_types": {"grad_accum_dtype": "bf16"}}, 2, 14 / 4),
        (3, BF16, 2 / 4, 16 / 4),
        (3, LOWEST, 2 / 4, 6 / 4),
        (3, {}, 4 / 4, 12 / 4),
    ],
)
@pytest.mark.parametrize("frozen", [0, P // 2])
def test_states_take_what_the_formula_says(
    stage: int, more: dict[str, Any], values: float, rest: float, frozen: int
) -> None:
    chosen = settings(stage, more)
    room = ROOM * (4 if chosen.compute_dtype == "fp32" else 2) if stage == 3 else 0
    found = rank_bytes(chosen, Counted(P, ROOM // 3, frozen), 4)
    assert found == (values * P + rest * (P - frozen) + room, 0)


@pytest.mark.parametrize(
    ("stage", "more", "keys", "device", "host"),
    [
        (2, BF16, {"offload_optimizer": ON_HOST}, 2, 16 / 4),
        (2, {}, {"offload_optimizer": ON_HOST}, 4, 16 / 4),  # a copy of the parameters too
        (2, LOWEST, {"offload_optimizer": ON_HOST}, 2, 8 / 4),
        (3, BF16, {"offload_optimizer": ON_HOST}, 2 / 4, 16 / 4),
        (3, BF16, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, 10 / 4, 8 / 4),
        (3, BF16, {"offload_param": ON_HOST}, 16 / 4, 2 / 4),
        (3, {}, {"offload_optimizer": ON_HOST, "offload_param": ON_HOST}, 0, 16 / 4),
        (3, BF16, {"offload_optimizer": ON_HOST, "offload_param": ON_HOST}, 0, 18 / 4),
    ],
)
def test_what_is_at_home_on_the_host_is_counted_there(
    stage: int, more: dict[str, Any], keys: dict[str, Any], device: float, host: float
) -> None:
    chosen = settings(stage, more, **keys)
    room = ROOM * (4 if chosen.compute_dtype == "fp32" else 2) if stage == 3 else 0
    assert rank_bytes(chosen, Counted(P, ROOM // 3), 4) == (device * P + room, host * P)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("more", [BF16, LOW, LOWEST, HALF, {}, BF16 | SGD, BF16 | MOMENTUM])
@pytest.mark.parametrize("homes", [{}, {"offload_optimizer": ON_HOST, "offload_param": ON_HOST}])
def test_an_estimate_is_what_is_printed_for_a_configuration(
    stage: int, more: dict[str, Any], homes: dict[str, Any]
) -> None:
    if homes and stage == 0:
        return  # refused
    chosen = settings(stage, more, reduce_bucket_size=2**21, **homes)
    numel = 2**24 + 77
    model = of_size(numel, 2**22, chosen)
    found = forecast(chosen, model, Job(4), 1)
    states = (Kind.PARAMETERS, Kind.MASTERS, Kind.SUMS, Kind.STATE, Kind.GATHERED)
    device = sum(found.taken(kind) for kind in states)
    host = sum(found.taken(kind, on_host=True) for kind in states)
    want = rank_bytes(chosen, Counted(numel, 2**22), 4)
    beside = 8 * 2**22  # where sums land and masters are cast, which an estimate does not count
    assert want[0] <= device * 1.001 <= want[0] * 1.002 + (beside if homes else 0)
    assert want[1] <= host * 1.001 <= want[1] * 1.002 + (beside if homes else 0)


def test_any_optimizer_of_torchs_is_counted() -> None:
    kept = {"Adam": 2, "Adagrad": 1, "Lion": 1, "Adadelta": 2, "Rprop": 2, "RMSprop": 1}
    for name, tensors in kept.items():
        chosen = settings(2, {"optimizer": {"type": name, "params": {"lr": 0.1}}})
        assert state_bytes(chosen, torch.float32, 1000) == tensors * 4000, name
    amsgrad = {"optimizer": {"type": "AdamW", "params": {"amsgrad": True, "capturable": True}}}
    assert state_bytes(settings(2, amsgrad), torch.bfloat16, 1000) == 6000
    assert state_bytes(settings(2, {}), torch.float32, 1000) == 8000


def test_an_optimizer_that_needs_more_than_a_parameter_is_named() -> None:
    lbfgs = settings(2, {"optimizer": {"type": "LBFGS", "params": {}}})
    with pytest.raises(ConfigError, match=r"the state of LBFGS cannot be counted.*closure"):
        state_bytes(lbfgs, torch.float32, 1)


def test_a_model_s_frozen_parameters_are_counted_as_such(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = nn.Sequential(nn.Linear(9000, 9000).requires_grad_(False), nn.Linear(9000, 1000))
    zero.estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=2)
    frozen = capsys.readouterr().out
    assert "90M parameters, 81M frozen, outside the optimizer, 81M in its largest layer." in frozen
    zero.estimate_zero3_model_states_mem_needs_all_live(model.requires_grad_(True), 2)
    assert frozen != capsys.readouterr().out


def test_tables_name_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10))
    zero.estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=2)
    live = capsys.readouterr().out
    total = sum(p.numel() for p in model.parameters())
    zero.estimate_zero3_model_states_mem_needs_all_cold(total, 1000 * 1001, num_gpus_per_node=2)
    assert capsys.readouterr().out == live
    assert "1 node of 2 ranks" in live and "1M in its largest layer" in live
    names = [line.split("| ")[-1] for line in live.splitlines()[4:]]
    precisions = ["bf16", "bf16, bf16 masters", "bf16, bf16 masters and states", "fp32"]
    homes = ["", ", offload_optimizer", ", offload_optimizer, offload_param"]
    assert names == [precision + home for precision in precisions for home in homes]
    zero.estimate_zero2_model_states_mem_needs_all_live(model)
    other = capsys.readouterr().out
    zero.estimate_zero2_model_states_mem_needs_all_cold(total)
    assert capsys.readouterr().out == other
    assert other.count("offload_optimizer") == 4 and "offload_param" not in other


def test_a_configuration_is_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    given = {**LOWEST, "train_batch_size": "auto", "zero_optimization": {"stage": 1}}
    zero.estimate_zero2_model_states_mem_needs_all_cold(2**30, 4, config=given)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == ["3.50", "GB", "|", "0.00", "GB", "|", "the", "configuration"]
    with pytest.raises(ConfigError, match="stagee"):
        zero.estimate_zero2_model_states_mem_needs_all_cold(
            8, config={"zero_optimization": {"stagee": 1}}
        )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
def test_matrices_and_the_rest_are_counted_by_who_updates_them() -> None:
    muon: dict[str, Any] = {"optimizer": {"type": "Muon", "params": {"lr": 0.02}}}
    model = nn.Sequential(
        nn.Embedding(100, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 128)
    ).to("meta")
    found = forecast(settings(0, muon), model, Job(1), 1)
    matrices, rest = 2 * 64 * 64, 100 * 64 + 64 * 128 + 64 + 64 + 128
    assert found.taken(Kind.STATE) == pytest.approx(4 * matrices + 8 * rest, rel=0.02)
