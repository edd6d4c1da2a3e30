"""A model on the meta device gets its values at stage 3, in parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ranks
import zerort
from training import keep
from zerort.zero import GatheredParameters


class Net(nn.Module):
    """Tied, normalised, with a buffer and a parameter in another memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        x = self.recurrent(self.attention(x, x, x)[0])[0]
        images = self.conv(x.reshape(-1, 4, 4, 4)).mean()
        return self.head(self.norm(x.flatten(0, 1))) + images


class Own(nn.Module):
    """A parameter that only the model's `_init_weights` knows of."""

    def __init__(self, knows: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.knows = knows

    def _init_weights(self, module: nn.Module) -> None:
        if module is self and self.knows:
            nn.init.constant_(self.scale, 3.0)
        if isinstance(module, nn.Linear):
            module.weight.data.fill_(0.5)


class Images(nn.Module):
    """What its constructor has drawn gets another memory format afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, bias=False)
        self.apply(self._init_weights)
        self.to(memory_format=torch.channels_last_3d)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv3d) and not module.weight.is_meta:
            module.weight.data.normal_()


def settings(stage: int = 3, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 200,
            "stage3_param_persistence_threshold": 9,
        },
        **more,
    }


def on_meta(kind: Any = Net, *args: Any) -> nn.Module:
    with torch.device("meta"):
        return kind(*args)


def started(model: nn.Module, **more: Any) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine, *_ = zerort.initialize(model=model, optimizer=optimizer, config=settings(**more))
    keep(engine)
    return engine


def values(model: nn.Module) -> dict[str, Tensor]:
    with GatheredParameters(list(model.parameters())):
        named = (*model.named_parameters(), *model.named_buffers())
        return {name: tensor.detach().clone() for name, tensor in named}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [n for n in b if a[n].stride() != b[n].stride() or not torch.equal(a[n], b[n])]


def initialised(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(5)
    want = Net()
    model = on_meta()
    ids = [id(p) for p in model.parameters()]
    torch.manual_seed(5 + rank)
    state = torch.get_rng_state()
    engine = started(model)
    found: dict[str, Any] = {
        "differs": differing(values(model), values(want)),
        "same objects": ids == [id(p) for p in model.parameters()],
        "tied": model.head.weight is model.table.weight,
        "state": rank == 0 or torch.equal(torch.get_rng_state(), state),
    }
    other = started(want)
    for step in range(2):
        x = (torch.arange(16).reshape(2, 8) + rank + step) % 30
        for each in (engine, other):
            each.backward(each(x).square().mean())
            each.step()
    found["trained differs"] = differing(values(model), values(want))
    torch.manual_seed(7)
    want_images, images = Images(), on_meta(Images)
    torch.manual_seed(7)
    started(images)
    found["differing images"] = differing(values(images), values(want_images))
    own = on_meta(Own, True)
    started(own)
    found["own"] = {n: v.unique().tolist() for n, v in values(own).items() if n != "layer.bias"}
    try:
        started(on_meta(Own, False))
    except zerort.PlanError as error:
        found["refused"] = str(error)
    try:
        started(on_meta() if rank else Net())
    except zerort.PlanError as error:
        found["parted"] = str(error)
    try:
        zerort.initialize(model=on_meta(), optimizer=torch.optim.AdamW, config=settings(stage=2))
    except zerort.PlanError as error:
        found["stage 2"] = str(error)
    return found


@ranks.once(None)
def initialised_once() -> list[dict[str, Any]]:
    return ranks.run(2, initialised)


def test_modules_give_values_as_their_constructors_would_on_rank_0() -> None:
    for found in initialised_once():
        assert found["differs"] == found["trained differs"] == []
        assert found["differing images"] == []
        assert found["same objects"] and found["tied"] and found["state"]
        assert found["own"] == {"layer.weight": [0.5], "scale": [3.0]}


def test_what_nothing_gives_values_is_named() -> None:
    for found in initialised_once():
        assert "scale is on the meta device" in found["refused"]
        assert "rank 0 has 0; rank 1 has" in found["parted"]
        assert "table.weight is on the meta device" in found["stage 2"]


def loaded(rank: int, world: int, folder: str) -> dict[str, Any]:
    place = Path(folder)
    torch.manual_seed(11)
    want = Net()
    stored = {n: t.contiguous() for n, t in want.state_dict().items() if n != "head.weight"}
    if rank == 0:
        names = sorted(stored)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, inside in parts.items():
            save_file({n: stored[n] for n in inside}, place / file)
        index = {"weight_map": {n: file for file, inside in parts.items() for n in inside}}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({**stored, "table.weight": torch.zeros(3, 8)}, place / "wrong.safetensors")
        del stored["norm.weight"]
        save_file(stored, place / "short.safetensors")
    zerort_ready()
    found: dict[str, Any] = {}
    for name in ("", "model.safetensors.index.json"):
        model = on_meta()
        started(model, zerort={"load_from": str(place / name)})
        found[name] = differing(values(model), values(want))
    half = on_meta()
    started(half, zerort={"load_from": folder}, bf16={"enabled": True})
    found["half"] = differing(values(half), values(want.to(torch.bfloat16)))[:1]
    for name in ("wrong.safetensors", "short.safetensors", "none.safetensors"):
        try:
            started(on_meta(), zerort={"load_from": str(place / name)})
        except (zerort.PlanError, zerort.ConfigError) as error:
            found[name] = str(error)
    return found


def zerort_ready() -> None:
    """Files are there on all ranks."""
    torch.distributed.barrier()


def test_files_are_read_by_name_each_rank_its_part(tmp_path: Path) -> None:
    for found in ranks.run(2, loaded, str(tmp_path)):
        assert found[""] == found["model.safetensors.index.json"] == []
        assert found["half"] == []
        assert (
            "table.weight has shape (30, 8) in the model and (3, 8)" in found["wrong.safetensors"]
        )
        assert "norm.weight is on the meta device" in found["short.safetensors"]
        assert "cannot be read" in found["none.safetensors"]


def test_slices_touch_no_more_than_their_rows(tmp_path: Path) -> None:
    from zerort.start.weights import Weights

    save_file(
        {"w": torch.arange(60.0).reshape(5, 3, 4), "s": torch.tensor(2.0)},
        tmp_path / "w.safetensors",
    )
    weights = Weights(str(tmp_path / "w.safetensors"))
    like = torch.empty(5, 3, 4, device="meta")
    for lo, hi in ((0, 0), (0, 60), (7, 8), (11, 37), (59, 60), (60, 60)):
        assert weights.flat("w", like, lo, hi).tolist() == list(range(lo, hi))
    assert weights.flat("s", torch.empty((), device="meta"), 0, 1).tolist() == [2.0]
