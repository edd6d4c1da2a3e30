"""Checkpoints: complete on every rank and safe from a power loss, or not listed; loadable on any
number of ranks.

`zerort.Engine` saves and loads; here is what needs no engine. `docs/checkpoints.md` has the
promises and the format.
"""

from zerort.checkpoint.export import (
    get_client_state,
    get_fp32_state_dict,
    load_state_dict_from_zero_checkpoint,
)
from zerort.checkpoint.verify import problems

__all__ = [
    "get_client_state",
    "get_fp32_state_dict",
    "load_state_dict_from_zero_checkpoint",
    "problems",
]
