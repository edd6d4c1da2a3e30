"""Whatever stands at a key, `load` and `describe` answer with a configuration or a `ConfigError`
that has a path, in a bounded time; and what they let through builds.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zerort.cli import main
from zerort.config import describe, load
from zerort.config.keys import KEYS
from zerort.errors import ConfigError
from zerort.optim import build, schedules

LIMIT = 1.0
"""Seconds of CPU time for one reading; it takes milliseconds."""

itself: list[Any] = []
itself += [itself] * 10
deep: Any = 1
for _ in range(5000):
    deep = {"a": deep}

NUMBERS = [
    0, -0.0, 1, -1, 0.5, 5e-324, 1e-320, 1e-38, 1e30, 1e308, 2**31, 2**53 + 1, 2**63, 2**64,
    10**400, -(10**400), math.inf, -math.inf, math.nan, 10**5000,
]  # fmt: skip
OTHERS = [
    None, True, False, "", "auto", "AUTO", "2", "-1", "1e400", "nan", "Infinity", "\ud800", "a\0b",
    "9" * 5000, "x" * 100_000, "fp16", "none", [], {}, [[]], [math.nan], ["auto"],
    {"enabled": True}, {"enabled": math.nan}, {"a.b": 1}, {"": 1}, {1: 2}, {None: None},
    {"\ud800": 1}, {"x" * 5000: 1}, itself, deep,
    object(), torch.bfloat16, b"bytes", (1, 2), {1, 2},
]  # fmt: skip
VALUES = [*NUMBERS, *OTHERS]


def answered(config: Any) -> None:
    """The configuration or a `ConfigError` that can be printed anywhere, in time."""
    start = time.process_time()
    try:
        load(config)
    except ConfigError as error:
        assert len(str(error)) < 10_000
        str(error).encode()
    for row in describe(config):
        " ".join(row).encode()
    assert time.process_time() - start < LIMIT


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize("path", KEYS)
def test_every_key_answers_every_hostile_value(path: str) -> None:
    for value in VALUES:
        answered(nested(path, value))


PARAMETERS = ["optimizer.params.lr", "optimizer.params.betas", "scheduler.params.warmup_max_lr"]
PATHS = st.sampled_from([*KEYS, *PARAMETERS]) | st.text(max_size=30)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(NUMBERS[:-1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@given(st.dictionaries(PATHS, JSON, max_size=6))
@settings(max_examples=300)
def test_any_mixture_of_keys_and_values_is_answered(given: dict[str, Any]) -> None:
    config: dict[str, Any] = {}
    for path, value in given.items():
        section = config
        *parents, name = path.split(".")
        for parent in parents:
            inner = section.setdefault(parent, {})
            section = inner if isinstance(inner, dict) else {}
        section[name] = value
    answered(config)


@given(st.text(max_size=200) | JSON.map(lambda value: json.dumps(value, default=str)))
@settings(max_examples=200)
def test_any_text_of_a_file_is_answered(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        answered(str(path))
    except ConfigError as error:  # of `describe`, which raises where there is nothing to read
        str(error).encode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"train_batch_size": %s}' % ("9" * 5000), "train_batch_size: expected an integer, got"),
        ('{"optimizer": {"type": "SGD", "params": {"lr": [%s]}}}' % ("[" * 500 + "]" * 500),
         "optimizer.params: nested too deeply, or too many values"),
        ("{" + ", ".join(f'"key{i}": 1' for i in range(3000)) + "}", "and 2960 more"),
        ('{"zerort": {"trace": {"path": "\\ud800.json"}}}', "trace.path: expected text in Unicode"),
    ],
)  # fmt: skip
@pytest.mark.timeout(30)
def test_the_command_prints_one_clear_error(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert said in str(caught.value)
    status = main(["config", str(path)])
    shown = capsys.readouterr()
    assert status == (2 if shown.err else 1)
    assert "Traceback" not in shown.out + shown.err
    assert shown.err.count("\n") <= 1


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError, match="longer than"):
        load("/dev/zero")


# What optimizers and schedules are made with

RATES = {"WarmupLR": ("warmup_max_lr", "warmup_min_lr"), "OneCycle": ("cycle_max_lr",),
         "LRRangeTest": ("lr_range_test_min_lr", "lr_range_test_step_rate"),
         "WarmupDecayLR": ("warmup_max_lr",), "WarmupCosineLR": ("cos_min_ratio",)}  # fmt: skip
NEEDED = {
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2},
    "WarmupDecayLR": {"total_num_steps": 9},
    "WarmupCosineLR": {"total_num_steps": 9},
}


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "0.1", True])
@pytest.mark.parametrize(("name", "key"), [(n, key) for n, keys in RATES.items() for key in keys])
def test_a_rate_that_cannot_train_is_refused_by_the_schedule(
    name: str, key: str, value: Any
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ConfigError, match=f"scheduler.params.{key}: expected a number of at least"):
        schedules.build(name, {**NEEDED.get(name, {}), key: value}, optimizer)


TORCHS = [
    name for name in torch.optim.lr_scheduler.__all__ if "Swa" not in name and "SWA" not in name
]


@pytest.mark.parametrize("name", [*TORCHS, *RATES])
def test_no_schedule_ends_in_an_error_of_another_kind(name: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    for params in ({}, {"total_num_steps": "x"}, {"lr_lambda": "x"}, {"schedulers": [1]},
                   {"milestones": 3}, {"T_0": -1}, {"step_size": "x"}, {"gamma": "x"}):  # fmt: skip
        try:
            schedules.build(name, params, optimizer)
        except ConfigError as error:
            str(error).encode()


@pytest.mark.parametrize(
    "name", sorted(name for name, kind in vars(torch.optim).items() if isinstance(kind, type))
)
@pytest.mark.filterwarnings("ignore")
def test_no_optimizer_ends_in_an_error_of_another_kind(name: str) -> None:
    for options in ({}, {"lr": -1.0}, {"lr": "x"}, {"lr": [1]}, {"betas": 3}, {"nonsense": 1},
                    {"lr": 0.1, "fused": "x"}, {"lr": None}):  # fmt: skip
        try:
            model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            build(name, model.parameters(), options, model)
        except ConfigError as error:
            str(error).encode()
