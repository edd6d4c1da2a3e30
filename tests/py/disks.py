"""Disks that make a save wait for what a test wants to happen before."""

from __future__ import annotations

import time
from pathlib import Path

from zerort.checkpoint.files import Disk

__all__ = ["Until"]


class Until(Disk):
    """Opens no file for writing before `sign` is there; fails where that takes 20 s."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def create(self, path: Path) -> int:
        for _ in range(1000):
            if self.sign.exists():
                return super().create(path)
            time.sleep(0.02)
        raise OSError(5, f"{self.sign} did not come")
