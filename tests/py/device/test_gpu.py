"""On CUDA: buffers shared with the core, the engine on one device, and NCCL against gloo. Skipped
without a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zerort
from gpus import gpu, nccl
from training import assert_near, weights
from zerort import _core

HERE = Path(__file__).parents[1]


@gpu
def test_a_cuda_buffer_and_its_fragments_are_the_tensors_own_memory() -> None:
    plan = _core.Plan([(100, "f32", 0, 0), (28, "f32", 0, 0)], world=2, stage=2, cap_bytes=1 << 20)
    (bucket,) = plan.buckets
    flat = torch.arange(bucket.numel, dtype=torch.float32, device="cuda")
    buffer = _core.Buffer(flat, plan, bucket.id)
    assert buffer.data_ptr == flat.data_ptr()
    shard = torch.from_dlpack(buffer.shard(1))
    assert shard.device == flat.device
    assert shard.data_ptr() == flat.data_ptr() + 4 * bucket.shard_numel
    shard.fill_(-1.0)
    assert flat[bucket.shard_numel :].eq(-1.0).all()
    with pytest.raises(zerort.LayoutError, match="not in host memory"):
        _core.squared_norm(buffer)


def _train(
    device: str, stage: int, **zero: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)).to(device)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, **zero},
        "zerort": {"window": 2},
    }
    engine, *_ = zerort.initialize(model=model, config=config)
    draw = torch.Generator().manual_seed(1)
    for _ in range(8):
        engine.backward(
            engine(torch.randn(4, 32, generator=draw).to(engine.device)).square().mean()
        )
        engine.step()
    assert engine.device.type == device
    return weights(engine), engine.get_global_grad_norm()


@gpu
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_gpu_trains_like_the_cpu(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, norm = _train("cuda", stage)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    expected, expected_norm = _train("cpu", stage)
    assert norm == pytest.approx(expected_norm, rel=1e-4)
    for name, tensor in weights.items():
        assert_near(tensor, expected[name], name, 1e-4)


@gpu
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_gpu_trains_like_the_cpu_with_state_on_the_host(
    stage: int, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = {"device": "cpu", "pin_memory": pinned}
    weights, norm = _train("cuda", stage, offload_optimizer=home)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    expected, expected_norm = _train("cpu", stage)
    assert norm == pytest.approx(expected_norm, rel=1e-4)
    for name, tensor in weights.items():
        assert_near(tensor, expected[name], name, 1e-4)


def _torchrun(output: Path, stage: int, accumulation: int, environment: dict[str, str]) -> Any:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(HERE / "train_small.py"), str(stage), str(accumulation), str(output)]
    subprocess.run(
        [*command, *arguments], env={**os.environ, **environment}, check=True, timeout=150
    )
    return torch.load(output, weights_only=True)


@nccl
@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_two_ranks_on_nccl_train_like_gloo(stage: int, accumulation: int, tmp_path: Path) -> None:
    over_nccl = _torchrun(
        tmp_path / "nccl.pt", stage, accumulation, {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    )
    over_gloo = _torchrun(tmp_path / "gloo.pt", stage, accumulation, {"CUDA_VISIBLE_DEVICES": ""})
    assert (over_nccl["device"], over_gloo["device"]) == ("cuda", "cpu")
    assert over_nccl["norm"] == pytest.approx(over_gloo["norm"], rel=1e-4)
    for name, tensor in over_nccl["weights"].items():
        assert_near(tensor, over_gloo["weights"][name], name, 1e-4)
