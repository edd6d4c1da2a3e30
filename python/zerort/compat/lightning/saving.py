"""A Trainer's checkpoints over an engine: within `fit` a folder, which the engine writes and reads,
with Lightning's own dictionary in it; behind it one file of Lightning's format.

What it guarantees: what a checkpoint has been taken from, the engine or the module alone, is told
where it matters, and a fit that is resumed has its optimizer's state or says that it has not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import zerort
from zerort.checkpoint import get_client_state, get_fp32_state_dict
from zerort.compat.lightning.packages import fabric, pytorch
from zerort.compat.lightning.stored import (
    TAG,
    folder_of,
    mapped,
    packed,
    refuse_place,
    unpacked,
)
from zerort.errors import CheckpointError, ConfigError

__all__ = ["Saving"]

_TorchCheckpointIO = fabric("plugins.io.torch_io").TorchCheckpointIO
_rank_zero = pytorch("utilities.rank_zero")


class Saving:
    """Mixed into a strategy, before Lightning's class."""

    _engine: zerort.Engine | None
    lightning_module: Any
    broadcast: Any
    checkpoint_io: Any
    exclude_frozen_parameters: bool
    load_full_weights: bool
    weights_only: bool | None
    _full: Mapping[str, Any] | None = None
    """What one file holds, until the module has it."""

    @property
    def _fits(self) -> bool:
        return self._engine is not None and self._engine.optimizer is not None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The engine loads."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The engine has done it."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing within `fit`: the engine writes the weights."""
        return {} if self._engine is not None else dict(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: the engine writes it."""
        return {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: the engine has read it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """All ranks: within `fit` a folder, which holds everything; behind it one file of
        Lightning's format, which holds no optimizer's state.
        """
        if storage_options is not None:
            raise ConfigError(
                "save_checkpoint(storage_options=...): the engine writes; leave it out"
            )
        refuse_place(filepath)
        filepath = self.broadcast(str(filepath))
        if self._engine is None:
            _rank_zero.rank_zero_warn(
                f"{filepath}: the engine has been given back, so there is no optimizer's state in "
                "this checkpoint: save within fit, for example by "
                "ModelCheckpoint(save_last=True), to resume from it"
            )
            super().save_checkpoint(checkpoint, filepath)  # type: ignore[misc]
            return
        kept = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        client_state = packed(kept, self.broadcast)
        self._engine.save_checkpoint(
            filepath,
            tag=TAG,
            client_state=client_state,
            exclude_frozen_parameters=self.exclude_frozen_parameters,
            overwrite=True,
        )

    def remove_checkpoint(self, filepath: Any) -> None:
        """All ranks: what is being written beside training may be what replaces it."""
        if self._engine is not None:
            self._engine.wait_for_checkpoint()
        super().remove_checkpoint(filepath)  # type: ignore[misc]

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads what the engine keeps; returns Lightning's dictionary."""
        weights_only = self.weights_only if weights_only is None else weights_only
        checkpoint_path = self.broadcast(str(checkpoint_path))
        folder = folder_of(checkpoint_path)
        if folder is None:
            return self._load_file(checkpoint_path, weights_only)
        strict = self.lightning_module.strict_loading
        if self._engine is None:
            weights = get_fp32_state_dict(folder, TAG)
            self.lightning_module.load_state_dict(weights, strict=strict)
            client_state = get_client_state(folder, TAG)
        else:
            _, client_state = self._engine.load_checkpoint(
                folder, tag=TAG, load_module_strict=strict
            )
        return {"state_dict": {}, **unpacked(client_state, folder, weights_only)}

    def _load_file(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        if self._fits and not self.load_full_weights:
            raise CheckpointError(
                f"{path} is one file, which holds no state of this strategy's optimizer: give "
                "ZerortStrategy(load_full_weights=True) to fit on from its weights"
            )
        if self._fits:
            _rank_zero.rank_zero_warn(f"{path}: the optimizer begins anew, weights alone are taken")
        if type(self.checkpoint_io) is _TorchCheckpointIO:
            self._full = mapped(path, weights_only)
        else:
            self._full = super().load_checkpoint(path, weights_only)  # type: ignore[misc]
        return dict(self._full)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """What one file holds; a folder's weights are there already."""
        full, self._full = self._full, None
        if full is None:
            return
        if self._engine is None:
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)
        else:
            self._engine.load_module_state_dict(checkpoint["state_dict"], strict=strict)
