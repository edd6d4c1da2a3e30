"""Which casts a configuration asks for: one row of flags, whichever section asks.

The sections `fp16`, `bf16` and `torch_autocast` have a row each. `amp` has one for each of Apex's
levels, made of what the level says (`config.amp`): O1 and O4 are autocast's, O2 and O5 cast the
module and leave batch norms and outputs in fp32. Everything behind the row, from the masters to the
vote, is the same for all; Apex's own code is not used, for it unscales, decides and skips on each
rank alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec

import torch

from zerort.config import Config

__all__ = ["DTYPES", "Mode", "said_of_apex"]

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Mode:
    """What is cast, and when."""

    compute: torch.dtype | None = None
    """What parameters are cast to; None where the model keeps its own."""
    keeps_norms: bool = False
    """Batch norms are not cast."""
    casts_inputs: bool = False
    """Floating-point arguments of the module are cast to `compute`."""
    widens_outputs: bool = False
    """Floating-point outputs of the module are cast to fp32."""
    autocast: torch.dtype | None = None
    """What operations are computed in where torch chooses; None where it does not."""

    @property
    def is_half(self) -> bool:
        """Whether gradients pass through fp16, so that the loss is to be scaled."""
        return torch.float16 in (self.compute, self.autocast)

    @classmethod
    def of(cls, config: Config) -> Mode:
        """The row of what is enabled."""
        if config.amp.enabled:
            return _of_level(config)
        autocast = DTYPES[config.torch_autocast.dtype] if config.torch_autocast.enabled else None
        if config.compute_dtype == "fp32":
            return cls(autocast=autocast)
        inputs = config.fp16.enabled and config.fp16.auto_cast
        return cls(DTYPES[config.compute_dtype], casts_inputs=inputs, autocast=autocast)


def _of_level(config: Config) -> Mode:
    level = config.amp.level
    if level.patch_torch_functions:
        return Mode(autocast=DTYPES[level.low])
    if not level.casts:
        return Mode()
    return Mode(
        DTYPES[level.low],
        keeps_norms=config.keeps_norms,
        casts_inputs=True,
        widens_outputs=True,
    )


def said_of_apex(config: Config) -> str | None:
    """A line for the log, where `amp` is enabled."""
    if not config.amp.enabled:
        return None
    installed = ", though installed," if _has_apex() else ""
    return (
        f"amp.opt_level {config.amp.opt_level} is done by torch's own means; apex.amp{installed} "
        "is not used, since it would step and skip on each rank by itself"
    )


def _has_apex() -> bool:
    """Whether there is an `apex.amp`, without importing it or the package around it: there are
    others by that name.
    """
    try:
        package = find_spec("apex")
    except ValueError:  # it is imported, and no module of a file's
        return False
    places = package.submodule_search_locations if package is not None else None
    return places is not None and PathFinder.find_spec("apex.amp", list(places)) is not None
