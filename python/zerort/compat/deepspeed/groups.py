"""`deepspeed.utils.groups`, for ranks that all read different data: the groups of a job that cuts
no layer, no sequence and no expert.
"""

from __future__ import annotations

from typing import Any

from zerort.compat.deepspeed import comm

__all__ = ["GROUPS"]


def _every_rank() -> Any:
    """The group of all ranks; None without one."""
    return comm.get_world_group()


def _world_size() -> int:
    return comm.get_world_size()


def _rank() -> int:
    return comm.get_rank()


def _one() -> int:
    return 1


def _zero() -> int:
    return 0


GROUPS = {
    "_get_data_parallel_group": _every_rank,
    "_get_data_parallel_rank": _rank,
    "_get_data_parallel_world_size": _world_size,
    "_get_sequence_data_parallel_group": _every_rank,
    "_get_sequence_data_parallel_rank": _rank,
    "_get_sequence_data_parallel_world_size": _world_size,
    **dict.fromkeys(
        (
            "_get_expert_model_parallel_world_size",
            "_get_model_parallel_world_size",
            "_get_sequence_parallel_world_size",
            "get_model_parallel_world_size",
            "get_tensor_model_parallel_world_size",
        ),
        _one,
    ),
    **dict.fromkeys(
        (
            "_get_model_parallel_rank",
            "_get_sequence_parallel_rank",
            "get_model_parallel_rank",
            "get_tensor_model_parallel_rank",
        ),
        _zero,
    ),
}
"""Name -> what answers."""
