"""Errors that are also what DeepSpeed's callers catch. DeepSpeed asserts where zerort raises, so
each error of a call becomes one that is an `AssertionError` too, of the same class otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from zerort import errors

__all__ = ["ConfigError", "NoFolder", "StepError", "as_deepspeed_fails", "deepspeeds_failures"]

Call = TypeVar("Call", bound=Callable[..., Any])


class ConfigError(errors.ConfigError, AssertionError):
    """`zerort.ConfigError`, to a caller that catches an assertion too."""


class StepError(errors.StepError, AssertionError):
    """`zerort.StepError`, to a caller that catches an assertion too."""


class NoFolder(errors.CheckpointError, ValueError):
    """`zerort.CheckpointError` for a checkpoint without a folder, to a caller that catches a
    `ValueError` too.
    """


_KINDS: dict[type[Exception], type[Exception]] = {
    errors.ConfigError: ConfigError,
    errors.StepError: StepError,
}


@contextmanager
def deepspeeds_failures() -> Iterator[None]:
    """Within, `ConfigError`s and `StepError`s are assertions too."""
    try:
        yield
    except (errors.ConfigError, errors.StepError) as error:
        kind = _KINDS.get(type(error))
        if kind is None:
            raise  # a class of its own, which callers of zerort know
        raise kind(*error.args).with_traceback(error.__traceback__) from error.__cause__


def as_deepspeed_fails(call: Call) -> Call:
    """`call`, whose errors are."""

    @functools.wraps(call)
    def calling(*args: Any, **kwargs: Any) -> Any:
        with deepspeeds_failures():
            return call(*args, **kwargs)

    return calling  # type: ignore[return-value]
