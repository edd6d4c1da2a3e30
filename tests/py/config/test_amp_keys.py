"""`amp`: what Apex's keys are read as, and how a value that no level has is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zerort.config import load
from zerort.config.amp import LEVELS
from zerort.errors import ConfigError


def refusal(**keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load({"amp": {"enabled": True, **keys}})
    return str(caught.value)


OWN = [
    (name, key, getattr(level, key))
    for name, level in LEVELS.items()
    for key in (
        "cast_model_type",
        "patch_torch_functions",
        "keep_batchnorm_fp32",
        "master_weights",
        "cast_model_outputs",
    )
]


@pytest.mark.parametrize(("level", "key", "value"), OWN)
def test_a_key_may_say_what_its_level_says_and_nothing_else(
    level: str, key: str, value: Any
) -> None:
    for given in (value, None):
        load({"amp": {"enabled": True, "opt_level": level, key: given}})
    if key == "keep_batchnorm_fp32" and LEVELS[level].casts:
        return  # it acts
    if key in ("cast_model_type", "cast_model_outputs"):
        other: Any = "bf16" if value == "fp16" else "fp16"
    else:
        other = value is not True
    message = refusal(opt_level=level, **{key: other})
    assert message.startswith(f"configuration: amp.{key}: expected ")
    assert f"which opt_level {level} stands for, got " in message


@pytest.mark.parametrize("spelt", ["torch.float16", "float16", "half", torch.float16])
def test_a_dtype_may_be_spelt_as_torch_spells_it(spelt: Any) -> None:
    load({"amp": {"enabled": True, "opt_level": "O2", "cast_model_type": spelt}})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("opt_level", "O3", "refused: O3 steps on fp16 weights without fp32 masters"),
        ("opt_level", "02", "expected one of O0, O1, O2, O4, O5 (the letter O, not zero), got"),
        ("opt_level", 2, "expected a string, got 2"),
        ("loss_scale", "dynamical", "expected 'dynamic' or a number, got"),
        ("loss_scale", 0, "expected 'dynamic' or a number of at least 1e-30, got 0"),
        ("max_loss_scale", -1, "expected a number of at least 1e-30, got -1"),
        ("min_loss_scale", 2**20, "min_loss_scale is 1.04858e+06, above the scale that the first"),
        ("keep_batchnorm_fp32", "yes", "expected true or false, got"),
        ("master_weights", 1, "expected null, which opt_level O1 stands for, got 1"),
        ("num_losses", 2, "refused: one loss scale serves all losses"),
        ("opt_levle", "O1", "unknown key; did you mean"),
    ],
)
def test_a_wrong_value_is_told_by_its_path(key: str, value: Any, said: str) -> None:
    assert refusal(**{key: value}).startswith(f"configuration: amp.{key}: {said}")


def test_a_minimum_above_the_maximum_is_refused() -> None:
    assert "amp.min_loss_scale: min_loss_scale is 4, above" in refusal(
        max_loss_scale=2, min_loss_scale=4
    )


@pytest.mark.parametrize("section", [{}, {"enabled": False}, {"opt_level": "O2"}])
def test_a_section_that_is_not_enabled_asks_for_nothing(section: dict[str, Any]) -> None:
    wrong = {"master_weights": False, "min_loss_scale": 2**20}
    config = load({"amp": {**wrong, **section}, "fp16": {"enabled": True}})
    assert (config.compute_dtype, config.keeps_norms) == ("fp16", False)


@pytest.mark.parametrize(
    ("keys", "dtype", "keeps", "scale"),
    [
        ({"opt_level": "O0"}, "fp32", False, 1.0),
        ({}, "fp32", False, "dynamic"),
        ({"loss_scale": "128.0"}, "fp32", False, 128.0),
        ({"opt_level": "O2"}, "fp16", True, "dynamic"),
        ({"opt_level": "O2", "keep_batchnorm_fp32": "False"}, "fp16", False, "dynamic"),
        ({"opt_level": "O2", "loss_scale": 64}, "fp16", True, 64.0),
        ({"opt_level": "O4"}, "fp32", False, 1.0),
        ({"opt_level": "O5", "loss_scale": "dynamic"}, "bf16", True, "dynamic"),
    ],
)
def test_what_the_keys_mean_together(
    keys: dict[str, Any], dtype: str, keeps: bool, scale: object
) -> None:
    config = load({"amp": {"enabled": True, **keys}})
    assert (config.compute_dtype, config.keeps_norms, config.amp.scale) == (dtype, keeps, scale)


def test_the_first_scale_is_not_above_the_maximum() -> None:
    assert load({"amp": {"enabled": True}}).amp.initial_scale == 65536.0
    assert load({"amp": {"enabled": True, "max_loss_scale": "1024"}}).amp.initial_scale == 1024.0
