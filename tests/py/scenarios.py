"""Scenarios: functions of a rank, named for what holds at every stage. A module's scenarios run one
after another in one group, so that what one leaves behind would break the next.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from terms import DEFAULTS

Scenario = Callable[[int], None]


def scenarios_of(names: dict[str, Any]) -> list[Scenario]:
    """A module's public functions of one argument, `rank`; of its `globals()`, in order."""
    return [
        found
        for found in list(names.values())
        if inspect.isfunction(found) and list(inspect.signature(found).parameters) == ["rank"]
        if found.__module__ == names["__name__"]
    ]


def run_each(
    rank: int, world: int, stage: int, scenarios: Sequence[Scenario], goes_on: bool
) -> dict[str, str]:
    """What each scenario raised at this stage, by its name. Where it does not go on after the
    first, what comes behind that is not in it.
    """
    DEFAULTS["stage"] = stage
    raised = {}
    for scenario in scenarios:
        try:
            scenario(rank)
        except BaseException:
            raised[scenario.__name__] = traceback.format_exc()
            if not goes_on:
                break
    return raised
