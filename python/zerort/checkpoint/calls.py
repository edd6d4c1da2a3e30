"""The engine's calls that save, load and hand out what a model holds."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from zerort.checkpoint.checkpoints import Checkpoints
from zerort.checkpoint.match import LoadOptions
from zerort.checkpoint.record import LoadRecord
from zerort.checkpoint.save import SaveOptions
from zerort.errors import ConfigError
from zerort.step.readings import Components
from zerort.step.transaction import Transaction
from zerort.zero import GatheredParameters

__all__ = ["Saving"]

_log = logging.getLogger("zerort")

NOT_GATHERED = (
    "%s is not written, because at stage 3 the weights are in parts: configure "
    '"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": true}'
)


class Saving:
    """Mixed into the engine."""

    module: nn.Module
    _parts: Components
    _transaction: Transaction
    _checkpoints: Checkpoints

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
        allow_pickle: bool = False,
        asynchronous: bool | None = None,
    ) -> bool:
        """Writes all state to `save_dir`/`tag` (default `global_step{N}`). All ranks call it;
        returns True.

        When it returns, the checkpoint is complete on every rank and survives a power loss.
        `client_state` (rank 0's is kept) holds what `torch.load(weights_only=True)` reads back, and
        with `allow_pickle` any object that can be pickled, which loading then must allow too. An
        existing tag is replaced with `overwrite`, and only the newest `keep_last` stay; with
        `asynchronous` it returns once the state has been copied, and the checkpoint is written
        beside training, until `wait_for_checkpoint` has returned or the next save begins. All three
        default to the configuration. Gradients are not part of it: save after a step. Raises the
        same `CheckpointError` on all ranks, and then what was there before is untouched; of an
        asynchronous save at a later `step` or call.
        """
        self._transaction.pause("save_checkpoint()")
        policy = self._parts.config.zerort.checkpoint
        options = SaveOptions(
            save_latest,
            policy.overwrite if overwrite is None else overwrite,
            policy.keep_last if keep_last is None else keep_last,
            allow_pickle=allow_pickle,
        )
        return self._checkpoints.save(
            save_dir,
            tag,
            client_state or {},
            options,
            exclude_frozen=exclude_frozen_parameters,
            asynchronous=policy.asynchronous if asynchronous is None else asynchronous,
        )

    def wait_for_checkpoint(self) -> None:
        """Returns when nothing is being written beside training: then the last checkpoint is
        complete on every rank and survives a power loss. All ranks call it.

        Raises `CheckpointError` on all ranks where an asynchronous save has failed that has not
        been raised yet; the engine goes on.
        """
        self._checkpoints.settle("wait_for_checkpoint()")

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
        allow_pickle: bool = False,
    ) -> tuple[str | None, Any]:
        """Continues from `load_dir`/`tag`, by default what `latest` names there. All ranks call it.

        Any number of ranks, stage and bucket size may have saved it. Every byte is verified before
        the engine changes; with `fallback` a damaged checkpoint is replaced by the newest that
        verifies. Names are matched wherever they are held, in the optimizer or not. What is not
        taken is logged, and stands in `last_load`: random number generators fit the same number of
        ranks alone. Objects in the client state are unpickled, which runs what they say, only with
        `allow_pickle`. Returns the path and the client state, or (None, {}) with a warning when
        there is no `latest`. Raises the same `CheckpointError` on all ranks, and then the engine is
        as it was, whichever object raised.
        """
        self._transaction.pause("load_checkpoint()")
        options = LoadOptions(
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            weights=custom_load_fn is None,
            allow_pickle=allow_pickle,
        )
        loaded = self._checkpoints.load(load_dir, tag, options, custom_load_fn, fallback=fallback)
        if loaded[0] is not None:
            self._transaction.restart(*self._checkpoints.of_wire)
        return loaded

    @property
    def last_load(self) -> LoadRecord | None:
        """What the last `load_checkpoint` did: which names kept their values, what was not taken;
        None before the first.
        """
        return self._checkpoints.last_load

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Writes the module's weights, in the dtype it computes with, into one file. All ranks call
        it; returns True.

        A name ending in `.safetensors` gives that format, any other one that
        `torch.load(weights_only=True)` reads. At stage 3 the weights come to rank 0's host a unit
        at a time, if `stage3_gather_16bit_weights_on_model_save` says so; if not, nothing is
        written, and it returns False. Raises the same `CheckpointError` on all ranks.
        """
        zero = self._parts.config.zero_optimization
        if zero.shards_parameters and not zero.gathers_weights:
            if self._parts.mesh.rank == 0:
                _log.warning(NOT_GATHERED, os.path.join(save_dir, save_filename))
            return False
        self._transaction.pause("save_16bit_model()")
        return self._checkpoints.save_weights(
            save_dir, save_filename, exclude_frozen=exclude_frozen_parameters
        )

    def save_fp16_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """`save_16bit_model`, by its old name."""
        return self.save_16bit_model(save_dir, save_filename, exclude_frozen_parameters)

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, Tensor] | None:
        """Stage 3: the module's weights on rank 0's host, in the dtype it computes with, brought
        there a unit at a time; None on the other ranks. All ranks call it.

        Copies; tied weights are one tensor. Raises `ConfigError` below stage 3.
        """
        if not self._parts.config.zero_optimization.shards_parameters:
            raise ConfigError(
                "_zero3_consolidated_16bit_state_dict() is of stage 3: below it "
                "engine.module.state_dict() is whole on every rank"
            )
        self._transaction.pause("save_16bit_model()")
        found = self._checkpoints.consolidated(exclude_frozen=exclude_frozen_parameters)
        return found if self._parts.mesh.rank == 0 else None

    # State dicts.

    def module_state_dict(
        self,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """The module's state dict, without the parameters that do not train if asked for.

        At stage 3 sharded parameters are meta tensors in it; within `GatheredParameters` they are
        whole.
        """
        found = self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if exclude_frozen_parameters:
            for name, parameter in self.module.named_parameters(remove_duplicate=False):
                if not parameter.requires_grad:
                    found.pop(prefix + name, None)
        return found

    def load_module_state_dict(
        self,
        checkpoint: Mapping[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> None:
        """Loads a state dict, or what `checkpoint` holds under `module`, into the module; fp32
        masters follow. All ranks call it.

        `custom_load_fn(src=state_dict, dst=module)` loads instead of the module's own. At stage 3
        the parameters are whole meanwhile, and rank 0's values count. Raises what loading raises.
        """
        inner = checkpoint.get("module")
        weights = inner if isinstance(inner, Mapping) else checkpoint
        with GatheredParameters(list(self.module.parameters()), modifier_rank=0):
            if custom_load_fn is None:
                self.module.load_state_dict(weights, strict=strict)
            else:
                custom_load_fn(src=weights, dst=self.module)
