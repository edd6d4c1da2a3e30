"""The engine as DeepSpeed's callers know it: `DeepSpeedEngine`, a class without state of its own
that an engine of `zerort.initialize` is given afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from zerort.compat.deepspeed.failures import (
    NoFolder,
    as_deepspeed_fails,
    deepspeeds_failures,
)
from zerort.compat.deepspeed.optimizer import follow
from zerort.compat.deepspeed.pieces import with_sizes
from zerort.config import Batch, Config
from zerort.engine import Engine
from zerort.errors import CheckpointError

__all__ = ["DeepSpeedEngine"]


class DeepSpeedEngine(Engine):
    """zerort's engine. Where DeepSpeed's does another thing with the same arguments, so does this
    one; its errors are also the `AssertionError` that DeepSpeed's callers catch.
    """

    pipeline_parallelism = has_moe_layers = False
    """Neither is built."""

    @property
    def _config(self) -> Config:
        """The configuration under DeepSpeed's name for it, as `DeepSpeedConfig` has it: with all
        batch sizes as they are now.
        """
        batch = Batch(
            self.train_batch_size(),
            self.train_micro_batch_size_per_gpu(),
            self.gradient_accumulation_steps(),
        )
        return with_sizes(self.config, batch)

    @as_deepspeed_fails
    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """As the engine's own."""
        return super().backward(loss, *args, **kwargs)

    @as_deepspeed_fails
    def scale(self, loss: Any, scale_wrt_gas: bool = True) -> Any:
        """As the engine's own."""
        return super().scale(loss, scale_wrt_gas)

    @as_deepspeed_fails
    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """As the engine's own; the optimizer then says whether its step was skipped."""
        super().step(lr_kwargs)
        follow(self)

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """As the engine's own."""
        with deepspeeds_failures(), super().coalesce_grad_reduction():
            yield

    @as_deepspeed_fails
    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """As the engine's own."""
        super().set_gradient_accumulation_boundary(is_boundary)

    @as_deepspeed_fails
    def allreduce_gradients(self, bucket_size: int = 500_000_000) -> None:
        """As the engine's own."""
        super().allreduce_gradients(bucket_size)

    def get_global_grad_norm(self) -> float | None:
        """As the engine's own, but of the last step that was not skipped: 0 where all were."""
        norm = super().get_global_grad_norm()
        optimizer: Any = self.optimizer
        return norm if norm is None or optimizer is None else float(optimizer._global_grad_norm)

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        overwrite: bool | None = None,
        **own: Any,
    ) -> bool:
        """As the engine's own, but an existing tag is replaced unless `overwrite` is False. Without
        a folder the error is a `ValueError` too.
        """
        try:
            return super().save_checkpoint(
                save_dir,
                None if tag is None else str(tag),
                client_state,
                save_latest,
                exclude_frozen_parameters,
                overwrite=overwrite is not False,
                **own,
            )
        except CheckpointError as error:
            if save_dir:
                raise
            raise NoFolder(*error.args).with_traceback(error.__traceback__) from error.__cause__

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
        **own: Any,
    ) -> tuple[str | None, Any]:
        """As the engine's own, but (None, None) where there is nothing to load."""
        path, client_state = super().load_checkpoint(
            load_dir,
            None if tag is None else str(tag),
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
            **own,
        )
        follow(self)
        return path, None if path is None else client_state
