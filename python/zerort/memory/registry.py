"""Which parameters a module registers, and whether it still does.

A parameter under plan is itself as long as this Parameter stands in this module: its address proves
nothing, for memory may be given back and taken again. So what is watched is the tree. A module that
was exchanged, adapters that were put in, a parameter registered or deleted after the start are
found at the next backward and named, before anything is trained without them.

The watch is a comparison of the modules' own dictionaries with copies of them, some 50 nanoseconds
a module. torch's global registration hooks would see less (they do not fire for `del`, for
`ModuleList.insert` or for what is written into `_modules`) and would run for every module that the
process builds. Only a difference is looked into by a walk over the model.

What may change: modules may be wrapped or moved within the tree (`torch.compile`), and a parameter
that does not require grad may be added or, if it is not planned, taken out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import nn

from zerort.errors import StepError

__all__ = ["LEAVING", "Registry"]

_log = logging.getLogger("zerort")

LEAVING = (
    ".to(), .half(), .double(), load_state_dict(assign=True), a parametrization, pruning, an "
    "assignment or a second initialize gave the module other memory; do that before "
    "zerort.initialize, and load values with load_state_dict(assign=False)"
)


class Registry:
    """The tree under `module`, in which `params`, called `names`, are planned. `warns`: one rank
    does for all.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        params: Sequence[nn.Parameter],
        *,
        warns: bool,
    ) -> None:
        self._module = module
        self._warns = warns
        self._names = {id(p): name for name, p in zip(names, params, strict=True)}
        # Kept alive, so that no other object takes an id.
        self._first = {id(p): p for p in (*params, *module.parameters())}
        self._called = self._found()
        self._frozen = [
            p for p in self._first.values() if id(p) not in self._names and not p.requires_grad
        ]
        self._late: list[tuple[str, nn.Parameter]] = []
        self.changes = 0
        """How often the tree has been found changed."""
        self._note()

    def check(self) -> None:
        """Raises `StepError` naming a planned parameter that is gone, or a new one that requires
        grad.

        Warns where a parameter has been unfrozen that the optimizer does not hold.
        """
        if not self._is_unchanged():
            self.changes += 1
            self._follow()
            self._note()
        for name, parameter in self._late:
            if parameter.requires_grad:
                raise StepError(
                    f"parameter {name} was registered after zerort.initialize and requires grad, "
                    "but no bucket and no optimizer has it, so it would differ from rank to rank: "
                    "register it before zerort.initialize, or freeze it with requires_grad_(False)"
                )
        if any(parameter.requires_grad for parameter in self._frozen):
            self._warn()

    def _note(self) -> None:
        """Keeps a copy of the tree as it is."""
        self._tables: list[dict[str, Any]] = []
        for part in self._module.modules():
            if isinstance(part._parameters, dict):  # a ScriptModule has no dictionaries
                self._tables += (part._parameters, part._modules)
        self._sizes = list(map(len, self._tables))
        entries = [(table, key, value) for table in self._tables for key, value in table.items()]
        self._where = [table for table, _, _ in entries]
        self._keys = [key for _, key, _ in entries]
        self._values = [value for _, _, value in entries]

    def _is_unchanged(self) -> bool:
        # By `is`, for == of parameters compares values; and every loop is in C.
        return list(map(len, self._tables)) == self._sizes and all(
            map(is_, map(dict.get, self._where, self._keys), self._values)
        )

    def _follow(self) -> None:
        """The tree has changed: is everything that is planned still in it, and what is new?"""
        here = self._found()
        for planned, name in self._names.items():
            if self._called[planned].isdisjoint(here.get(planned, ())):
                raise StepError(
                    f"parameter {name} has been replaced, renamed or removed since initialize: "
                    f"{LEAVING}"
                )
        self._late = [
            (name, parameter)
            for name, parameter in self._module.named_parameters()
            if id(parameter) not in self._first
        ]

    def _found(self) -> dict[int, set[str]]:
        """By the parameter's id, the keys under which modules of the tree register it."""
        found: dict[int, set[str]] = {}
        for part in self._module.modules():
            for key, parameter in part._parameters.items():
                found.setdefault(id(parameter), set()).add(key)
        return found

    def _warn(self) -> None:
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        unfrozen = [p for p in self._frozen if p.requires_grad]
        self._frozen = [p for p in self._frozen if not p.requires_grad]
        if self._warns:
            _log.warning(
                "unfrozen, but not in the optimizer, so never updated: %s",
                ", ".join(names[id(p)] for p in unfrozen if id(p) in names),
            )
