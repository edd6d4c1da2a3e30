"""An engine's module under torch.compile, and its backwards under compiled autograd.

What it guarantees: the module is compiled in place and once, hooks stay as they are, and the
result is the same to the bit where the compiler's is. Where nothing will overlap any more, rank 0
says so. What it does not do: it compiles no optimizer and no collective, and changes no plan.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from zerort.errors import ConfigError
from zerort.grads.compiled import around
from zerort.step.readings import Components
from zerort.step.transaction import Transaction

__all__ = ["COMPILED_WHOLE", "Compiling"]

_log = logging.getLogger("zerort")

COMPILED_WHOLE = (
    "the module is compiled whole, so all its gradients come at the end of the backward and no "
    "communication overlaps with it: compile its blocks instead, for example with block.compile() "
    "for each layer"
)
"""One graph hands its gradients over when it is done, and no bucket can leave while backward still
runs. The result is the same to the bit. Compiled block by block, each block's gradients come when
its backward is over.
"""


class Compiling:
    """Mixed into the engine."""

    module: nn.Module
    _parts: Components
    _transaction: Transaction

    def compile(
        self,
        backend: Any = "inductor",
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compiles the module in place, once; `compile_kwargs` are torch.compile's, and `backend`
        wins over theirs.

        Compiled whole, all gradients come at the end and nothing overlaps: compile the module's
        blocks where that matters, or give `compiled_autograd_enabled`. With that `backward` is
        captured and compiled too, with the same options, in a piece for each hook, and buckets
        leave between the pieces; a module that is compiled already gets it by a second call.
        Raises `ConfigError` for a `schedule` (DeepCompile's), and where this torch has no compiled
        autograd.
        """
        if schedule is not None:
            raise ConfigError(
                "compile(schedule=...) is refused: it orders DeepCompile's passes, which are not "
                "built"
            )
        options = {**(compile_kwargs or {}), "backend": backend}
        if compiled_autograd_enabled:
            self._transaction.compile_backwards(around(options))
        if self.is_compiled:
            return
        self.module.compile(**options)
        trains = self._parts.boundary.optimizer.optimizer is not None
        if self._parts.mesh.rank == 0 and trains and not compiled_autograd_enabled:
            _log.warning(COMPILED_WHOLE)

    @property
    def is_compiled(self) -> bool:
        """Whether the module is compiled whole, by torch.compile(module) or module.compile(), here
        or before `initialize`; its parts do not count.
        """
        # by its name: importing torch._dynamo for its class would add a second to every start
        return "_orig_mod" in self.module._modules or self.module._compiled_call_impl is not None
