"""Engines to save and load, and a reader of checkpoints that shares no code with the one under
test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import zerort
from zerort.checkpoint.files import Disk

GLOBAL_BATCH = 12  # divisible by every world of the tests
WIDTH = 10


class Net(nn.Module):
    """(batch, WIDTH) -> (batch, WIDTH); odd shapes, so that parameters straddle shards."""

    order = ("entry", "norm", "middle", "exit")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        made = {
            "entry": nn.Linear(WIDTH, 37),
            "norm": nn.LayerNorm(37),
            "middle": nn.Linear(37, 23),
            "exit": nn.Linear(23, WIDTH),
        }
        for name in self.order:
            setattr(self, name, made[name])

    def forward(self, x: Tensor) -> Tensor:
        return self.exit(torch.tanh(self.middle(self.norm(torch.tanh(self.entry(x))))))


class Refactored(Net):
    """The same layers, registered in another order."""

    order = ("exit", "middle", "entry", "norm")


def config_of(
    stage: int = 2, dtype: str = "fp32", bucket: int = 300, **more: Any
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket},
        **more,
    }


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, eps=1e-3)


def engine_of(
    config: dict[str, Any], model: nn.Module | None = None, optimizer: Any = adamw, **more: Any
) -> Any:
    engine, *_ = zerort.initialize(model=model or Net(), optimizer=optimizer, config=config, **more)
    return engine


class Unsynced(Disk):
    """For tests about something else than crashes: waits for no disk."""

    def sync(self, file: int) -> None:
        """Left out."""

    def sync_folder(self, path: Path) -> None:
        """Left out."""


def train(engine: Any, rank: int, world: int, steps: range) -> None:
    """Steps whose global batches do not depend on the number of ranks. `norm` is frozen in steps 1
    and 2.
    """
    share = GLOBAL_BATCH // world
    for step in steps:
        engine.module.norm.requires_grad_(step not in (1, 2))
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(GLOBAL_BATCH, WIDTH, generator=generator)[rank * share : (rank + 1) * share]
        dtype = engine.module.exit.weight.dtype
        engine.backward(engine(x.to(dtype)).float().pow(2).mean())
        engine.step()


def weights(engine: Any) -> dict[str, Tensor]:
    state = engine.module.state_dict().items()
    return {name: value.detach().clone() for name, value in state if isinstance(value, Tensor)}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_bytes())["manifest"]


def index_of(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"rank_{rank}.json").read_bytes())


def tensors_of(folder: Path) -> list[dict[str, Any]]:
    """All of a checkpoint's, wherever they are listed."""
    manifest = manifest_of(folder)
    found = list(manifest["tensors"])
    for rank in range(manifest["world"]):
        if (folder / f"rank_{rank}.json").exists():  # format 1 has all in the manifest
            found += index_of(folder, rank)["tensors"]
    return found


def contents(folder: Path) -> dict[str, Any]:
    """All of a checkpoint by parameter: `NAME master` and `NAME state.KEY` in its shape,
    contiguous, and `NAME values`.

    Follows docs/checkpoints.md alone, with safetensors' own reader. What is not stored comes out as
    NaN.
    """
    manifest = manifest_of(folder)
    found: dict[str, Any] = {}
    for number, bucket in enumerate(manifest["buckets"]):
        for kind, flat in _buffers(folder, manifest, number).items():
            for param, offset in zip(bucket["params"], bucket["offsets"], strict=True):
                saved = manifest["params"][param]
                keys = saved["state"]["tensors"] if saved["state"] else []
                if kind == "master" or kind.removeprefix("state.") in keys:
                    shaped = torch.as_strided(flat, saved["shape"], saved["strides"], offset)
                    found[f"{saved['name']} {kind}"] = shaped.clone(
                        memory_format=torch.contiguous_format
                    )
    for saved in manifest["params"]:
        found[f"{saved['name']} values"] = saved["state"] and saved["state"]["values"]
    return found


def _buffers(folder: Path, manifest: dict[str, Any], number: int) -> dict[str, Tensor]:
    bucket, prefix = manifest["buckets"][number], f"bucket.{number}."
    flats: dict[str, Tensor] = {}
    tensors = tensors_of(folder)
    for rank in range(manifest["world"]):
        name = f"rank_{rank}.safetensors"
        runs = {t["name"]: t["runs"] for t in tensors if t["file"] == name and "runs" in t}
        with safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                if not key.startswith(prefix):
                    continue
                shard, done = file.get_tensor(key), 0
                kind = key.removeprefix(prefix)
                flat = flats.setdefault(
                    kind, torch.full((bucket["numel"],), torch.nan, dtype=shard.dtype)
                )
                for start, length in runs[key]:
                    at = rank * bucket["shard_numel"] + start
                    flat[at : at + length] = shard[done : done + length]
                    done += length
    return flats


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same keys, and everything the same to the bit."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            assert value.dtype == other[key].dtype and not value.isnan().any(), key
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key
