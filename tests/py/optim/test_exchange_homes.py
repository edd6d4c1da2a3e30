"""Exchanged parameters where masters, sums, state or shards are at home on the host, or leave the
device for a while: on the stand-in for an accelerator, which refuses an operation that takes memory
of both and follows what is over before what.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole import MUON, PADDINGS

import ranks
import zerort
from homes import BOTH, OPTIMIZER, PARAM
from stand_in import Machine
from training import keep

pytestmark = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is torch 2.9's"
)
HALF = {"offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 0.5}}
SIZES = (16, 24, 24, 40, 8)
HOMES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "stage 1": (1, "fp32", OPTIMIZER),
    "stage 2, bf16": (2, "bf16", OPTIMIZER),
    "stage 2, states leave": (2, "bf16", {}),
    "stage 3, bf16": (3, "bf16", BOTH),
    "stage 3": (3, "fp32", BOTH),
    "stage 3, half of it": (3, "bf16", HALF),
    "stage 3, shards alone": (3, "bf16", PARAM),
}


def trained(
    rank: int, stage: int, way: str, dtype: str, zero: dict[str, Any], *, leaves: bool
) -> tuple[list[Tensor], list[Any], list[bool]]:
    """Weights after steps between which states leave, and a parameter is written; accesses that
    race, and which rooms are on the host.
    """
    machine = Machine()
    with machine.running(None):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(SIZES)))
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": MUON,
            "zerort": {"whole_padding": PADDINGS[way], "reduce_at": "micro_batch"},
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": 1000,
                "stage3_param_persistence_threshold": 0,
                **zero,
            },
            **({} if dtype == "fp32" else {dtype: {"enabled": True}}),
        }
        engine = zerort.initialize(model=model, config=config)[0]
        for step in range(4):
            x = torch.randn(2, SIZES[0], generator=torch.Generator().manual_seed(10 * step + rank))
            engine.backward(engine(x.to(next(model.parameters()).dtype)).float().square().sum())
            engine.step()
            if leaves and step == 1:
                engine.offload_states()
                engine.reload_states()
            if step == 2:
                with zerort.zero.GatheredParameters([model[1].weight], modifier_rank=1):
                    if rank == 1 or stage < 3:
                        model[1].weight.data[3].fill_(0.25)
        with zerort.zero.GatheredParameters(list(model.parameters())):
            weights = [parameter.detach().clone() for parameter in model.parameters()]
        keep(engine)
    rooms = engine._parts.boundary.flat.rooms.values()
    return weights, machine.races, [room.is_on_host for room in rooms]


def every_home(rank: int, world: int) -> dict[str, tuple[bool, list[Any], list[bool]]]:
    """By name: whether bits are those of the owned way on the device, races, homes of rooms."""
    found = {}
    for name, (stage, dtype, zero) in HOMES.items():
        expected, *_ = trained(rank, stage, "owned", dtype, {}, leaves=False)
        ours, *rest = trained(rank, stage, "exchanged", dtype, zero, leaves="leave" in name)
        found[name] = all(map(torch.equal, ours, expected)), *rest
    return found  # type: ignore[return-value]


run = ranks.once(None)(lambda: ranks.shared(2, every_home, timeout=120))


@pytest.mark.parametrize("name", HOMES)
def test_bits_are_those_without_and_no_access_races(name: str) -> None:
    for found in run():
        equal, races, on_host = found[name]
        assert equal and not races
        assert on_host
        homes = set(on_host)
        if "half" not in name:
            assert homes == {"offload_optimizer" in HOMES[name][2]}
