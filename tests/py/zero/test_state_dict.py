"""A sharded model's weights as files, as a state dict, and as objects."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ranks
import zerort
from logged import log_lines
from training import keep
from zerort.zero import GatheredParameters


class Net(nn.Module):
    """Tied, with small parameters that stay whole, a frozen one outside the optimizer, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.middle = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.frozen = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("count", torch.tensor(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(self.middle(self.table(x))))


def settings(stage: int, gathers: bool = True) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 150,
            "stage3_param_persistence_threshold": 16,
            "stage3_gather_16bit_weights_on_model_save": gathers,
        },
    }


def trained(rank: int, stage: int, **more: Any) -> Any:
    torch.manual_seed(2)
    model = Net()
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = zerort.initialize(
        model=model, optimizer=torch.optim.AdamW(trainable, lr=0.1), config=settings(stage, **more)
    )
    keep(engine)
    for step in range(2):
        engine.backward(engine(torch.arange(4) + rank + step).float().square().mean())
        engine.step()
    return engine


def saved(rank: int, world: int, folder: str) -> dict[str, Any]:
    whole, engine = trained(rank, 2), trained(rank, 3)
    found: dict[str, Any] = {"asks": engine.zero_gather_16bit_weights_on_model_save()}
    for name in ("w.safetensors", "w.bin"):
        found[name] = engine.save_16bit_model(folder, name)
    engine.save_16bit_model(folder, "trained.bin", exclude_frozen_parameters=True)
    other = trained(rank, 3, gathers=False)
    found["not gathered"] = other.save_16bit_model(folder, "none.bin")
    want = whole.module.state_dict()
    weights = engine._zero3_consolidated_16bit_state_dict()
    found["there"] = weights is not None
    if weights is not None:
        found["keys"] = weights.keys() == want.keys()
        found["tied"] = weights["head.weight"] is weights["table.weight"]
        found["differ"] = [n for n in want if not torch.equal(weights[n], want[n])]
        found["plain"] = {type(t) for t in weights.values()}
        stored = {
            "w.bin": torch.load(Path(folder) / "w.bin"),
            "w.safetensors": load_file(Path(folder) / "w.safetensors"),
        }
        found["stored"] = [
            (file, n)
            for file, held in stored.items()
            for n in held
            if not torch.equal(held[n], want[n])
        ]
        found["names"] = set(want) - set(stored["w.safetensors"]), set(want) - set(stored["w.bin"])
        less = torch.load(Path(folder) / "trained.bin")
        found["left out"] = set(want) - set(less)
    try:
        whole._zero3_consolidated_16bit_state_dict()
    except zerort.ConfigError as error:
        found["below"] = str(error)
    engine.backward(engine(torch.arange(4)).float().square().mean())
    engine.step()  # it goes on
    return found


def test_16_bit_weights_are_those_of_stage_2_on_rank_0(tmp_path: Path) -> None:
    first, other = ranks.run(2, saved, str(tmp_path))
    for found in (first, other):
        assert found["asks"] and found["w.bin"] and found["w.safetensors"]
        assert found["not gathered"] is False
        assert "is of stage 3" in found["below"]
    assert first["there"] and not other["there"]
    assert first["keys"] and first["tied"]
    assert first["differ"] == first["stored"] == []
    assert first["plain"] == {Tensor}
    assert first["names"] == ({"head.weight"}, set())
    assert first["left out"] == {"frozen.weight", "frozen.bias"}
    assert not (tmp_path / "none.bin").exists()


def used(rank: int, world: int) -> dict[str, Any]:
    engine = trained(rank, 3)
    model = engine.module
    found: dict[str, Any] = {}
    lines = log_lines()
    found["devices"] = {n: t.device.type for n, t in model.state_dict().items()}
    model.state_dict()
    found["said"] = sum("state_dict() holds tensors on the meta device" in line for line in lines)
    weight = model.middle[0].weight
    for name, call in {
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.dumps(weight),
        "numpy": weight.numpy,
        "load": lambda: model.load_state_dict(Net().state_dict()),
    }.items():
        try:
            call()
        except (zerort.StepError, RuntimeError) as error:
            found[name] = str(error)
    everything = list(model.parameters())
    with GatheredParameters(everything[::-1] if rank else everything, modifier_rank=0):
        found["clones"] = {t.device.type for t in model.state_dict().values()}
        if rank == 0:
            model.load_state_dict({n: t * 0 + 3 for n, t in Net().state_dict().items()})
    with GatheredParameters(list(model.parameters())):
        found["loaded"] = {n: p.float().unique().tolist() for n, p in model.named_parameters()}
    masters = [zerort.utils.safe_get_full_fp32_param(p) for p in model.parameters()]
    with GatheredParameters([weight]):
        alias, part = model.state_dict()["middle.0.weight"], weight.data[1:3]
        weight_there = weight.detach().clone()
    engine.eval()
    with torch.no_grad():
        engine(torch.arange(4))  # memory comes and goes
    found["kept"] = torch.equal(alias, weight_there) and torch.equal(part, weight_there[1:3])
    found["masters"] = [None if m is None else m.unique().tolist() for m in masters]
    return found


@ranks.once(None)
def used_once() -> list[dict[str, Any]]:
    return ranks.run(2, used)


def test_a_state_dict_holds_meta_tensors_and_says_so_once() -> None:
    for found in used_once():
        assert found["said"] == 1
        meta = {n for n, device in found["devices"].items() if device == "meta"}
        large = ("table", "head", "middle.0", "middle.2", "frozen")
        assert {f"{name}.weight" for name in large} == meta
        assert found["clones"] == {"cpu"}


def test_values_are_loaded_where_all_ranks_have_them() -> None:
    for found in used_once():
        assert set(map(tuple, found["loaded"].values())) == {(3.0,)}
        assert found["masters"] == [None if "frozen" in name else [3.0] for name in found["loaded"]]
        assert "modifier_rank=0" in found["load"] and "table.weight" in found["load"]


def test_an_alias_that_was_taken_while_values_were_there_keeps_them() -> None:
    assert all(found["kept"] for found in used_once())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "numpy"])
def test_what_would_hand_out_memory_is_refused_by_name(how: str) -> None:
    for found in used_once():
        assert "is sharded, and" in found[how]
        assert "GatheredParameters" in found[how]
        assert "table.weight" in found[how] or "middle.0.weight" in found[how]
