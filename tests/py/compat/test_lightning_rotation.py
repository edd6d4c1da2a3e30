"""Lightning deletes old checkpoints itself: not before the new one is complete."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("pytorch_lightning")

from zerort.compat.lightning.saving import Saving


class Strategy:
    """In the place of Lightning's."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def remove_checkpoint(self, filepath: Any) -> None:
        self.calls.append(f"removes {filepath}")


class Ours(Saving, Strategy):
    """As the strategies are made."""


def test_a_save_beside_training_is_waited_for_before_an_old_checkpoint_goes() -> None:
    strategy = Ours()
    strategy._engine = SimpleNamespace(  # type: ignore[assignment]
        wait_for_checkpoint=lambda: strategy.calls.append("waits")
    )
    strategy.remove_checkpoint("old.ckpt")
    assert strategy.calls == ["waits", "removes old.ckpt"]
    strategy._engine = None
    strategy.remove_checkpoint("older.ckpt")
    assert strategy.calls[2:] == ["removes older.ckpt"]
