"""How `import deepspeed` comes to find zerort, without importing zerort before that.

Torch runs `start` at the end of its own import, as an entry point of its group `torch.backends`:
without the variable ZERORT_AS_DEEPSPEED it reads one variable and returns. So this package imports
the standard library alone, and of that what torch has imported already; zerort is imported when
deepspeed is. The names that are answered for are in `zerort.compat.deepspeed`.
"""

from __future__ import annotations

import os

__all__ = ["VARIABLE", "start", "wanted"]

VARIABLE = "ZERORT_AS_DEEPSPEED"

_NO = frozenset({"", "0", "false", "no", "off"})


def wanted() -> str:
    """What the variable says, in lower case; empty for nothing, or for no."""
    text = os.environ.get(VARIABLE, "").strip().lower()
    return "" if text in _NO else text


def start() -> None:
    """Installs the finder, where the variable asks for it."""
    if wanted():
        from zerort_as_deepspeed.install import install_or_refuse  # noqa: PLC0415 - costs who wants it alone

        install_or_refuse()
