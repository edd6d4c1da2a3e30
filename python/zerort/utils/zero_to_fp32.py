"""DeepSpeed's functions that turn a folder of checkpoints into plain weights, by its names and in
the module where its users find them.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from pathlib import Path

from torch import Tensor

from zerort.checkpoint import get_fp32_state_dict, load_state_dict_from_zero_checkpoint
from zerort.checkpoint.export import SavedTensor, saved_tensors
from zerort.checkpoint.tags import folder_of
from zerort.checkpoint.zero_to_fp32 import byte_count, write_weights
from zerort.errors import CheckpointError

__all__ = [
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
]


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Tensor] | dict[str, SavedTensor]:
    """The fp32 weights of a checkpoint under the module's names, on CPU, verified.

    With `lazy_mode` nothing is read yet: each value has a `shape` and a `dtype`, and its
    `contiguous()` reads it. Raises `CheckpointError` for a checkpoint that is missing or damaged.
    """
    if lazy_mode:
        return saved_tensors(checkpoint_dir, tag, exclude_frozen=exclude_frozen_parameters)
    return get_fp32_state_dict(checkpoint_dir, tag, exclude_frozen_parameters)


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Writes the fp32 weights of a checkpoint into `output_dir`: `pytorch_model.bin` or, with
    `safe_serialization`, `model.safetensors`, in several files with an index where they have more
    than `max_shard_size` ("500MB"; None: one file). Raises `CheckpointError` and `OSError`.
    """
    output = folder_of(output_dir, "output_dir")
    try:
        limit = None if max_shard_size is None else byte_count(max_shard_size)
    except (ArgumentTypeError, AttributeError) as error:
        raise CheckpointError(
            f"max_shard_size: expected a size such as '5GB' or None, got {max_shard_size!r}"
        ) from error
    weights = get_fp32_state_dict(checkpoint_dir, tag, exclude_frozen_parameters)
    total = sum(tensor.nbytes for tensor in weights.values())
    write_weights(weights, Path(output), total if limit is None else limit, safe=safe_serialization)
