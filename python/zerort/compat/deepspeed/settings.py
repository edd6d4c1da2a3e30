"""DeepSpeed's readers of single keys and sections of a configuration.

A section is zerort's own, read as a file's is; what is not the same section here, above all
`zero_optimization`, has no answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zerort.config import Config
from zerort.config.precision import Bf16, Fp16

__all__ = [
    "DEFAULTS",
    "PRECISIONS",
    "get_bfloat16_config",
    "get_float16_config",
    "get_gradient_clipping",
    "get_log_level",
]

DEFAULTS = {
    "GRADIENT_CLIPPING_DEFAULT": Config.model_fields["gradient_clipping"].default,
    "LOG_LEVEL_DEFAULT": Config.model_fields["log_level"].default,
}
"""Of `deepspeed.runtime.constants`."""

PRECISIONS = {"DeepSpeedBF16Config": Bf16, "DeepSpeedFP16Config": Fp16}
"""Of `deepspeed.runtime.precision_config`."""


def get_gradient_clipping(param_dict: Mapping[str, Any]) -> float:
    """The key `gradient_clipping`, or its default."""
    return float(param_dict.get("gradient_clipping", DEFAULTS["GRADIENT_CLIPPING_DEFAULT"]))


def get_log_level(param_dict: Mapping[str, Any]) -> str | None:
    """The key `log_level`, or None."""
    return param_dict.get("log_level")


def get_bfloat16_config(param_dict: Mapping[str, Any]) -> Bf16:
    """The section `bf16`, or `bfloat16`. Raises pydantic's `ValidationError`."""
    return Bf16(**(param_dict.get("bf16") or param_dict.get("bfloat16") or {}))


def get_float16_config(param_dict: Mapping[str, Any]) -> Fp16:
    """The section `fp16`. Raises pydantic's `ValidationError`."""
    return Fp16(**(param_dict.get("fp16") or {}))
