"""What goes to another process by pickle: errors, and names that DeepSpeed has and zerort has not.
A pool's worker and a data loader's hand errors back so.
"""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from typing import Any

import pytest

import zerort
from zerort.compat.deepspeed.failures import as_deepspeed_fails
from zerort.compat.deepspeed.placeholder import placeholder
from zerort.errors import ConfigError, StepError, ZerortError

for _module in pkgutil.walk_packages(zerort.__path__, "zerort."):
    if not _module.name.endswith("__main__"):
        try:
            importlib.import_module(_module.name)
        except ImportError:  # of a package that is not installed here
            continue


def kinds(base: type[ZerortError] = ZerortError) -> list[type[ZerortError]]:
    return [base, *(kind for derived in base.__subclasses__() for kind in kinds(derived))]


@pytest.mark.parametrize("kind", dict.fromkeys(kinds()), ids=lambda kind: kind.__qualname__)
def test_every_error_comes_back_with_what_it_said(kind: type[ZerortError]) -> None:
    error = kind("rank 1: no room")
    error.__notes__ = ["seen before"]  # as add_note does, from Python 3.11 on
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert (str(back), back.__notes__) == ("rank 1: no room", ["seen before"])


@pytest.mark.parametrize("kind", [ConfigError, StepError])
def test_an_error_of_the_alias_comes_back_as_an_assertion(kind: type[Exception]) -> None:
    @as_deepspeed_fails
    def call() -> None:
        raise kind("no room")

    with pytest.raises(AssertionError) as caught:
        call()
    back = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(back, AssertionError)
    assert isinstance(back, kind)
    assert type(back).__name__ == kind.__name__


def test_a_name_that_is_missing_is_the_same_wherever_it_is_read() -> None:
    name: Any = placeholder("deepspeed.pipe.PipelineModule")
    assert placeholder("deepspeed.pipe.PipelineModule") is name
    assert name.inner is name.inner
    for each in (name, name.inner):
        assert pickle.loads(pickle.dumps(each)) is each


class Derived(placeholder("deepspeed.pipe.PipelineModule")):  # type: ignore[misc]
    """Of the user's own."""


def test_a_class_of_the_users_own_over_one_is_found_by_its_own_name() -> None:
    assert pickle.loads(pickle.dumps(Derived)) is Derived
