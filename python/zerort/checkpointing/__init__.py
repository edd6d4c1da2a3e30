"""DeepSpeed's activation checkpointing, over torch's: a function's activations are not kept for the
backward, which computes them again.

`checkpoint` is torch's reentrant kind and `non_reentrant_checkpoint` the other one; both restore
the random numbers of the first run, dropout's say. Partitioned, contiguous and CPU checkpointing
are refused by name: nothing here cuts an activation over ranks or moves it.
"""

from zerort.checkpointing.functions import checkpoint, non_reentrant_checkpoint
from zerort.checkpointing.settings import (
    configure,
    is_configured,
    partition_activations_in_checkpoint,
    reset,
    set_num_layers,
)

__all__ = [
    "checkpoint",
    "configure",
    "is_configured",
    "non_reentrant_checkpoint",
    "partition_activations_in_checkpoint",
    "reset",
    "set_num_layers",
]
