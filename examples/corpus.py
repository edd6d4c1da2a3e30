"""Real text as bytes, split into training and validation, and cut into batches.

Batches are a pure function of their index, the rank and the number of ranks: no sampler holds
state, so a run that resumes at step k sees what it would have seen, and no two ranks draw from the
same stream.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Every twentieth piece of this many bytes is held out for validation.
PIECE = 1 << 12
HOLD_OUT = 20

# Folders of the standard library that are somebody else's code, or tests of it.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """`train` and `validation` are one-dimensional uint8 tensors of text."""

    train: Tensor
    validation: Tensor

    @classmethod
    def load(cls, path: Path | None) -> Corpus:
        """The text of a file, of every `*.py` under a folder, or of this Python's standard library.

        Raises `ValueError` when that is less text than can be split, and `OSError` for what cannot
        be read.
        """
        place = path or Path(sysconfig.get_paths()["stdlib"])
        text = b"\n".join(file.read_bytes() for file in source_files(place))
        if len(text) < HOLD_OUT * PIECE:
            raise ValueError(
                f"{place}: {len(text)} bytes of text are too few, at least {HOLD_OUT * PIECE} are "
                "needed"
            )
        return cls.split(text)

    @classmethod
    def split(cls, text: bytes) -> Corpus:
        """Holds out every twentieth piece."""
        pieces = torch.frombuffer(bytearray(text), dtype=torch.uint8).split(PIECE)
        held_out = pieces[HOLD_OUT - 1 :: HOLD_OUT]
        kept = [piece for index, piece in enumerate(pieces) if index % HOLD_OUT != HOLD_OUT - 1]
        return cls(train=torch.cat(kept), validation=torch.cat(held_out))

    def batch(
        self, index: int, rank: int, world: int, *, size: int, context: int
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of micro-batch `index`, both (size, context) int64; targets are one
        byte ahead.
        """
        generator = torch.Generator().manual_seed(index * world + rank)
        starts = torch.randint(len(self.train) - context, (size, 1), generator=generator)
        return windows(self.train, starts, context)

    def held_out(self, count: int, context: int) -> tuple[Tensor, Tensor]:
        """`count` windows spread evenly over the validation text; the same ones on every call."""
        starts = torch.linspace(0, len(self.validation) - context - 1, count).long().unsqueeze(1)
        return windows(self.validation, starts, context)


def source_files(path: Path) -> list[Path]:
    """`path` itself when it is a file, else the Python sources under it in a fixed order."""
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*.py"))
    return [file for file in found if SKIPPED.isdisjoint(file.relative_to(path).parts)]


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """`context` bytes from each of `starts`, (count, 1), and the same shifted by one."""
    rows = text[starts + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]
