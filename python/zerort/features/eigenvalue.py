"""`eigenvalue`: how sharply the loss curves over each block of the module, by the largest
eigenvalue of its Hessian.

    backward, in a window that is due    loss / steps is kept, and its graph
    before the vote                      g = the kept losses' gradients, with their graph
                                         for each block: Hv = grad(g, params, v), averaged
                                         over ranks, until <Hv, v> stands still
                                         the losses are dropped

What is computed is of the global batch, so that all ranks have the same numbers after the same
iterations. Every all-reduce says whether a rank has failed, and all stop behind the same one: a
rank that has nothing to give still takes part. `.grad`, the gradients' sums and random numbers are
not touched. Where a rank has no loss (`join`, a `loss.backward()` of the user's own), the window is
left out on all. Mirrors DeepSpeed 0.3.15 to 0.6, where each rank saw its own batch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zerort.config import Config
from zerort.config.quantize import Eigenvalue
from zerort.device.random import random_states, restore_random_states
from zerort.errors import StepError
from zerort.features.blocks import blocks_of
from zerort.features.fail_stop import FailStop, Stopped
from zerort.features.hessian import Hessian, gradients_of
from zerort.features.power_iteration import relative, start_of, top_eigenvalue
from zerort.features.site import Site
from zerort.step.events import Feature

__all__ = ["BlockEigenvalue", "section_of"]

_log = logging.getLogger("zerort")

Values = dict[str, tuple[float, int]]
"""By a parameter's name, its block's eigenvalue relative to the largest, and the block."""


def section_of(config: Config) -> tuple[str, Eigenvalue] | None:
    """Where the file asks for eigenvalues, and what it says; None where it does not."""
    if config.eigenvalue.enabled:
        return "eigenvalue", config.eigenvalue
    moq = config.quantize_training
    if moq.enabled and moq.eigenvalue.enabled:
        return "quantize_training.eigenvalue", moq.eigenvalue
    return None


class BlockEigenvalue(Feature):
    """Computes at every `gas_boundary_resolution`-th boundary where `is_wanted` says so, which has
    to say the same on all ranks and throughout a window.
    """

    name = "eigenvalue"

    def __init__(self, site: Site, path: str, settings: Eigenvalue) -> None:
        self.blocks = blocks_of(site.module, settings, path)
        self.is_wanted: Callable[[], bool] = lambda: True
        self.values: Values | None = None
        """As of the last time."""
        self.latest: Sequence[float] = ()
        """Each block's value at the boundary that is over; empty where none was computed."""
        self._path = path
        self._settings = settings
        self._counters = site.counters
        self._control = site.parts.mesh.control
        self._device = site.parts.mesh.device
        self._listener = site.parts.reduction.listener
        self._sink = site.parts.sink
        self._kept: list[Tensor] = []
        self._warned: set[str] = set()

    @classmethod
    def open(cls, site: Site) -> BlockEigenvalue | None:
        """Where the configuration asks for it. Raises `ConfigError` for blocks that are not
        there.
        """
        section = section_of(site.config)
        return None if section is None else cls(site, *section)

    @property
    def is_due(self) -> bool:
        """Whether the window under way ends with eigenvalues."""
        count = self._counters.global_steps + 1
        return count % self._settings.gas_boundary_resolution == 0 and self.is_wanted()

    # A window that is due.

    def forward(self) -> AbstractContextManager[None]:
        """Fused attention and compiled graphs have no second derivative: attention is computed by
        its definition, and what is compiled as it was written.
        """
        if torch.is_grad_enabled() and self.is_due:
            return _twice_differentiable()
        return nullcontext()

    def backward(self, loss: Tensor, steps: int) -> bool:
        """Keeps the loss and its graph."""
        if not self.is_due:
            return False
        with torch.enable_grad():  # a tensor of its own: the caller may go on to change the loss
            wide = torch.promote_types(loss.dtype, torch.float32)
            self._kept.append(loss.to(wide).sum() / steps)
        return True

    def before_vote(self, *, failed: bool) -> None:
        """Computes, on all ranks together. Raises `StepError` where this rank cannot."""
        self.latest = ()
        if not self.is_due:
            return
        kept, self._kept = self._kept, []
        with self._sink.range("eigenvalue"), self._computing():
            ranks = FailStop(self._control)
            found = self._of_blocks(ranks, [] if failed else kept, failed=failed)
        if found is not None:
            self.latest = relative(found)
            self.values = {
                name: (value, index)
                for index, (block, value) in enumerate(zip(self.blocks, self.latest, strict=True))
                for name in block.names
            }

    def readings(self) -> Sequence[tuple[str, float]]:
        """Each block's value, where it was computed."""
        return [
            (f"Train/Eigenvalues/ModelBlockParam_{index}", value)
            for index, value in enumerate(self.latest)
        ]

    def dropped(self) -> None:
        """The window's losses are of no use."""
        self._kept.clear()

    def close(self) -> None:
        """Nothing is kept."""
        self._kept.clear()

    # The computation.

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Within, gradients are computed that are not accumulated."""
        drawn = random_states(self._device)
        states = {key: drawn[key] for key in ("torch", self._device.type) if key in drawn}
        try:
            with torch.enable_grad(), self._listener.deaf():
                yield
        finally:
            restore_random_states(states, self._device)

    def _of_blocks(
        self, ranks: FailStop, kept: list[Tensor], *, failed: bool
    ) -> list[float] | None:
        """Each block's eigenvalue; None on all ranks where some rank has failed, or has no loss, or
        where a block has no second derivative on any.
        """
        params = [parameter for block in self.blocks for parameter in block.params]
        gradients = ranks.attempt(lambda: gradients_of(kept, params), self._explained)
        given = [gradients is not None and each is not None for each in gradients or params]
        counts = ranks.count([failed, not kept, *given])
        ranks.raise_own()
        if counts[0]:
            return None
        if counts[1]:
            self._warn(
                "a rank has no loss in this window, which engine.backward(loss) would have left: "
                "eigenvalues are left out (said once)"
            )
            return None
        return self._of_each(ranks, gradients or [None] * len(params), counts[2:])

    def _of_each(
        self, ranks: FailStop, gradients: Sequence[Tensor | None], given: Sequence[int]
    ) -> list[float] | None:
        rest = iter(zip(gradients, given, strict=True))
        found = []
        for index, block in enumerate(self.blocks):
            part = [(p, *next(rest)) for p in block.params]
            hessian = Hessian.of([(p, gradient) for p, gradient, count in part if count])
            if not hessian.params:
                self._warn(
                    f"block {index} of {self._settings.layer_name} has no second derivative, so "
                    "there are no eigenvalues: it is frozen, unused, linear in the loss, or "
                    "checkpointed without use_reentrant=False (said once)"
                )
                return None
            value = self._of_one(ranks, hessian)
            if value is None:
                return None
            if self._settings.verbose and self._control.rank == 0:
                _log.info("eigenvalue of block %d: %g", index, value)
            found.append(value)
        return found

    def _of_one(self, ranks: FailStop, hessian: Hessian) -> float | None:
        def product(vector: Tensor) -> Tensor:
            return ranks.mean(
                ranks.attempt(lambda: hessian.times(vector), self._explained), vector.numel()
            )

        start = start_of([parameter.shape for parameter in hessian.params])
        try:
            return top_eigenvalue(product, start, self._settings)
        except Stopped:
            ranks.raise_own()
            return None

    def _explained(self, error: BaseException) -> StepError:
        return StepError(
            f"{self._path}: the gradients of {self._settings.layer_name} cannot be differentiated "
            f"once more ({type(error).__name__}: {error}): fused kernels and reentrant "
            "checkpointing have no second derivative; compute attention under "
            "sdpa_kernel(SDPBackend.MATH), checkpoint with use_reentrant=False, or turn the "
            "section off"
        )

    def _warn(self, message: str) -> None:
        if message not in self._warned and self._control.rank == 0:
            _log.warning(message)
        self._warned.add(message)


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH), _uncompiled():
        yield


def _uncompiled() -> AbstractContextManager[Any]:
    # Nothing is compiled where the compiler was never imported, which takes a second.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager
