"""Every exception zerort raises. Each is also the built-in a caller would expect, so `except
ValueError` works too.

The core raises these classes itself. A message names the parameter, key, file or rank, and says
what to do.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CommError",
    "ConfigError",
    "LayoutError",
    "NonFiniteGradient",
    "PlanError",
    "PlanMismatch",
    "StepError",
    "ZerortError",
]


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
