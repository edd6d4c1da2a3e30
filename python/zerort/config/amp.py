"""`amp`: Apex's levels of mixed precision, and what each of them means by Apex's other keys.

A level is a row of values. The keys that may move a level away from its row are `loss_scale` with
its bounds and `keep_batchnorm_fp32`; any other may be given where it says what the level says
anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from zerort.config.problems import shown
from zerort.config.section import DtypeName, Factor, Section, dtype_name, number

__all__ = ["LEVELS", "Amp", "Level"]

_START = 2.0**16
"""The dynamic scale of the first step, where it is allowed to be as large."""


@dataclass(frozen=True)
class Level:
    """What Apex sets at one of its levels, under the names of its keys."""

    low: DtypeName
    """What is computed in; fp32 where nothing is mixed."""
    cast_model_type: DtypeName | None
    """What parameters are cast to; None leaves them."""
    patch_torch_functions: bool
    """Whether each function chooses what it computes in, as autocast does."""
    keep_batchnorm_fp32: bool | None
    master_weights: bool | None
    loss_scale: float | Literal["dynamic"]

    @property
    def casts(self) -> bool:
        """Whether the module is cast to a low precision."""
        return self.cast_model_type == self.low != "fp32"

    @property
    def cast_model_outputs(self) -> DtypeName | None:
        """What outputs are cast to; None leaves them."""
        return "fp32" if self.casts else None


LEVELS: Mapping[str, Level] = {
    "O0": Level("fp32", "fp32", False, None, False, 1.0),
    "O1": Level("fp16", None, True, None, None, "dynamic"),
    "O2": Level("fp16", "fp16", False, True, True, "dynamic"),
    "O4": Level("bf16", None, True, None, None, 1.0),
    "O5": Level("bf16", "bf16", False, True, True, 1.0),
}
"""Apex's, and O4 and O5 of AMD's Apex. Its O3 has no masters."""


def _known_level(value: str, info: ValidationInfo) -> str:
    if not info.data.get("enabled") or value in LEVELS:
        return value
    if value == "O3":
        raise ValueError(
            "refused: O3 steps on fp16 weights without fp32 masters, which every step here starts "
            "from; use O2"
        )
    raise ValueError(
        f"expected one of {', '.join(LEVELS)} (the letter O, not zero), got {shown(value)}"
    )


def _level(info: ValidationInfo) -> Level | None:
    """The level asked for; None where the section is off, or the level itself is wrong."""
    return LEVELS.get(info.data.get("opt_level", "")) if info.data.get("enabled") else None


def _spelt(value: Any) -> Any:
    # Apex takes its flags as strings too, and dtypes as torch's.
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), dtype_name(value))
    return dtype_name(str(value)) if type(value).__name__ == "dtype" else value


def _as_the_level_has_it(value: Any, info: ValidationInfo) -> Any:
    level = _level(info)
    if level is None or value is None or info.field_name is None:
        return value
    own = getattr(level, info.field_name)
    if value == own and type(value) is type(own):
        return value
    wanted = "null" if own is None else f"{shown(own)} or null"
    raise ValueError(
        f"expected {wanted}, which opt_level {info.data['opt_level']} stands for, got "
        f"{shown(value)}; choose another level, or leave it out"
    )


def _of_a_level_that_casts(value: bool | None, info: ValidationInfo) -> bool | None:
    level = _level(info)
    return value if level is not None and level.casts else _as_the_level_has_it(value, info)


def _not_above_the_start(value: float | None, info: ValidationInfo) -> float | None:
    level, scale = _level(info), info.data.get("loss_scale")
    start = min(_START, info.data.get("max_loss_scale", _START))
    dynamic = level is not None and (scale or level.loss_scale) == "dynamic"
    if dynamic and value is not None and value > start:
        raise ValueError(
            f"min_loss_scale is {value:g}, above the scale that the first step begins with, the "
            f"smaller of {_START:g} and max_loss_scale: {start:g}"
        )
    return value


_Own = Annotated[Any, BeforeValidator(_spelt), AfterValidator(_as_the_level_has_it)]


class Amp(Section):
    """`amp`: mixed precision by Apex's levels, done by torch's own means."""

    enabled: bool = False
    opt_level: Annotated[str, AfterValidator(_known_level)] = "O1"
    loss_scale: Annotated[Literal["dynamic"] | Factor | None, BeforeValidator(number)] = None
    """A static scale, or "dynamic"; None is the level's own."""
    max_loss_scale: Annotated[Factor, BeforeValidator(number)] = 2.0**24
    min_loss_scale: Annotated[
        Factor | None, BeforeValidator(number), AfterValidator(_not_above_the_start)
    ] = None
    """What a dynamic scale does not fall below; an overflow there is no error."""
    keep_batchnorm_fp32: Annotated[
        bool | None, BeforeValidator(_spelt), AfterValidator(_of_a_level_that_casts)
    ] = None
    """Whether batch norms stay as they are where the module is cast; None is the level's own."""
    cast_model_type: _Own = None
    patch_torch_functions: _Own = None
    master_weights: _Own = None
    cast_model_outputs: _Own = None

    @property
    def level(self) -> Level:
        """The row asked for; only where the section is `enabled`."""
        return LEVELS[self.opt_level]

    @property
    def keeps_norms(self) -> bool:
        """Whether batch norms stay in fp32."""
        given = self.keep_batchnorm_fp32
        return bool(self.level.keep_batchnorm_fp32 if given is None else given)

    @property
    def scale(self) -> float | Literal["dynamic"]:
        """The static loss scale, or "dynamic"."""
        return self.level.loss_scale if self.loss_scale is None else self.loss_scale

    @property
    def initial_scale(self) -> float:
        """The dynamic scale of the first step."""
        return min(_START, self.max_loss_scale)
