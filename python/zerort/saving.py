"""Saving and loading, under DeepSpeed's names: what the user calls, over `checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from zerort.checkpoint.checkpoints import Checkpoints
from zerort.checkpoint.match import Choice
from zerort.checkpoint.save import SaveOptions
from zerort.checkpoint.state import EngineState
from zerort.readings import Parts, Readings

__all__ = ["Saving"]


class Saving(Readings):
    """What an engine keeps on disk. `_settled` and `_restored` are the engine's part in it."""

    def __init__(self, module: nn.Module, parts: Parts) -> None:
        super().__init__(module, parts)
        self._checkpoints = Checkpoints(self._state(), parts.config)

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        overwrite: bool | None = None,
        keep_last: int | None = None,
    ) -> bool:
        """Writes all state to `save_dir`/`tag` (default `global_step{N}`). All ranks call it;
        returns True.

        When it returns, the checkpoint is complete on every rank and survives a power loss.
        `client_state` (rank 0's is kept) holds JSON values, tuples, integer keys and tensors. An
        existing tag is replaced with `overwrite`, and only the newest `keep_last` stay; both
        default to the configuration. Gradients are not part of it: save after a step. Raises the
        same `CheckpointError` on all ranks, and then what was there before is untouched.
        """
        self._settled()
        policy = self._parts.config.zerort.checkpoint
        options = SaveOptions(
            save_latest,
            policy.overwrite if overwrite is None else overwrite,
            policy.keep_last if keep_last is None else keep_last,
        )
        return self._checkpoints.save(
            save_dir, tag, client_state or {}, options, exclude_frozen=exclude_frozen_parameters
        )

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
        *,
        fallback: bool = False,
    ) -> tuple[str | None, Any]:
        """Continues from `load_dir`/`tag`, by default what `latest` names there. All ranks call it.

        Any number of ranks, stage and bucket size may have saved it. Every byte is verified before
        the engine changes; with `fallback` a damaged checkpoint is replaced by the newest that
        verifies. Random number generators and the position in the data are restored where the
        number of ranks is the same. Returns the path and the client state, or (None, {}) with a
        warning when there is no `latest`. Raises the same `CheckpointError` on all ranks.
        """
        self._settled()
        choice = Choice(
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            weights=custom_load_fn is None,
        )
        loaded = self._checkpoints.load(load_dir, tag, choice, custom_load_fn, fallback=fallback)
        if loaded[0] is not None:
            self._restored()
        return loaded

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Writes the module's weights, in the dtype it computes with, into one file. All ranks call
        it; returns True.

        A name ending in `.safetensors` gives that format, any other one that
        `torch.load(weights_only=True)` reads. Raises the same `CheckpointError` on all ranks.
        """
        return self._checkpoints.save_weights(
            save_dir, save_filename, exclude_frozen=exclude_frozen_parameters
        )

    def _settled(self) -> None:
        """Nothing is under way any more."""
        raise NotImplementedError

    def _restored(self) -> None:
        """State has been replaced: nothing of the window before is left."""
        raise NotImplementedError

    def _state(self) -> EngineState:
        parts, boundary = self._parts, self._parts.boundary
        return EngineState(
            self.module,
            parts.comm,
            boundary.flat,
            parts.reduction,
            boundary.optimizer,
            boundary.loss_scale,
            parts.scheduler,
            self.counters,
            parts.config.zero_optimization.stage,
            parts.loader,
        )
