"""All ranks or none: an attempt that succeeds on every rank, or fails on every rank.

What it guarantees: no rank goes on alone after a peer has failed, and no rank waits for one that
has raised. What became of each rank's attempt is gathered before anyone acts on it, whatever was
raised: an interrupt reaches the peers as a `KeyError` does.

With `patience` a rank that works on its attempt is waited for beyond the communicator's time-out;
the attempt may not use the communicator then.

An attempt may let ranks exchange something by itself. Who waits in there for a rank that has failed
hears its reason in the answer's place, and raises `Failed`: the agreement has been held then.

What it does not do: it undoes nothing where the attempt succeeded, and it adds no time-out of its
own. A rank that dies in its attempt is found as in any other collective.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from zerort.errors import CommError, ZerortError
from zerort.mesh.patience import Gathers, Patience, together

__all__ = ["Consensus", "Failed"]

T = TypeVar("T")

_NAMED = 8  # ranks whose reasons a message has room for


class Failed(CommError):
    """Within an attempt: `found`, by rank, is not what was asked for, but what became of some
    rank's attempt.
    """

    def __init__(self, message: str, found: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.reasons = [*map(_reason_in, found)]


@dataclass(frozen=True)
class Consensus:
    """Decisions of the ranks of `comm`.

    Where an attempt raised on some rank, every rank raises: the others `kind`, with a headline and
    the reason and number of each rank at fault; a rank at fault its own error, or with `alike` the
    same as the others. An interrupt stays an interrupt on its own rank.
    """

    comm: Gathers
    kind: type[Exception]
    alike: bool = False
    patience: Patience | None = None

    def agree(
        self, headline: str, attempt: Callable[[], T], kind: type[Exception] | None = None
    ) -> T:
        """Runs `attempt` on every rank; returns this rank's result once all have one."""
        mine = self._attempted(attempt)
        found = mine.heard or self.comm.gather_objects(mine.reason)
        self._refuse(headline, mine, [*map(_reason_in, found)], kind)
        return mine.value

    def gather(
        self, headline: str, attempt: Callable[[], T], kind: type[Exception] | None = None
    ) -> list[T]:
        """`agree`, but returns every rank's result, by rank. Results are pickled."""
        # Pickled within the attempt: a result that cannot be is a failure like any other.
        mine = self._attempted(lambda: pickle.dumps(attempt()))
        found = mine.heard or self.comm.gather_objects((mine.reason, mine.value))
        self._refuse(headline, mine, [*map(_reason_in, found)], kind)
        return [pickle.loads(value) for _, value in found]

    def first(
        self, headline: str, attempt: Callable[[], T], kind: type[Exception] | None = None
    ) -> T:
        """Runs `attempt` on rank 0 and returns its result, pickled, on every rank."""
        mine = self._attempted(lambda: pickle.dumps(attempt()) if self.comm.rank == 0 else b"")
        found = mine.heard or self.comm.gather_objects((mine.reason, mine.value))
        reasons = [*map(_reason_in, found)]
        # Rank 0 speaks for all: its number would say nothing.
        self._refuse(headline, mine, reasons[:1] if any(reasons[:1]) else reasons, kind)
        result: T = pickle.loads(found[0][1])
        return result

    def _attempted(self, attempt: Callable[[], T]) -> _Attempt[T]:
        if self.patience is None:
            return _attempted(attempt)
        return together(self.comm, self.patience, lambda: _attempted(attempt))

    def _refuse(
        self,
        headline: str,
        mine: _Attempt[Any],
        reasons: list[str | None],
        kind: type[Exception] | None,
    ) -> None:
        """Raises unless every reason is None."""
        failed = {rank: reason for rank, reason in enumerate(reasons) if reason is not None}
        if not failed:
            return
        try:
            if mine.error is not None and not (self.alike and isinstance(mine.error, Exception)):
                raise mine.error
            same = len(failed) == len(reasons) and len(set(reasons)) == 1
            why = reasons[0] if same else _listed(failed)
            raise (kind or self.kind)(f"{headline}: {why}") from mine.error
        finally:
            mine.error = None  # its traceback holds this frame, which would hold it in turn


@dataclass
class _Attempt(Generic[T]):
    """A value, or the error in its place."""

    value: T
    error: BaseException | None = None
    reason: str | None = None
    heard: list[Any] = field(default_factory=list)
    """Reasons by rank, where they came before this rank could be asked."""


def _attempted(attempt: Callable[[], T]) -> _Attempt[T]:
    try:
        return _Attempt(attempt())
    except Failed as failed:
        return _Attempt(None, heard=failed.reasons)  # type: ignore[arg-type]
    except CommError:
        raise  # the peers hear of it the same way, and to ask them might take another time-out
    except BaseException as error:
        return _Attempt(None, error, _reason(error))  # type: ignore[arg-type]


def _reason_in(message: object) -> str | None:
    """What a rank says of its attempt; who still exchanges something within has not failed."""
    said = message[0] if isinstance(message, tuple) else message
    return said if isinstance(said, str) else None


def _reason(error: BaseException) -> str:
    """For people on other ranks; a user's exception may fail to print."""
    kind = type(error).__name__
    try:
        text = str(error)
    except Exception as failure:
        text = f"(its message cannot be read: {type(failure).__name__})"
    speaks = isinstance(error, ZerortError) or (isinstance(error, OSError) and error.errno)
    if not text:
        return kind
    return text if speaks else f"{kind}: {text}"


def _listed(failed: dict[int, str]) -> str:
    shown = list(failed.items())[:_NAMED]
    more = len(failed) - len(shown)
    listed = "; ".join(f"rank {rank}: {reason}" for rank, reason in shown)
    return f"{listed}; and {more} more ranks" if more else listed
