"""What is installed under the name `deepspeed`: nothing, DeepSpeed, or the tiny distribution that
stands for zerort.

It looks, and imports nothing of what it finds. A folder that merely has the name, without an
`__init__`, is not a package that somebody installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

__all__ = ["Installed", "find_deepspeed"]

_STAND_IN = "stands_for_zerort"
"""A file of the tiny distribution, beside its `__init__`."""


@dataclass(frozen=True)
class Installed:
    """A package named deepspeed."""

    version: str | None
    """As its metadata says; None where it has none, in a checkout of the sources for example."""
    place: str
    """Its `__init__` file."""
    stands_in: bool
    """Whether it is the tiny distribution that stands for zerort."""


def find_deepspeed() -> Installed | None:
    """The package that `import deepspeed` would find without zerort's doing; None for none."""
    for spec in _specs():
        if spec.origin is None or spec.loader is None:
            continue  # a folder without __init__
        stands_in = Path(spec.origin).with_name(_STAND_IN).exists()
        return Installed(_version(), spec.origin, stands_in)
    return None


def _specs() -> Iterator[ModuleSpec]:
    for finder in sys.meta_path:
        if getattr(finder, "answers_for_deepspeed", False):
            continue
        find = getattr(finder, "find_spec", None)
        spec = None if find is None else find("deepspeed", None)
        if spec is not None:
            yield spec


def _version() -> str | None:
    for finder in sys.meta_path:
        find = getattr(finder, "find_distributions", None)
        if find is None or getattr(finder, "answers_for_deepspeed", False):
            continue
        for found in find(metadata.DistributionFinder.Context(name="deepspeed")):
            return str(found.version)
    return None
