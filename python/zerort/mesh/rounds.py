"""Small rounds among ranks within an attempt that all have to succeed in.

What it guarantees: where a rank has failed and waits in the agreement about that attempt, who comes
to a round hears its reason there, and raises `Failed`; no rank begins what that one would have to
take part in. What it does not do: it agrees about nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zerort.mesh.consensus import Failed
from zerort.mesh.control import GlooControl

__all__ = ["Told", "come", "first_reason", "heard"]


@dataclass(frozen=True)
class Told:
    """What a rank tells the others: why it cannot, or what they need."""

    why_not: str | None
    value: Any = None


def heard(control: GlooControl, mine: Told) -> list[Told]:
    """What each rank has told, by rank. Raises `Failed` and `CommError`."""
    found, members = control.gather_objects(mine), control.groups.members
    for rank, each in enumerate(found):
        if not isinstance(each, Told):
            # It tells, where ranks agree whether all have come so far, that it has not.
            raise Failed(
                f"rank {members.job_rank}: rank {members.ranks[rank]} has failed before ranks "
                f"have memory for what they send: {each}",
                found,
            )
    return found


def come(control: GlooControl) -> None:
    """Returns when all ranks have come so far. Raises as `heard`."""
    heard(control, Told(None))


def first_reason(control: GlooControl, why_not: str | None) -> str | None:
    """Of those that ranks have; None where none has one. Raises as `heard`."""
    found = heard(control, Told(why_not))
    return next((each.why_not for each in found if each.why_not is not None), None)
