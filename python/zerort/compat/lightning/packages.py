"""Which of Lightning's two packages the program uses.

`pytorch_lightning` with `lightning_fabric`, and `lightning` with both inside it, are the same code
under two names, and their classes do not know one another. What a program has imported before
`zerort.compat.lightning` decides. Where it has imported both or neither, it is `lightning` if that
is installed: it brings the other along, and the other does not bring it.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any, NamedTuple

__all__ = ["HERE", "Packages", "fabric", "pytorch"]


class Packages(NamedTuple):
    """Where the Trainer and Fabric are imported from."""

    pytorch: str
    fabric: str


_SPLIT = Packages("pytorch_lightning", "lightning_fabric")
_WHOLE = Packages("lightning.pytorch", "lightning.fabric")


def _chosen() -> Packages:
    for packages in (_WHOLE, _SPLIT):
        if any(name in sys.modules for name in packages):
            return packages
    for packages in (_WHOLE, _SPLIT):
        if find_spec(packages.pytorch.partition(".")[0]) is not None:
            return packages
    raise ImportError(
        "zerort.compat.lightning needs Lightning 2.4 or newer: pip install pytorch-lightning"
    )


HERE = _chosen()
"""The program's."""


def pytorch(name: str) -> Any:
    """A module of the Trainer's package."""
    return importlib.import_module(f"{HERE.pytorch}.{name}")


def fabric(name: str) -> Any:
    """A module of Fabric's package."""
    return importlib.import_module(f"{HERE.fabric}.{name}")
