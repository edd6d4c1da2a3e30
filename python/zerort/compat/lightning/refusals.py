"""What an engine cannot do for a Trainer, by name, before a fit begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from zerort.compat.lightning.packages import pytorch
from zerort.errors import ConfigError

__all__ = ["SEVERAL", "only_optimizer", "refuse_clipping"]

_rank_zero = pytorch("utilities.rank_zero")
_is_overridden = pytorch("utilities.model_helpers").is_overridden
_LightningModule = pytorch("core").LightningModule
_MockOptimizer = pytorch("core.optimizer")._MockOptimizer


SEVERAL = (
    "an engine has one optimizer, which steps them all: give it zerort.optim.Chain([first, "
    "second]), one torch.optim.Optimizer made of both, and make schedulers over that"
)
"""What to do with optimizers that are to step together."""


def refuse_clipping(trainer: Any) -> None:
    """Raises `ConfigError` for clipping by value; warns where a hook would clip by itself."""
    if str(getattr(trainer.gradient_clip_algorithm, "value", None)) == "value":
        raise ConfigError(
            'gradient_clip_algorithm="value": gradients are in shards, and are clipped by '
            'their norm alone; leave it out, or give "norm"'
        )
    if _is_overridden("configure_gradient_clipping", trainer.lightning_module, _LightningModule):
        _rank_zero.rank_zero_warn(
            "configure_gradient_clipping is called, but gradients are in shards there: the "
            "engine clips in its step, to the Trainer's gradient_clip_val"
        )


def only_optimizer(optimizers: Iterable[Any], settings: Mapping[str, Any]) -> Any:
    """The one of `configure_optimizers`; None where the configuration has one. Raises `ConfigError`
    unless there is just one, of a kind that steps once.
    """
    found = [each for each in optimizers if not isinstance(each, _MockOptimizer)]
    if "optimizer" in settings:
        if found:
            raise ConfigError(
                "configure_optimizers returns an optimizer, and the configuration has one: give one"
            )
        return None
    if len(found) != 1:
        raise ConfigError(
            f"configure_optimizers returns {len(found)} optimizers, and {SEVERAL}; what steps one "
            "and not the other, as a GAN does, needs another strategy"
        )
    if isinstance(found[0], torch.optim.LBFGS):
        raise ConfigError(
            "configure_optimizers returns LBFGS, which calls its closure several times a step: "
            "use another strategy"
        )
    return found[0]
