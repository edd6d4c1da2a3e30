"""An attempt on all ranks that succeeds on all or raises the same error on all.

No rank goes on alone after a peer has failed, and no rank waits for one that has raised: what
became of each is gathered before anyone acts on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from zerort.errors import CheckpointError, CommError
from zerort.mesh import Comm

__all__ = ["on_first", "together", "vote"]

T = TypeVar("T")
Kind = type[CheckpointError]


def vote(comm: Comm, what: str, attempt: Callable[[], T], kind: Kind = CheckpointError) -> T:
    """Runs `attempt` on every rank; returns this rank's result once all have one.

    Raises `kind` on all ranks, with each failing rank's reason behind `what`, if it raised on one.
    """
    mine = _attempted(attempt)
    _refuse(what, comm.gather_objects(mine.reason), mine, kind)
    return mine.value


def together(
    comm: Comm, what: str, attempt: Callable[[], T], kind: Kind = CheckpointError
) -> list[T]:
    """`vote`, but returns every rank's result."""
    mine = _attempted(attempt)
    told = comm.gather_objects((mine.reason, mine.value))
    _refuse(what, [reason for reason, _ in told], mine, kind)
    return [value for _, value in told]


def on_first(comm: Comm, what: str, attempt: Callable[[], T], kind: Kind = CheckpointError) -> T:
    """Runs `attempt` on rank 0 and returns its result on every rank. Raises as `vote` does."""
    return together(comm, what, lambda: attempt() if comm.rank == 0 else None, kind)[0]  # type: ignore[return-value]


@dataclass(frozen=True)
class _Attempt(Generic[T]):
    """A value, or the reason why there is none."""

    value: T
    reason: str | None = None
    cause: Exception | None = None


def _attempted(attempt: Callable[[], T]) -> _Attempt[T]:
    try:
        return _Attempt(attempt())
    except CommError:
        raise  # there is nobody left to tell
    except Exception as error:
        known = isinstance(error, (CheckpointError, OSError))
        return _Attempt(None, str(error) if known else f"{type(error).__name__}: {error}", error)  # type: ignore[arg-type]


def _refuse(what: str, reasons: list[str | None], mine: _Attempt[T], kind: Kind) -> None:
    failed = {rank: reason for rank, reason in enumerate(reasons) if reason is not None}
    if not failed:
        return
    same = len(set(failed.values())) == 1
    told = [
        reason if same else f"rank {rank}: {reason}"
        for rank, reason in list(failed.items())[: 1 if same else 8]
    ]
    raise kind(f"{what}: {'; '.join(told)}") from mine.cause
