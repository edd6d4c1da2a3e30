"""An engine beside collectives of its caller's own, on the caller's groups: the calls that bring
ranks to a gate before each (`mesh.gate`).

What it guarantees: a rank that waits for a peer's collective hears why that will not come, be it a
failure in the engine, or one that the caller announces. What it does not do: it makes none of the
caller's collectives, and without `open_gate` nothing is sent for them but at stage 3.
"""

from __future__ import annotations

from datetime import timedelta

from zerort.errors import CommError
from zerort.mesh import Gate
from zerort.step.readings import Components
from zerort.step.transaction import Transaction

__all__ = ["Gated"]


class Gated:
    """Mixed into the engine."""

    _parts: Components
    _transaction: Transaction

    def open_gate(self, timeout: timedelta) -> None:
        """For a caller with collectives of its own beside the engine, which then `meet`s before
        each: who waits for this rank there hears of its failure at once, and nobody waits longer
        than `timeout`. All ranks call it, once.

        From here on a micro-batch that fails on this rank is the engine's last: the other ranks
        raise its reason at their next call, and only `destroy` is left.
        """
        self._transaction.gate = Gate(self._parts.mesh.control, timeout)

    def meet(self, call: str) -> None:
        """Before a collective of the caller's own, which errors name as `call` and all ranks make:
        returns when all have come to it, at stage 3 between passes as a part of the evaluations
        that others still run. Nothing behind `destroy`, and without `open_gate` nothing below stage
        3 and within a forward or a backward.

        Raises `CommError` with the reason of a rank that has failed, and at stage 3 `StepError`
        where ranks are at different places.
        """
        self._transaction.meet(call)

    def announce(self, error: BaseException) -> None:
        """This rank has failed outside the engine's calls, and `meet`s once more because of it: who
        waits there, or comes, raises `CommError` with this reason.
        """
        self._transaction.announce(f"{type(error).__name__}: {error}", error)

    def failure(self, what: str, error: Exception) -> CommError:
        """What became of `what`, a collective of the caller's own that raised `error`, in the words
        of the engine's own: which rank has gone, and the reason it left.
        """
        return self._parts.mesh.job.failure(what, error)
