"""Every configuration key of DeepSpeed 0.19 and of zerort, and what becomes of it here.

One table, three fates. `SAME`: acted upon with DeepSpeed's meaning (deviations are in the text).
`IGNORED`: it tunes speed or memory of a mechanism that works differently here, so that leaving it
out changes no result. `REFUSED`: it asks for something that is not there, and going on without it
would train another model than the one asked for; a value that asks for nothing is accepted. A key
that is not in the table is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

from zerort.config.key import Fate, Key
from zerort.config.rows import features, offload, runtime, training, zero

__all__ = ["ALIASES", "CHOSEN_HERE", "KEYS", "SECRETS", "SIZES", "Fate", "Key", "as_markdown"]

_ROWS = (*training.ROWS, *zero.ROWS, *offload.ROWS, *runtime.ROWS, *features.ROWS)

KEYS: Mapping[str, Key] = {key.path: key for key in _ROWS}
"""The table, by path."""

SIZES = frozenset(
    f"zero_optimization.{name}"
    for name in (
        "reduce_bucket_size",
        "allgather_bucket_size",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
    )
)
"""Keys whose value "auto" means the default: an integration that leaves it has no better number."""

CHOSEN_HERE = frozenset(
    {"zerort.hierarchy", "zerort.publish", "zerort.transport", "zerort.wire_error_feedback"}
)
"""Keys of which "auto" is a value: what is chosen by what the engine finds."""

SECRETS = frozenset({"comet.api_key"})
"""Keys whose values are not shown."""

ALIASES: Mapping[str, str] = {"bfloat16": "bf16"}
"""Old spellings of top-level sections."""


def as_markdown() -> str:
    """The table for the documentation, one line a key."""
    lines = ["| key | here | what it does, or why not |", "|---|---|---|"]
    lines += [f"| `{key.path}` | {key.fate.value} | {key.effect} |" for key in _ROWS]
    return "\n".join(lines) + "\n"
