"""torch.compile: a compiled module trains like the plain one, to the bit, and a compiled whole is
told to be so.

The backends here capture graphs and run torch's own kernels, so that a difference can only be the
engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from catching import assert_told, caught
from logged import log_lines
from models import VOCABULARY, TinyGPT, mlp
from training import SMALL_BUCKET, keep
from zerort.errors import ConfigError

BACKEND = "aot_eager"
STEPS = 3
ADVICE = "compiled whole"

Compile = Callable[[nn.Module], nn.Module]
"""From a module to what is given to `initialize`."""


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend=BACKEND)


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend=BACKEND)
    return model


def block_by_block(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        layer.compile(backend=BACKEND)
    return model


def used_before(model: nn.Module) -> nn.Module:
    """Compiled for memory that `initialize` is about to replace."""
    model = torch.compile(model, backend=BACKEND)
    model(torch.zeros(2, 12, dtype=torch.int64)).backward()
    model.zero_grad()
    return model


def checkpointed_blocks(model: nn.Module) -> nn.Module:
    """Compiled blocks that are recomputed in the backward."""
    for layer in model.layers:
        layer.compile(backend=BACKEND)
        plain = layer.forward
        layer.forward = lambda x, plain=plain: torch.utils.checkpoint.checkpoint(
            plain, x, use_reentrant=False
        )
    return model


WAYS = [wrapped, in_place, block_by_block, used_before, checkpointed_blocks]


def engine_over(model: nn.Module, stage: int = 0, gas: int = 1, **more: Any) -> Any:
    return zerort.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": gas,
            "gradient_clipping": 0.5,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {"stage": stage, "reduce_bucket_size": SMALL_BUCKET},
            **more,
        },
    )[0]


def _trained(
    rank: int, stage: int, gas: int, way: Compile, act: Callable[[Any], Any] | None = None
) -> Tensor:
    """All weights after a few steps on this rank's data."""
    torch.manual_seed(0)
    engine = engine_over(way(TinyGPT()), stage, gas)
    if act is not None:
        act(engine)
    data = torch.Generator().manual_seed(rank + 1)
    for _ in range(STEPS * gas):
        engine.backward(engine(torch.randint(VOCABULARY, (2, 12), generator=data)))
        engine.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in engine.module.parameters()])
    keep(engine)
    return weights


def _compile_engine(engine: Any) -> None:
    engine.compile(backend=BACKEND)


EVERY_WAY = [
    *((way.__name__, way, None) for way in WAYS),
    ("engine.compile", as_it_is, _compile_engine),
]
Setting = tuple[int, int]
SETTINGS: list[Setting] = [(0, 1), (2, 3)]
MORE_SETTINGS: list[Setting] = [(0, 3), (1, 1), (1, 3), (2, 1)]
"""Stages and accumulation steps."""


def compare_with_plain(rank: int, world: int, settings: list[Setting]) -> list[tuple[Setting, str]]:
    """Where which way ends in other weights than the plain module.

    Each way captures its graphs once, at a setting of its own, and all other settings run them.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # nothing falls back to no graph at all
    plain = {setting: _trained(rank, *setting, as_it_is) for setting in settings}
    wrong = []
    for turn, (name, way, act) in enumerate(EVERY_WAY):
        torch._dynamo.reset()
        first = turn % len(settings)
        for setting in settings[first:] + settings[:first]:
            if not torch.equal(_trained(rank, *setting, way, act), plain[setting]):
                wrong.append((setting, name))
    return wrong


@ranks.once(maxsize=None)
def compared_with_plain(*settings: Setting) -> list[list[tuple[Setting, str]]]:
    return ranks.run(2, compare_with_plain, list(settings), timeout=170.0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_compiled_module_trains_like_the_plain_one_to_the_bit(setting: Setting) -> None:
    for wrong in compared_with_plain(*SETTINGS):
        assert [way for where, way in wrong if where == setting] == []


@pytest.mark.slow
@pytest.mark.parametrize("setting", MORE_SETTINGS)
def test_so_does_one_at_other_settings(setting: Setting) -> None:
    for wrong in compared_with_plain(*MORE_SETTINGS):
        assert [way for where, way in wrong if where == setting] == []


def load_into_the_module_inside_a_wrapper(rank: int, world: int) -> tuple[float, float]:
    """Weights after a load through the wrapped module, and after a step that changes nothing."""
    inside = mlp()
    engine = engine_over(torch.compile(inside, backend=BACKEND), bf16={"enabled": True})
    inside.load_state_dict(
        {name: torch.full_like(value, 3.0) for name, value in inside.state_dict().items()}
    )
    engine.optimizer.param_groups[0]["lr"] = 0.0
    engine.backward(engine(torch.ones(2, 8, dtype=torch.bfloat16)).sum())
    engine.step()
    return inside[0].weight.min().item(), inside[0].weight.max().item()


def test_what_is_loaded_into_the_module_inside_the_wrapper_reaches_the_masters() -> None:
    assert ranks.run(1, load_into_the_module_inside_a_wrapper) == [(3.0, 3.0)]


def _lines(rank: int, world: int, way: Compile, times: int) -> list[str]:
    lines = log_lines()
    engine = engine_over(way(TinyGPT()))
    for _ in range(times):
        engine.compile(backend=BACKEND)
    return lines


@pytest.mark.parametrize(
    ("way", "times"), [(wrapped, 0), (in_place, 0), (as_it_is, 1), (as_it_is, 2), (in_place, 1)]
)
def test_a_module_compiled_whole_is_told_once_by_rank_0(way: Compile, times: int) -> None:
    first, second = ranks.run(2, _lines, way, times)
    assert second == []
    assert sum(ADVICE in line for line in first) == 1


@pytest.mark.parametrize("way", [as_it_is, block_by_block])
def test_a_module_with_compiled_blocks_is_as_it_should_be(way: Compile) -> None:
    (lines,) = ranks.run(1, _lines, way, 0)
    assert not any(ADVICE in line for line in lines)


def _refused(rank: int, world: int, options: dict[str, Any]) -> tuple[Exception | None, bool]:
    engine = engine_over(mlp())
    return caught(lambda: engine.compile(**options)), engine.is_compiled


@pytest.mark.parametrize("options", [{"schedule": []}])
def test_what_compile_cannot_do_is_refused_by_name(options: dict[str, Any]) -> None:
    ((error, compiled),) = ranks.run(1, _refused, options)
    assert_told(error, ConfigError, next(iter(options)))
    assert not compiled


def _with_options(rank: int, world: int) -> tuple[bool, bool]:
    engine = engine_over(mlp())
    before = engine.is_compiled
    engine.compile("eager", {"backend": "no such backend", "dynamic": False})
    engine(torch.ones(2, 8))
    return before, engine.is_compiled


def test_compile_takes_torch_compiles_options_and_its_own_backend_wins() -> None:
    assert ranks.run(1, _with_options) == [(False, True)]
