"""Who takes part: each contender is a function from a workload to a step.

A step takes a batch, does forward, backward, clipping and one AdamW update with torch's fused
kernel, leaves no gradient behind, and returns this rank's loss, detached. In bf16 DDP computes
under autocast over fp32 weights, and the others keep fp32 shards or masters (FSDP2, DeepSpeed,
zerort): every one of them updates in fp32. Where a workload is pure, DDP and FSDP2 train the bf16
weights themselves, and DeepSpeed and zerort masters of them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

import zerort
from workloads import Batch, Workload

Step = Callable[[Batch], Tensor]
Build = Callable[[Workload, torch.device], Step]

DEFAULT = {"transport": "auto"}
"""Of the contenders that name none."""
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}


def _alone(workload: Workload, device: torch.device) -> Step:
    model = workload.model(device)
    return _plain(workload, device, model, *_optimizers(workload, model))


def _ddp(workload: Workload, device: torch.device) -> Step:
    module = workload.model(device)
    model = DistributedDataParallel(module)
    return _plain(workload, device, model, *_optimizers(workload, module))


def _ddp_views(workload: Workload, device: torch.device) -> Step:
    module = workload.model(device)
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    return _plain(workload, device, model, *_optimizers(workload, module))


def _ddp_hooked(make: Callable[[], tuple[Any, Any]], **options: Any) -> Build:
    """With a communication hook and its state."""

    def build(workload: Workload, device: torch.device) -> Step:
        module = workload.model(device)
        model = DistributedDataParallel(module, **options)
        model.register_comm_hook(*make())
        return _plain(workload, device, model, *_optimizers(workload, module))

    return build


def _bf16(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """torch's own, which is refused by its name where there is no NCCL."""
    return default_hooks.bf16_compress_hook(state, bucket)


# which DDP compares with the class itself, not with its name
_bf16.__annotations__["bucket"] = dist.GradBucket
_bf16.__annotations__["return"] = torch.futures.Future[Tensor]


def _ddp_zero(workload: Workload, device: torch.device) -> Step:
    model = DistributedDataParallel(workload.model(device), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=AdamW,
        parameters_as_bucket_view=True,
        lr=workload.lr,
        fused=True,
        **ADAMW,
    )
    return _plain(workload, device, model, optimizer)


def _fsdp2(workload: Workload, device: torch.device) -> Step:
    model = workload.model(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    low = workload.dtype if workload.dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
    for block in workload.blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = _adamw(workload, model.parameters())

    def step(batch: Batch) -> Tensor:
        loss = workload.loss(model(batch[0]), batch[1])
        loss.backward()
        return _update(workload, model, [optimizer], loss)

    return step


@dataclass(frozen=True)
class Zerort:
    """An engine with these keys of the section `zerort`."""

    stage: int
    runtime: Mapping[str, Any]
    room: float | None = None
    """Stage 3: for which part of the model there is room. Every parameter is sharded."""

    def __call__(self, workload: Workload, device: torch.device) -> Step:
        model, config = workload.model(device), _config(workload, self.stage)
        config["zerort"] = {**DEFAULT, **self.runtime}
        if self.room is not None:
            config["zero_optimization"] |= {
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": int(
                    self.room * sum(p.numel() for p in model.parameters())
                ),
            }
        return _engine_step(workload, _engine(workload, model, config))


def _zerort(stage: int, **runtime: Any) -> Zerort:
    return Zerort(stage, runtime)


def _zerort_3(room: float, **runtime: Any) -> Zerort:
    whole = {"reshard_after_forward": False} if room >= 1 else {}
    return Zerort(3, whole | runtime, room)


def in_buckets(names: Iterable[str], sizes: Mapping[str, int]) -> dict[str, Build]:
    """zerort's contenders of these names in buckets of other `sizes`: bytes by their names. What
    tunes itself has none.
    """
    every = CONTENDERS | BY_NAME
    found: dict[str, Build] = {}
    for name in names:
        built = every[name]
        if isinstance(built, Zerort) and not built.runtime.get("tune"):
            for label, nbytes in sizes.items():
                runtime = {**built.runtime, "bucket_bytes": nbytes}
                found[f"{name}, {label}"] = replace(built, runtime=runtime)
    return found


def between_hosts() -> None:
    """Ranks are in network namespaces of one machine: they could share memory all the same, and
    nothing would cross the link.
    """
    DEFAULT["transport"] = "gloo"


def stage_2(workload: Workload, device: torch.device) -> Any:
    """An engine whose step waits for updated parameters."""
    config = _config(workload, 2) | {"zerort": {"publish": "step", **DEFAULT}}
    return _engine(workload, workload.model(device), config)


def _deepspeed(stage: int) -> Build:
    def build(workload: Workload, device: torch.device) -> Step:
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        import deepspeed

        model = workload.model(device)
        config = _config(workload, stage) | {"zero_allow_untested_optimizer": True}
        del config[
            "optimizer"
        ]  # its own would compile a kernel; torch's fused one is what all others run
        optimizer = _adamw(workload, model.parameters())
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return _engine_step(workload, engine)

    return build


CONTENDERS: dict[str, Build] = {
    "DDP": _ddp,
    "no communication": _alone,
    "DDP, bucket views": _ddp_views,
    "DDP + ZeroRedundancy": _ddp_zero,
    "FSDP2": _fsdp2,
    "zerort stage 0": _zerort(0),
    "zerort stage 1": _zerort(1),
    "zerort stage 2": _zerort(2),
    "zerort stage 3": _zerort_3(1),
    "zerort stage 3, a third": _zerort_3(1 / 3),
}
BY_NAME: dict[str, Build] = {
    f"zerort stage {stage}, publish {publish}": _zerort(stage, publish=publish)
    for stage in (1, 2)
    for publish in ("step", "overlapped")
}
"""Those that take part when they are named."""
for each in ("gloo", "shared"):
    BY_NAME |= {
        f"zerort stage {stage}, {each}": _zerort(stage, transport=each) for stage in (0, 1, 2)
    }
    BY_NAME[f"zerort stage 3, {each}"] = _zerort_3(1, transport=each)
    BY_NAME |= {
        f"zerort stage {stage}, publish {publish}, {each}": _zerort(
            stage, publish=publish, transport=each
        )
        for stage in (1, 2)
        for publish in ("step", "overlapped")
    }
BY_NAME |= {f"zerort stage {stage}, tuned": _zerort(stage, tune=True) for stage in (0, 1, 2)}
NARROW: dict[str, Build] = {
    "DDP, bf16 hook": _ddp_hooked(lambda: (None, _bf16)),
    # In one bucket: its collectives are chained on gloo's threads, in another order on each rank.
    "DDP, PowerSGD": _ddp_hooked(
        lambda: (
            powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2),
            powerSGD_hook.powerSGD_hook,
        ),
        bucket_cap_mb=1000,
    ),
    **{
        f"zerort stage {stage}, {wire}": _zerort(stage, wire=wire)
        for stage in (0, 1, 2)
        for wire in ("bf16", "int8")
    },
}
"""Which send less than gradients in full precision, and so come to other losses."""
BY_NAME |= NARROW
if importlib.util.find_spec("deepspeed"):
    CONTENDERS |= {f"DeepSpeed stage {stage}": _deepspeed(stage) for stage in (0, 1, 2)}

ELEMENTWISE = {"DDP + ZeroRedundancy", "FSDP2", *(name for name in CONTENDERS if "Deep" in name)}
"""Which cut matrices, or have one optimizer: they take no part under Muon."""

BASELINE = "DDP"
INCOMPARABLE = ("no communication", *NARROW)


def compares(name: str) -> bool:
    """Whether a contender's losses are to be DDP's; others' are not, by design. A bucket size
    behind its name changes nothing in that.
    """
    return not any(name == other or name.startswith(f"{other}, ") for other in INCOMPARABLE)


def _adamw(workload: Workload, parameters: Iterable[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=workload.lr, fused=True, **ADAMW)


def _optimizers(workload: Workload, module: nn.Module) -> list[Optimizer]:
    """Over a whole model: AdamW, or Muon for the blocks' matrices and AdamW for the rest."""
    if not workload.muon:
        return [_adamw(workload, module.parameters())]
    blocks = [p for block in workload.blocks(module) for p in block.parameters()]
    hidden = {p for p in blocks if p.dim() == 2}
    rest = [p for p in module.parameters() if p not in hidden]
    matrices = [p for p in blocks if p in hidden]
    return [torch.optim.Muon(matrices, lr=0.02), _adamw(workload, rest)]


def _engine(workload: Workload, module: nn.Module, config: dict[str, Any]) -> Any:
    if workload.muon:
        del config["optimizer"]
        # At stage 3 a unit of a few matrices takes more than a tenth of padding.
        config["zerort"] = {**config.get("zerort", {}), "whole_padding": 1.0}
        optimizers: Any = _optimizers(workload, module)
        return zerort.initialize(model=module, optimizer=optimizers, config=config)[0]
    return zerort.initialize(model=module, config=config)[0]


def _plain(
    workload: Workload, device: torch.device, model: nn.Module, *optimizers: Optimizer
) -> Step:
    def step(batch: Batch) -> Tensor:
        with torch.autocast(device.type, workload.dtype, enabled=workload.autocasts):
            loss = workload.loss(model(batch[0]), batch[1])
        loss.backward()
        return _update(workload, model, optimizers, loss)

    return step


def _update(
    workload: Workload, model: nn.Module, optimizers: Iterable[Optimizer], loss: Tensor
) -> Tensor:
    torch.nn.utils.clip_grad_norm_(model.parameters(), workload.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def _config(workload: Workload, stage: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": workload.size,
        "gradient_clipping": workload.clip,
        "optimizer": {"type": "AdamW", "params": {"lr": workload.lr, **ADAMW}},
        "zero_optimization": {"stage": stage},
    }
    if workload.dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    if workload.dtype == torch.float16:
        config["fp16"] = {
            "enabled": True,
            "loss_scale": 1024.0,
        }  # static, so that no contender skips a step
    return config


def _engine_step(workload: Workload, engine: Any) -> Step:
    def step(batch: Batch) -> Tensor:
        loss = workload.loss(engine(batch[0]), batch[1])
        engine.backward(loss)
        engine.step()
        return loss.detach()

    parts = getattr(engine, "_parts", None)
    if parts is not None:  # what is on its way must not be there in another contender's turn
        step.settle = parts.reduction.land  # type: ignore[attr-defined]
    return step
