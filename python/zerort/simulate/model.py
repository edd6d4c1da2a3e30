"""A subject that nobody has run: a model on the meta device, and a rate of computing.

A token costs 2 operations a parameter in the forward and 4 in the backward (Kaplan et al. 2020);
what attention adds with the length of the text is left out.
"""

from __future__ import annotations

from torch import nn

from zerort.errors import ConfigError
from zerort.forecast import made_by
from zerort.simulate.subject import Dtype, Subject, evenly

__all__ = ["of_model"]

_FORWARD, _BACKWARD = 2, 4
_MEMORY = 4e12
"""Bytes a second that an update reads and writes where nothing was measured: an H200's."""
_ADAM = 28
"""Bytes of an element's update, in one pass over parameter, gradient, master and moments."""


def of_model(
    name: str, dtype: Dtype, *, tokens: int, flops: float, stage: int, micro_batches: int
) -> Subject:
    """Of MODULE:FACTORY, with `tokens` a rank and micro-batch at `flops` operations a second.

    Raises `ConfigError` for a model that cannot be made, or has nothing to train.
    """
    model = made_by(name)
    numels = _trained(model)
    if not numels:
        raise ConfigError(f"--model {name}: no parameter of it requires grad")
    operations = sum(numels) * tokens / flops * 1e9
    backward = round(_BACKWARD * operations)
    return Subject(
        name,
        numels,
        [dtype] * len(numels),
        evenly(numels, backward),
        round(_FORWARD * operations),
        backward,
        micro_batches=micro_batches,
        update_element_ns=_ADAM / _MEMORY * 1e9,
        stage=stage,
        notes=(
            f"compute: {_FORWARD} and {_BACKWARD} operations a parameter and token, "
            f"{tokens:,} tokens, {flops / 1e12:,.0f} TFLOP/s; nothing of it was measured",
        ),
    )


def _trained(model: nn.Module) -> list[int]:
    return [p.numel() for p in model.parameters() if p.requires_grad]
