"""DeepSpeed's activation checkpointing over torch's: the same gradients, the same random numbers,
and what is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from training import at_stage, keep
from zerort import checkpointing
from zerort.errors import ConfigError

pytestmark = pytest.mark.timeout(120)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: Tensor, *, plus: Tensor | None = None) -> Tensor:
        self.calls += 1
        y = self.drop(torch.tanh(self.line(x)))
        return y if plus is None else y + plus


def run(call: Callable[..., Any]) -> tuple[list[Tensor], int]:
    """Gradients of the input, of a keyword and of the weights; how often the block ran."""
    torch.manual_seed(3)
    block = Block()
    x, plus = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    torch.manual_seed(5)
    call(block, x, plus=plus).square().sum().backward()
    return [t.grad for t in (x, plus, *block.parameters()) if t.grad is not None], block.calls


@pytest.mark.parametrize("call", [checkpointing.checkpoint, checkpointing.non_reentrant_checkpoint])
def test_a_checkpointed_function_runs_twice_and_gives_the_same_gradients(
    call: Callable[..., Any],
) -> None:
    plain, once = run(lambda block, x, plus: block(x, plus=plus))
    checkpointed, twice = run(call)
    assert (once, twice) == (1, 2) and len(plain) == 4
    for mine, theirs in zip(checkpointed, plain, strict=True):
        assert torch.equal(mine, theirs)


def test_outputs_are_the_functions_own() -> None:
    x = torch.ones(2, requires_grad=True)
    single = checkpointing.checkpoint(lambda x: 2 * x, x)
    pair = checkpointing.checkpoint(lambda x, y: (x + y, x - y), x, x)
    assert isinstance(single, Tensor) and isinstance(pair, tuple) and len(pair) == 2


def test_what_is_saved_may_go_to_the_host_as_the_refusal_says() -> None:
    with torch.autograd.graph.save_on_cpu():
        moved, calls = run(checkpointing.checkpoint)
    plain, _ = run(checkpointing.checkpoint)
    assert calls == 2 and all(map(torch.equal, moved, plain))


def test_configure_is_noted_and_what_it_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    assert not checkpointing.is_configured()
    for asked, words in (
        ({"partition_activations": True}, "partition_activations"),
        ({"contiguous_checkpointing": True}, "contiguous_checkpointing"),
        ({"checkpoint_in_cpu": True}, "save_on_cpu"),
    ):
        with pytest.raises(ConfigError, match=words):
            checkpointing.configure(None, **asked)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"activation_checkpointing\.cpu_checkpointing"):
        checkpointing.configure(None, {"activation_checkpointing": {"cpu_checkpointing": True}})
    with pytest.raises(ConfigError, match="partition_activations"):
        checkpointing.partition_activations_in_checkpoint(True)
    assert not checkpointing.is_configured()
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": "auto", "activation_checkpointing": {"profile": true}}')
    checkpointing.configure(None, str(file), False, False, 3, False, True, True)
    checkpointing.set_num_layers(4)
    checkpointing.reset()
    assert checkpointing.is_configured()


@pytest.mark.parametrize(
    "key", ["partition_activations", "contiguous_memory_optimization", "cpu_checkpointing"]
)
def test_a_configuration_that_asks_for_more_than_torchs_is_refused(key: str) -> None:
    config: dict[str, Any] = {"train_batch_size": 1}
    zerort.config.load({**config, "activation_checkpointing": {key: False}})
    with pytest.raises(ConfigError, match=rf"activation_checkpointing\.{key}: refused"):
        zerort.config.load({**config, "activation_checkpointing": {key: True}})


def test_what_changes_no_result_is_listed_as_without_effect() -> None:
    section = {
        "number_checkpoints": 4,
        "synchronize_checkpoint_boundary": True,
        "profile": True,
    }
    loaded = zerort.config.load({"train_batch_size": 1, "activation_checkpointing": section})
    assert set(loaded.ignored) == {f"activation_checkpointing.{name}" for name in section}
    with pytest.raises(ConfigError, match=r"activation_checkpointing\.profiel"):
        zerort.config.load({"train_batch_size": 1, "activation_checkpointing": {"profiel": True}})


class Stack(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = torch.tanh(self.call(block, x))
        return x.square().mean()


def _plain(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def trained(rank: int, world: int, stage: int) -> list[list[Tensor]]:
    found = []
    for call in (_plain, checkpointing.checkpoint, checkpointing.non_reentrant_checkpoint):
        model = Stack(call)
        config = {"train_micro_batch_size_per_gpu": 1, **at_stage(stage)}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = zerort.initialize(model=model, optimizer=optimizer, config=config)[0]
        keep(engine)
        torch.manual_seed(rank)
        for _ in range(3):
            engine.backward(engine(torch.randn(2, 6)))
            engine.step()
        with zerort.zero.GatheredParameters(list(model.parameters())):
            found.append([p.detach().clone() for p in model.parameters()])
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpointed_model_trains_to_the_same_weights(stage: int) -> None:
    for plain, reentrant, other in ranks.run(2, trained, stage):
        for a, b, c in zip(plain, reentrant, other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(c, a, rtol=1e-6, atol=1e-7)
