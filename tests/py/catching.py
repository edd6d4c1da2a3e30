"""Errors as values: caught on a rank, carried to the parent, and read there."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from zerort.errors import ZerortError


def caught(call: Callable[[], Any]) -> Exception | None:
    """The error of a call, ready to be pickled."""
    try:
        call()
    except Exception as error:
        return (
            error.with_traceback(None)
            if isinstance(error, ZerortError)
            else type(error)(str(error))
        )
    return None


def assert_told(error: Exception | None, kind: type[Exception], *words: str) -> None:
    """The error is of this kind and its message has these words, in this order."""
    assert isinstance(error, kind), repr(error)
    assert re.search("(?s)" + ".*".join(map(re.escape, words)), str(error)), str(error)
