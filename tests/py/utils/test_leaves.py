"""Leaf modules are marked by class, name and configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import routes
import zerort
from logged import log_lines
from training import keep
from zerort import utils


class Expert(nn.Linear):
    pass


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 4), nn.ModuleDict({"one": Expert(4, 4), "two": Expert(4, 4)})["one"]
    )


def names(whole: nn.Module) -> list[str]:
    marked = utils.get_z3_leaf_modules(whole)
    return [name for name, module in whole.named_modules() if any(module is m for m in marked)]


@pytest.mark.parametrize("kind", [Expert, "Expert", f"{__name__}.Expert"])
def test_a_class_is_given_as_itself_or_by_name(kind: Any) -> None:
    whole = model()
    assert utils.set_z3_leaf_modules(whole, [kind]) == [whole[1]]
    assert utils.z3_leaf_module(whole[1]) and not utils.z3_leaf_module(whole[0])
    assert names(whole) == ["1"]
    assert utils.unset_z3_leaf_modules(whole, [kind]) == [whole[1]]
    assert names(whole) == []


def test_names_and_their_ends_are_found_or_named() -> None:
    whole = nn.ModuleDict({"a": nn.ModuleDict({"mlp": nn.Linear(2, 2)}), "b": nn.Linear(2, 2)})
    assert utils.set_z3_leaf_modules_by_name(whole, ["b"]) == ([whole["b"]], [])
    found, missing = utils.set_z3_leaf_modules_by_suffix(
        whole, [".mlp", ".none"], raise_if_not_found=False
    )
    assert (found, missing) == ([whole["a"]["mlp"]], [".none"])
    assert names(whole) == ["a.mlp", "b"]
    with pytest.raises(zerort.ConfigError, match="is called c"):
        utils.set_z3_leaf_modules_by_name(whole, ["c"])
    with pytest.raises(zerort.ConfigError, match="is of the classes Conv2d, Gate"):
        utils.set_z3_leaf_modules(whole, [nn.Conv2d, "Gate"])
    with pytest.raises(ValueError, match="Gate"):  # DeepSpeed's class of error
        utils.set_z3_leaf_modules(whole, ["Gate"])


def test_the_configuration_marks_and_says_what_it_has_not_found() -> None:
    lines, whole = log_lines(), model()
    leaves = {"classes": ["Expert"], "names": ["0", "9"]}
    engine, *_ = zerort.initialize(
        model=whole,
        optimizer=torch.optim.SGD(whole.parameters(), lr=0.1),
        config={
            "train_batch_size": 1,
            "zero_optimization": {"stage": 3, "leaf_module": leaves},
        },
    )
    keep(engine)
    assert names(whole) == ["0", "1"]
    assert any("leaf_module: no module of the model is 9" in line for line in lines)


class Experts(nn.Module):
    """Each call takes another expert, on each rank its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(routes.Block() for _ in range(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        rank = torch.distributed.get_rank()
        self.calls += 1
        return self.experts[(self.calls + rank) % 4](x)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts, self.last = routes.Block(), Experts(), routes.Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(self.first(x)))


def mixed(rank: int, world: int) -> dict[str, Any]:
    off: list[bool] = []

    def mark(whole: nn.Module) -> object:
        return utils.set_z3_leaf_modules(whole, [Experts])

    def between(engine: Any, step: int) -> None:
        off.append(engine._parts.passes.gatherer.went_off)

    engine = routes.train(rank, Mixed, steps=5, between=between, prepare=mark)
    experts = engine.module.experts
    return {
        "off": off[2:],
        "hooks": [len(m._forward_hooks) for m in experts.modules() if m is not experts],
        "own": len(experts._forward_hooks),
    }


def test_a_leaf_module_is_one_stop_whichever_of_its_modules_run() -> None:
    for found in ranks.run(2, mixed):
        assert not any(found["off"])
        assert not any(found["hooks"]) and found["own"]
