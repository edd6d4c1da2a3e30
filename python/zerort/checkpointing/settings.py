"""What activation checkpointing was asked for: all that DeepSpeed does beyond torch's is refused.

The section `activation_checkpointing` of a configuration is read as a whole configuration is, with
the same table of keys.
"""

from __future__ import annotations

from typing import Any

from zerort.config import load_part
from zerort.errors import ConfigError

__all__ = [
    "configure",
    "is_configured",
    "partition_activations_in_checkpoint",
    "reset",
    "set_num_layers",
]

_noted = {"configured": False}


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Notes that checkpointing is configured. Mirrors deepspeed.checkpointing.configure.

    `deepspeed_config` is a dict, a path or base64 text, of which the section
    `activation_checkpointing` is read. `mpu_` and `num_checkpoints` are of partitioned activations,
    `synchronize` and `profile` of DeepSpeed's timing: they change no result, here or there. Raises
    `ConfigError` where activations are to be partitioned, contiguous or in the host's memory.
    """
    if deepspeed_config is not None:
        load_part(deepspeed_config, {"activation_checkpointing"})
    partition_activations_in_checkpoint(bool(partition_activations))
    if contiguous_checkpointing:
        raise ConfigError(
            "checkpointing.configure(contiguous_checkpointing=True) is refused: there is no buffer "
            "for partitioned activations; leave it out"
        )
    if checkpoint_in_cpu:
        raise ConfigError(
            "checkpointing.configure(checkpoint_in_cpu=True) is refused: activations stay where "
            "they are computed; call checkpoint() within torch.autograd.graph.save_on_cpu(), which "
            "moves what it saves to the host"
        )
    _noted["configured"] = True


def is_configured() -> bool:
    """Whether `configure` has been called."""
    return _noted["configured"]


def reset() -> None:
    """Nothing: there are no buffers. DeepSpeed's drops those of contiguous activations."""


def set_num_layers(nlayers: int) -> None:
    """Nothing: it sizes DeepSpeed's buffer of contiguous activations."""


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Raises `ConfigError` where activations are to be partitioned."""
    if partition_activation:
        raise ConfigError(
            "partition_activations is refused: activations are not cut over ranks, as there is no "
            "model parallelism; leave it out"
        )
