"""Errors that are also what DeepSpeed's callers catch. DeepSpeed asserts where zerort raises, so
each error of a call becomes one that is an `AssertionError` too, of the same class otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from zerort import errors

__all__ = ["ConfigError", "StepError", "as_deepspeed_fails"]

Call = TypeVar("Call", bound=Callable[..., Any])


class ConfigError(errors.ConfigError, AssertionError):
    """`zerort.ConfigError`, to whoever catches an assertion too."""


class StepError(errors.StepError, AssertionError):
    """`zerort.StepError`, to whoever catches an assertion too."""


_KINDS: dict[type[Exception], type[Exception]] = {
    errors.ConfigError: ConfigError,
    errors.StepError: StepError,
}


def as_deepspeed_fails(call: Call) -> Call:
    """`call`, whose `ConfigError`s and `StepError`s are assertions too."""

    @functools.wraps(call)
    def calling(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except (errors.ConfigError, errors.StepError) as error:
            kind = _KINDS.get(type(error))
            if kind is None:
                raise  # a class of its own, which callers of zerort know
            raise kind(*error.args).with_traceback(error.__traceback__) from error.__cause__

    return calling  # type: ignore[return-value]
