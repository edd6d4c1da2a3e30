"""Errors that are also what DeepSpeed's callers catch. DeepSpeed asserts where zerort raises, so
each error of a call becomes one that is an `AssertionError` too, of the same class otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from zerort.errors import ConfigError, StepError

__all__ = ["as_deepspeed_fails"]

Call = TypeVar("Call", bound=Callable[..., Any])


class _ConfigError(ConfigError, AssertionError):
    pass


class _StepError(StepError, AssertionError):
    pass


def as_deepspeed_fails(call: Call) -> Call:
    """`call`, whose `ConfigError`s and `StepError`s are assertions too."""

    @functools.wraps(call)
    def calling(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except (ConfigError, StepError) as error:
            kind = {ConfigError: _ConfigError, StepError: _StepError}.get(type(error))
            if kind is None:
                raise  # a class of its own, which callers of zerort know
            raise kind(*error.args).with_traceback(error.__traceback__) from error.__cause__

    return calling  # type: ignore[return-value]


for _kind in (_ConfigError, _StepError):
    _kind.__name__ = _kind.__qualname__ = _kind.__name__.lstrip("_")
