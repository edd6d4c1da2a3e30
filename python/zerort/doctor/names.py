"""`zerort doctor`: the versions that are installed, and who answers to DeepSpeed's name."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

import torch

from zerort._core import __version__
from zerort_as_deepspeed import VARIABLE, install
from zerort_as_deepspeed.installed import Installed, find_deepspeed
from zerort_as_deepspeed.version import VERSION

__all__ = ["findings"]

_OTHERS = ("accelerate", "transformers", "peft", "trl", "pytorch-lightning", "lightning")


def findings() -> tuple[list[tuple[str, str]], bool]:
    """Rows of what and how it is; and whether `import deepspeed` would raise beside a DeepSpeed
    that is installed.
    """
    there = find_deepspeed()
    answer, refused = _answer(there)
    rows = [
        ("zerort", f"{__version__}, {Path(__file__).parents[1]}"),
        ("torch", str(torch.__version__)),
        ("Python", sys.version.split()[0]),
        *((name, version) for name in _OTHERS if (version := _version(name)) is not None),
        ("package deepspeed", _shown(there)),
        (VARIABLE, os.environ.get(VARIABLE, "not set")),
        ("its entry point", _entry()),
        ("import deepspeed", answer),
    ]
    return rows, refused


def _shown(there: Installed | None) -> str:
    if there is None:
        return "not installed"
    what = "stands for zerort" if there.stands_in else "DeepSpeed"
    return f"{what}, {there.version or 'without metadata'}, {there.place}"


def _answer(there: Installed | None) -> tuple[str, bool]:
    """Who answers in a process like this one; whether it raises although one is installed."""
    if install.is_installed():
        return f"zerort, as {VERSION}", False
    for finder in sys.meta_path:
        reason = getattr(finder, "reason", None)
        if getattr(finder, "answers_for_deepspeed", False) and reason is not None:
            return f"ImportError: {reason}", True
    if there is None:
        return (
            "ModuleNotFoundError; `python -m zerort.compat.run SCRIPT` lets zerort answer, and so "
            f"does {VARIABLE}=1",
            False,
        )
    return ("zerort, as " if there.stands_in else "DeepSpeed ") + str(there.version), False


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _entry() -> str:
    points = metadata.entry_points(group="torch.backends")
    if any(point.value.startswith("zerort_as_deepspeed:") for point in points):
        return "found"
    return "not found: zerort is not installed, so the variable has no effect"
