"""Names that programs written for DeepSpeed call: getters, places, state dicts, loaders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, TensorDataset

import ranks
import zerort
from catching import caught
from training import at_stage, keep
from zerort.config import load
from zerort.config.features import FlopsProfiler
from zerort.config.quantize import Eigenvalue
from zerort.errors import ConfigError
from zerort.step.getters import Getters
from zerort.utils import RepeatingLoader

pytestmark = pytest.mark.timeout(120)


class Tied(nn.Module):
    """A frozen layer whose weight has two names, and one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4)
        self.again = self.frozen
        self.head = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(x)).square().mean()


def engine_with(**config: Any) -> Any:
    torch.manual_seed(0)
    engine = zerort.initialize(
        model=Tied(),
        training_data=config.pop("training_data", None),
        collate_fn=config.pop("collate_fn", None),
        config={**CONFIG, **config},
    )[0]
    keep(engine)
    return engine


# Getters

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
}
DEFAULTS = {
    *(f"flops_profiler_{name}" for name in FlopsProfiler.model_fields),
    *(f"eigenvalue_{name}" for name in Eigenvalue.model_fields),
    "fp16_auto_cast",
    "pld_gamma",
    "pld_theta",
    "zero_gather_16bit_weights_on_model_save",
}
"""Getters that need no row of their own."""

READ: list[tuple[str, Any, dict[str, Any]]] = [
    ("zero_optimization_stage", 2, at_stage(2)),
    ("zero_optimization", False, at_stage(0)),
    ("zero_optimization", True, at_stage(1)),
    ("zero_optimization_partition_gradients", False, at_stage(1)),
    ("zero_optimization_partition_gradients", True, at_stage(2)),
    ("zero_optimization_partition_gradients", True, at_stage(3)),
    ("zero_optimization_partition_weights", False, at_stage(2)),
    ("zero_optimization_partition_weights", True, at_stage(3)),
    ("fp16_enabled", False, {}),
    ("fp16_enabled", True, {"fp16": {"enabled": True}}),
    ("bfloat16_enabled", True, {"bf16": {"enabled": True}}),
    ("managed_gradient_accumulation", True, {}),
    ("gradient_clipping", 0.5, {}),
    ("wall_clock_breakdown", True, {"wall_clock_breakdown": True}),
    ("steps_per_print", 7, {"steps_per_print": 7}),
    ("steps_per_print", None, {}),
    ("dynamic_loss_scale", True, {"fp16": {"enabled": True}}),
    ("dynamic_loss_scale", False, {"fp16": {"enabled": True, "loss_scale": 4}}),
    ("initial_dynamic_scale", 256.0, {"fp16": {"enabled": True, "initial_scale_power": 8}}),
    ("postscale_gradients", True, {}),
    ("postscale_gradients", False, {"prescale_gradients": True}),
    ("gradient_predivide_factor", 2.0, {"gradient_predivide_factor": 2.0}),
    ("optimizer_name", "AdamW", {}),
    ("optimizer_params", {"lr": 0.1}, {}),
    ("scheduler_name", None, {}),
    ("scheduler_params", None, {}),
    ("scheduler_name", "WarmupLR", {"scheduler": {"type": "WarmupLR", "params": {}}}),
    ("dump_state", False, {}),
    ("memory_breakdown", False, {}),
    ("pld_enabled", False, {}),
    ("pld_params", False, {}),
    (
        "pld_params",
        {"theta": 0.25, "gamma": 0.5},
        {"progressive_layer_drop": {"enabled": True, "theta": 0.25, "gamma": 0.5}},
    ),
    (
        "quantize_training",
        (True, 4, 12, 3, 2, 2, True, 0.5, "asymmetric", "stochastic", False, False),
        {
            "fp16": {"enabled": True},
            "quantize_training": {
                "enabled": True,
                "quantize_bits": {"start_bits": 12, "target_bits": 4},
                "quantize_schedule": {"quantize_period": 3, "schedule_offset": 2},
                "quantize_groups": 2,
                "quantize_algo": {"q_type": "asymmetric", "rounding": "stochastic"},
                "fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.5},
            },
        },
    ),
    ("flops_profiler_enabled", True, {"flops_profiler": {"enabled": True}}),
    ("flops_profiler_profile_step", 3, {"flops_profiler": {"profile_step": 3}}),
    ("eigenvalue_enabled", False, {}),
    ("eigenvalue_max_iter", 7, {"eigenvalue": {"max_iter": 7}}),
    ("log_level", "warning", {"log_level": "warning"}),
    ("log_level", None, {}),
    *(
        (f"{kind}_master_weights_and_gradients", True, {kind: {"enabled": True, key: True}})
        for kind in ("fp16", "bf16")
        for key in (f"{kind}_master_weights_and_grads",)
    ),
    (
        "bf16_optimizer_states",
        True,
        {
            "bf16": {
                "enabled": True,
                "bf16_master_weights_and_grads": True,
                "bf16_optimizer_states": True,
            }
        },
    ),
    ("zero_offload_optimizer", None, {}),
    ("zero_offload_param", None, {}),
    ("zero_cpu_offload", True, {"zero_optimization": {"stage": 1, "cpu_offload": True}}),
    ("zero_use_cpu_optimizer", False, {"zero_optimization": {"stage": 1, "offload_optimizer": {}}}),
    ("amp_enabled", True, {"amp": {"enabled": True}}),
    ("amp_params", {"opt_level": "O2"}, {"amp": {"enabled": True, "opt_level": "O2"}}),
    ("amp_params", False, {}),
    ("torch_autocast_enabled", True, {"torch_autocast": {"enabled": True}}),
    ("wall_clock_breakdown", True, {"flops_profiler": {"enabled": True}}),
    *(
        (f"flops_profiler_{key}", value, {"flops_profiler": {key: value}})
        for key, value in {
            "enabled": True,
            "profile_step": 3,
            "recompute_fwd_factor": 0.5,
            "module_depth": 2,
            "top_modules": 4,
            "detailed": False,
            "output_file": "flops.txt",
        }.items()
    ),
]


@pytest.mark.parametrize(("name", "value", "changes"), READ)
def test_a_getter_reads_its_key(name: str, value: Any, changes: dict[str, Any]) -> None:
    stub = Getters()
    stub.config = load({**CONFIG, **changes})  # type: ignore[attr-defined]
    assert getattr(stub, name)() == value


def test_every_getter_is_the_engines_and_says_what_it_reads() -> None:
    getters = [name for name in vars(Getters) if not name.startswith("_")]
    assert {name for name, *_ in READ} | DEFAULTS == set(getters)
    for name in getters:
        method = getattr(zerort.Engine, name)
        assert method is getattr(Getters, name) and method.__name__ == name
        assert method.__doc__ and not name.startswith("get")


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, False),
        ({"bf16": {"enabled": True}}, False),
        ({"fp16": {"enabled": True, "initial_scale_power": 0}}, True),
        ({"fp16": {"enabled": True, "loss_scale": 4}}, True),
        ({"fp16": {"enabled": True, "loss_scale": 1}}, False),
        ({"torch_autocast": {"enabled": True, "dtype": "fp16"}}, True),
    ],
)
def test_whether_a_loss_is_scaled_can_be_asked(changes: dict[str, Any], scales: bool) -> None:
    engine = engine_with(**changes)
    assert engine.scales_loss is scales and isinstance(engine.loss_scale, float)


def test_the_engines_configuration_is_a_mapping_too() -> None:
    engine = engine_with(**at_stage(1))
    assert engine.config.get("zero_optimization", {}).get("stage") == 1
    assert dict(engine.config) == {**CONFIG, **at_stage(1)}


# Places, state dicts and what is saved


def places_and_weights(rank: int, world: int, stage: int, folder: str) -> dict[str, Any]:
    engine = engine_with(**at_stage(stage))
    found: dict[str, Any] = {
        "places": (
            engine.global_rank,
            engine.world_size,
            engine.dp_world_size,
            engine.mp_world_size,
            engine.get_data_parallel_rank(),
        ),
        "batch": engine.get_batch_info(),
        "local": engine.local_rank,
        "keys": set(engine.module_state_dict()),
        "trained": set(engine.module_state_dict(exclude_frozen_parameters=True)),
        "prefixed": set(engine.module_state_dict(prefix="m.", exclude_frozen_parameters=True)),
    }
    os.environ["LOCAL_RANK"] = str(rank + 5)
    found["torchrun"] = engine.local_rank
    engine.empty_partition_cache()
    with zerort.zero.unwrap_model_for_generation(engine.module) as whole:
        found["whole"] = whole is engine.module and sum(float(p.sum()) for p in whole.parameters())
    threes = {name: torch.full_like(t, 3.0) for name, t in Tied().state_dict().items()}
    engine.load_module_state_dict({"module": threes})
    engine.backward(engine(torch.zeros(2, 4)))
    engine.step()
    master = zerort.utils.safe_get_full_fp32_param(engine.module.head.weight)
    assert master is not None
    found["followed"] = (master - 3).abs().max().item() < 0.2
    engine.load_module_state_dict(threes)
    with zerort.zero.GatheredParameters(list(engine.module.parameters())):
        found["loaded"] = {p.unique().item() for p in engine.module.parameters()}
    found["strict"] = caught(lambda: engine.load_module_state_dict({"other": torch.ones(1)}))
    engine.load_module_state_dict({}, strict=False)
    engine.load_module_state_dict(
        {"bias": 5.0}, custom_load_fn=lambda src, dst: dst.head.bias.data.fill_(src["bias"])
    )
    with zerort.zero.GatheredParameters(list(engine.module.parameters())):
        found["custom"] = engine.module.head.bias.unique().tolist()
    found["saved"] = engine.save_fp16_model(folder, f"w{stage}.bin")
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_places_and_weights_under_deepspeeds_names(stage: int, tmp_path: Path) -> None:
    frozen = {f"{name}.{part}" for name in ("frozen", "again") for part in ("weight", "bias")}
    results = ranks.run(2, places_and_weights, stage, str(tmp_path))
    for rank, found in enumerate(results):
        assert found["places"] == (rank, 2, 2, 1, rank)
        assert found["batch"] == (4, 2, 1)
        assert found["local"] == 0 and found["torchrun"] == rank + 5
        assert found["trained"] == {"head.weight", "head.bias"} == found["keys"] - frozen
        assert found["prefixed"] == {f"m.{name}" for name in found["trained"]}
        assert found["followed"] and found["loaded"] == {3.0} and found["custom"] == [5.0]
        assert found["whole"] == results[0]["whole"] != 0.0
        assert isinstance(found["strict"], RuntimeError)
        assert found["saved"] is (stage < 3)
    assert (tmp_path / f"w{stage}.bin").exists() is (stage < 3)


# Loaders


class Stream(IterableDataset[float]):
    def __iter__(self) -> Any:
        return iter((1.0, 2.0, 3.0))


def loaders(rank: int, world: int) -> dict[str, Any]:
    data = TensorDataset(torch.arange(10.0))

    def joined(samples: list[Any]) -> list[float]:
        return [float(sample[0]) for sample in samples]

    engine = engine_with(training_data=data, collate_fn=joined)
    found = {
        "train": list(engine.deepspeed_io(data)),
        "eval": list(engine.deepspeed_io(data, batch_size=3, route="eval")),
        "sampled": list(engine.deepspeed_io(data, data_sampler=SequentialSampler(data))),
        "stream": list(engine.deepspeed_io(Stream(), collate_fn=list)),
        "there": len(engine.training_dataloader),
        "predict": list(engine.deepspeed_io(data, route="predict")),
        "workers": engine.deepspeed_io(data, num_local_io_workers=3)._loader.num_workers,
        "route": caught(lambda: engine.deepspeed_io(data, route="test")),
        "none": caught(lambda: engine.deepspeed_io(iter(()))),
        "kind": isinstance(engine.deepspeed_io(data, data_sampler=[0]), DataLoader),
        "other": list(engine.deepspeed_io(data, collate_fn=len)),
    }
    return found


def test_deepspeed_io_makes_loaders_that_ranks_share() -> None:
    first, second = ranks.run(2, loaders)
    trained = [sample for found in (first, second) for batch in found["train"] for sample in batch]
    assert sorted(trained) == [float(i) for i in range(10)] != trained
    assert first["eval"] == [[0.0, 2.0, 4.0], [6.0, 8.0]]
    assert second["eval"] == [[1.0, 3.0, 5.0], [7.0, 9.0]]
    assert first["predict"] == [[0.0, 2.0], [4.0, 6.0], [8.0]] and first["workers"] == 3
    for found in (first, second):
        assert found["sampled"] == [[2.0 * i, 2.0 * i + 1] for i in range(5)]
        assert found["stream"] == [[1.0, 2.0], [3.0]]
        assert found["there"] == 3 and found["other"] == [2, 2, 1]
        assert isinstance(found["route"], ConfigError) and "'test'" in str(found["route"])
        assert isinstance(found["none"], ConfigError) and "deepspeed_io(...)" in str(found["none"])
        assert found["kind"]


def test_a_repeating_loader_has_no_end() -> None:
    loader = RepeatingLoader([1, 2, 3])
    assert [next(loader) for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]
    assert [value for value, _ in zip(loader, range(2), strict=False)] == [2, 3]
    with pytest.raises(StopIteration):
        next(RepeatingLoader([]))
