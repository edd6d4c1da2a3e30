"""`deepspeed.moe.utils`, for models without experts: there is no MoE layer here, and a parameter
that says it is an expert's is one all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = [
    "has_moe_layers",
    "is_moe_param",
    "is_moe_param_group",
    "split_params_into_different_moe_groups_for_optimizer",
    "split_params_into_shared_and_expert_params",
]


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Whether a module has MoE layers of DeepSpeed's, and how many experts: none."""
    return False, 0


def is_moe_param(param: Tensor) -> bool:
    """Whether a parameter is an expert's, by its attribute `allreduce`."""
    return not getattr(param, "allreduce", True)


def is_moe_param_group(param_group: Mapping[str, Any]) -> bool:
    """Whether a group is of experts' parameters."""
    return bool(param_group.get("moe", False))


def split_params_into_shared_and_expert_params(
    params: Iterable[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Those of no expert, those of experts."""
    every = list(params)
    return (
        [param for param in every if not is_moe_param(param)],
        [param for param in every if is_moe_param(param)],
    )


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: Any, max_group_size: float = 178956971
) -> Any:
    """The groups, as they are: no parameter is an expert's."""
    if isinstance(param_groups, Mapping):
        return [param_groups]
    return list(param_groups) if isinstance(param_groups, tuple) else param_groups
