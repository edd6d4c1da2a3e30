"""What may be given to a backward, and what it is multiplied by before it runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zerort.errors import StepError
from zerort.grads.tasks import LossScaling

__all__ = ["refuse_unfit", "scaled"]


def refuse_unfit(loss: Any) -> None:
    """Raises `StepError` for what is no tensor of one element with a graph."""
    if not isinstance(loss, Tensor):
        raise StepError(
            f"backward needs a loss, a tensor of one element, got {type(loss).__name__}"
        )
    if loss.numel() != 1:
        raise StepError(
            f"backward needs a loss of one element, a scalar tensor, got shape "
            f"{tuple(loss.shape)}: reduce it, for example with loss.mean()"
        )
    if not loss.requires_grad:
        raise StepError(
            "the loss has no graph (requires_grad is False): it was computed under no_grad or "
            "inference_mode, detached, or touches no trainable parameter"
        )


def scaled(loss: Tensor, scaling: LossScaling) -> Tensor:
    """`loss` over the accumulation steps, times the loss scale; in fp32 where there is one, as fp16
    would overflow.
    """
    if scaling.steps is not None and scaling.steps > 1:
        loss = loss / scaling.steps
    return loss if scaling.scale == 1.0 else loss.float() * scaling.scale
