"""All ranks or none: whatever one rank raises, every rank raises, at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

import ranks
from zerort.errors import CheckpointError, CommError, ConfigError, PlanError
from zerort.mesh import Consensus, meet

SOON = 10.0  # seconds; the time-out is 60


class Silent(Exception):
    """Has no words."""

    def __str__(self) -> str:
        return ""


class Unprintable(Exception):
    """Fails when it is asked for its words."""

    def __str__(self) -> str:
        raise KeyError("words")


class Aborted(BaseException):
    """As an event loop's, or a debugger's."""


ERRORS: dict[str, tuple[Callable[[], BaseException], str]] = {
    "one_of_ours": (lambda: ConfigError("no such key"), "rank 1: no such key"),
    "of_the_system": (lambda: FileNotFoundError(2, "gone", "file"), "rank 1: [Errno 2] gone: "),
    "KeyError": (lambda: KeyError("recipe"), "rank 1: KeyError: 'recipe'"),
    "AssertionError": (AssertionError, "rank 1: AssertionError"),
    "StopIteration": (StopIteration, "rank 1: StopIteration"),
    "RecursionError": (lambda: RecursionError("deep"), "rank 1: RecursionError: deep"),
    "silent": (Silent, "rank 1: Silent"),
    "unprintable": (Unprintable, "rank 1: Unprintable: (its message cannot be read: KeyError)"),
    "KeyboardInterrupt": (KeyboardInterrupt, "rank 1: KeyboardInterrupt"),
    "SystemExit": (lambda: SystemExit(3), "rank 1: SystemExit: 3"),
    "Aborted": (lambda: Aborted("stop"), "rank 1: Aborted: stop"),
}

Told = tuple[str, str, float]


def told(call: Callable[[], Any]) -> Told:
    """Class, message and seconds of what `call` raises, or its value."""
    start = time.monotonic()
    try:
        kind, message = "", repr(call())
    except BaseException as error:
        kind = type(error).__name__
        message = "" if isinstance(error, Unprintable) else str(error)
    return kind, message, time.monotonic() - start


def attempts(rank: int, world: int) -> dict[str, Told]:
    control = meet(timedelta(seconds=60))
    own, alike = (
        Consensus(control, PlanError),
        Consensus(control, CheckpointError, alike=True),
    )
    found: dict[str, Told] = {}

    def fails(make: Callable[[], BaseException], on: tuple[int, ...] = (1,)) -> Callable[[], Any]:
        def attempt() -> str:
            if rank in on:
                raise make()
            return f"of rank {rank}"

        return attempt

    for name, (make, _) in ERRORS.items():
        for method in ("agree", "gather"):
            found[f"{method} {name}"] = told(partial(getattr(own, method), "no", fails(make)))
            found[f"alike {method} {name}"] = told(
                partial(getattr(alike, method), "no", fails(make))
            )
    everywhere = fails(lambda: ValueError("the same"), on=(0, 1))
    found["everywhere"] = told(lambda: alike.agree("no", everywhere))
    found["kind"] = told(lambda: alike.agree("no", fails(lambda: KeyError("x")), CommError))
    found["agree"] = told(lambda: own.agree("no", fails(ValueError, on=())))
    found["gather"] = told(lambda: own.gather("no", fails(ValueError, on=())))
    found["first"] = told(lambda: own.first("no", fails(ValueError, on=())))
    found["first elsewhere"] = told(lambda: own.first("no", fails(ValueError, on=(1,))))
    found["first fails"] = told(lambda: own.first("no", fails(lambda: KeyError("x"), on=(0,))))
    found["no pickle"] = told(lambda: own.gather("no", lambda: (lambda: 0) if rank else 1))
    found["both lost"] = told(lambda: own.agree("no", fails(lambda: CommError("x"), on=(0, 1))))
    found["after all of them"] = told(lambda: control.gather_objects(rank))
    control.close()
    return found


@ranks.once(None)
def outcomes() -> list[dict[str, Told]]:
    return ranks.run(2, attempts)


@pytest.mark.parametrize("method", ["agree", "gather"])
@pytest.mark.parametrize("name", ERRORS)
def test_the_rank_at_fault_keeps_its_error_and_the_others_have_its_reason(
    name: str, method: str
) -> None:
    innocent, culprit = (part[f"{method} {name}"] for part in outcomes())
    make, reason = ERRORS[name]
    assert culprit[0] == type(make()).__name__
    assert innocent[0] == "PlanError"
    assert innocent[1].startswith(f"no: {reason}")


@pytest.mark.parametrize("name", ERRORS)
def test_alike_means_alike_but_an_interrupt_stays_one(name: str) -> None:
    innocent, culprit = (part[f"alike agree {name}"] for part in outcomes())
    assert innocent[0] == "CheckpointError"
    error = ERRORS[name][0]()
    if isinstance(error, Exception):
        assert culprit[:2] == innocent[:2]
    else:
        assert culprit[0] == type(error).__name__


def test_nobody_waits_for_a_rank_that_has_raised() -> None:
    assert max(seconds for part in outcomes() for _, _, seconds in part.values()) < SOON


def test_results_come_by_rank_or_from_the_first() -> None:
    for rank, part in enumerate(outcomes()):
        assert part["agree"][1] == repr(f"of rank {rank}")
        assert part["gather"][1] == repr(["of rank 0", "of rank 1"])
        assert part["first"][1] == part["first elsewhere"][1] == repr("of rank 0")
        assert part["after all of them"][1] == "[0, 1]"


def test_a_reason_that_all_share_is_told_once_and_the_first_speaks_for_all() -> None:
    for part in outcomes():
        assert part["everywhere"][:2] == ("CheckpointError", "no: ValueError: the same")
        assert part["kind"][:2] == ("CommError", "no: rank 1: KeyError: 'x'")
    culprit, innocent = (part["first fails"] for part in outcomes())
    assert culprit[0] == "KeyError"
    assert innocent[:2] == ("PlanError", "no: KeyError: 'x'")


def test_a_failed_collective_is_not_told_to_ranks_that_have_heard_of_it() -> None:
    for part in outcomes():
        assert part["both lost"][:2] == ("CommError", "x")
        assert part["after all of them"][1] == "[0, 1]"


def test_a_result_that_cannot_be_pickled_is_a_failure_like_any_other() -> None:
    innocent, culprit = (part["no pickle"] for part in outcomes())
    assert innocent[0] == "PlanError"
    assert "rank 1: " in innocent[1]
    assert culprit[0] in ("PicklingError", "AttributeError")
