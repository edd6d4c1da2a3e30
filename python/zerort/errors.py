"""Every exception zerort raises. Each is also the built-in a caller would expect, so `except
ValueError` works too.

The core raises these classes itself. A message names the parameter, key, file or rank, and says
what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "LONGEST_NAME",
    "CheckpointError",
    "CommError",
    "ConfigError",
    "LayoutError",
    "NonFiniteGradient",
    "NotBuiltError",
    "PlanError",
    "PlanMismatch",
    "StepError",
    "ZerortError",
    "did_you_mean",
    "nearest",
]

LONGEST_NAME = 120
"""Characters of a name that a message has room for, and that is worth guessing at."""


class ZerortError(Exception):
    """Base of all errors of this package."""


class ConfigError(ZerortError, ValueError):
    """A configuration value that cannot be used: key path, what was expected, what was found."""


class PlanError(ZerortError, ValueError):
    """A model that cannot be planned; names the parameter."""


class PlanMismatch(PlanError):
    """Ranks whose models or schedules differ; names the rank and the first difference."""


class LayoutError(ZerortError, BufferError):
    """Memory that cannot be shared as it is: device, dtype, contiguity, alignment or length."""


class StepError(ZerortError, RuntimeError):
    """A call in the wrong phase of a step, or a step that a rank could not complete."""


class NonFiniteGradient(StepError):
    """A gradient with an infinity or NaN, when the configuration asks to raise; names rank and
    parameter.
    """


class CommError(ZerortError, RuntimeError):
    """A collective that failed or timed out: rank, bucket, operation and cause."""


class CheckpointError(ZerortError, OSError):
    """A checkpoint that cannot be written or trusted; names the file and the tensor."""


class NotBuiltError(ZerortError, NotImplementedError):
    """A name of DeepSpeed's that was used, and that zerort has nothing for."""


def did_you_mean(guess: str | None) -> str:
    """The end of a message about an unknown name."""
    return f'; did you mean "{guess}"?' if guess else ""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is most like `name` in any case of letters; None when none is much
    like it.
    """
    if len(name) > LONGEST_NAME:
        return None
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.7)
    return by_lower[close[0]] if close else None
