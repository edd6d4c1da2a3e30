"""The engine's configuration: what the user gave, completed by what Lightning was told.

What is said in both places has to agree. Windows are Lightning's (`accumulate_grad_batches`, or the
loop of Fabric's user), so the engine has one micro-batch a step; the loss arrives divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zerort.config import load
from zerort.config.reading import ConfigLike, read
from zerort.config.zero import Zero
from zerort.errors import ConfigError

__all__ = ["Given", "completed", "stage_of"]

Given = ConfigLike | None
"""A dict, a path to JSON, base64 JSON, or nothing."""

_PRECISIONS: Mapping[str, dict[str, Any]] = {
    "32-true": {},
    "bf16-true": {"bf16": {"enabled": True}},
    "16-true": {"fp16": {"enabled": True}},
    "bf16-mixed": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "16-mixed": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
}
_SECTIONS = ("bf16", "fp16", "torch_autocast", "amp")
_DEFAULT_STAGE = 2


def stage_of(config: Given, stage: int | None) -> tuple[dict[str, Any], Zero]:
    """A configuration's data with the stage in it, and what that stands for: `stage`, else the
    configuration's, else 2.

    Raises `ConfigError` for a configuration that cannot be read and one of another stage.
    """
    data = {} if config is None else _known(read(config).data)
    zero = data.get("zero_optimization") or {}
    given = zero.get("stage")
    if stage is not None and given not in (None, stage):
        raise ConfigError(
            f"stage={stage}, and the configuration has zero_optimization.stage {given}: give one"
        )
    if given is None:
        given = _DEFAULT_STAGE if stage is None else stage
    data["zero_optimization"] = {**zero, "stage": given}
    # a mistake is named where the strategy is made, before ranks start
    return data, load(_sized(data)).zero_optimization


def _known(data: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is "auto", which is for Lightning and the defaults to say."""
    return {
        key: _known(value) if isinstance(value, Mapping) else value
        for key, value in data.items()
        if value != "auto"
    }


def completed(data: Mapping[str, Any], precision: str, clip: float | None) -> dict[str, Any]:
    """What `initialize` gets; `clip` is the norm that Lightning was told to clip to.

    Raises `ConfigError` where the configuration says otherwise than Lightning.
    """
    found = _sized(data)
    found["gradient_clipping"] = _clipping(data.get("gradient_clipping"), clip)
    for name, section in _casts(data, precision).items():
        found[name] = {**(data.get(name) or {}), **section}
    return found


def _sized(data: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(data)
    steps = found.pop("gradient_accumulation_steps", 1)
    if steps != 1:
        raise ConfigError(
            f"gradient_accumulation_steps: windows are Lightning's, got {steps}: leave the key out "
            "and give accumulate_grad_batches to the Trainer"
        )
    if "train_batch_size" not in found:
        # it is for reports alone: the engine makes no loader
        found.setdefault("train_micro_batch_size_per_gpu", 1)
    return found


def _clipping(configured: Any, clip: float | None) -> float:
    if configured is None:
        return float(clip or 0.0)
    if clip is not None and clip != configured:
        raise ConfigError(
            f"gradient_clip_val={clip}, and the configuration has gradient_clipping {configured}: "
            "give one"
        )
    return float(configured)


def _casts(data: Mapping[str, Any], precision: str) -> dict[str, dict[str, Any]]:
    """The sections that `precision` asks for."""
    if precision not in _PRECISIONS:
        raise ConfigError(
            f"precision={precision!r} is not supported: give one of {', '.join(_PRECISIONS)}"
        )
    wanted = _PRECISIONS[precision]
    for name in _SECTIONS:
        section = data.get(name) or {}
        if section.get("enabled") is True and name not in wanted:
            raise ConfigError(
                f"precision={precision!r}, and the configuration enables {name}: leave the section "
                "out and say it to Lightning"
            )
    if "torch_autocast" not in wanted:
        return {name: dict(section) for name, section in wanted.items()}
    # Gradients are fp32 under Lightning's autocast; DeepSpeed's default sends most in 16 bits.
    wires = data.get("communication_data_type"), (data.get("zerort") or {}).get("wire")
    wide: dict[str, Any] = {} if any(wires) else {"lower_precision_safe_modules": []}
    return {name: {**wide, **(data.get(name) or {}), **section} for name, section in wanted.items()}
