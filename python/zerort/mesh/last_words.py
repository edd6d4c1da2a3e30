"""What a rank leaves in the job's store when it ends, so that its peers can say why it has gone.

A rank that raises outside the engine's calls, or comes to the end of its program before the others,
takes part in no vote any more. What it guarantees: an interpreter that ends in order leaves one
sentence, whatever ended it, in the main program and in a process of `multiprocessing`. It waits for
no answer, changes no hook of Python's, and keeps its silence when the store has gone.

What it does not do: a process that is killed, or leaves by `os._exit`, says nothing. Whether
`sys.exit` was called with a code cannot be seen from inside a main program.
"""

from __future__ import annotations

import os
import sys
import traceback
import uuid
from multiprocessing.util import Finalize

from zerort.mesh.board import Board, Unanswered

__all__ = ["FINISHED", "PARTED", "leave", "leave_at_exit", "leave_before_the_end"]

FINISHED = (
    "has finished its program, or left it by sys.exit (engine.join() lets ranks end unevenly)"
)

PARTED = "gave its engine back after"
"""What the words of a rank begin with that has failed, and whose process goes on."""

_LONGEST = 600  # characters of an exception's message
_PATIENCE = 0.5  # seconds
_FIRST = 1000  # before what others have to finish at the end

_left: dict[int, tuple[str, list[Board]]] = {}
"""By process id, for a fork is another process: the key, and the board."""


def leave_at_exit(board: Board) -> str:
    """From here on this process leaves its last words on `board`; returns the key to find them."""
    pid = os.getpid()
    if pid not in _left:
        _left.clear()
        _left[pid] = (_new_key(), [])
        # It runs at the end of the main program, and at the end of a process of multiprocessing,
        # where atexit's functions do not; there the exception is still being handled.
        Finalize(None, _leave, exitpriority=_FIRST)
    key, boards = _left[pid]
    boards[:] = [board]
    return key


def leave(error: BaseException) -> None:
    """Leaves now why this rank takes part in nothing any more, because of `error`; its process may
    go on, and what it begins anew has a key of its own.
    """
    pid = os.getpid()
    if pid in _left:
        key, boards = _left[pid]
        _write(key, f"{PARTED} {_described(error)}", boards)
        _left[pid] = (_new_key(), boards)


def leave_before_the_end() -> None:
    """The main program has ended, and something else goes on: leaves now what it would have left
    behind that.
    """
    if os.getpid() in _left:
        _leave()


def _new_key() -> str:
    return f"zerort/last words/{uuid.uuid4().hex}"


def _leave() -> None:
    if (left := _left.pop(os.getpid(), None)) is None:
        return
    key, boards = left
    _write(key, _words(sys.exc_info()[1] or _uncaught()), boards)


def _write(key: str, words: str, boards: list[Board]) -> None:
    for board in boards:
        try:
            board.leave(key, words, _PATIENCE)
        except Unanswered:
            return


def _uncaught() -> BaseException | None:
    """What has ended the main program; Python keeps it before it calls sys.excepthook."""
    if hasattr(sys, "ps1"):
        return None  # in an interactive session it is only the last one shown
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return error if isinstance(error, BaseException) else None


def _words(error: BaseException | None) -> str:
    """A verb phrase."""
    if isinstance(error, SystemExit) and error.code not in (None, 0):
        before = error.__context__
        earlier = "" if before is None else f" after {_described(before)}"
        return f"called sys.exit({str(error.code)[:_LONGEST]}){earlier}"
    if error is None or isinstance(error, SystemExit):
        return FINISHED
    return f"ended with {_described(error)}"


def _described(error: BaseException) -> str:
    try:
        message = str(error)[:_LONGEST]
    except Exception:  # the user's own class
        message = "(its message cannot be read)"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    name = type(error).__name__
    return f"{name}: {message}{where}" if message else f"{name}{where}"
