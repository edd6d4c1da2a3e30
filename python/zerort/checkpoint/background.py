"""A save beside training: what has been copied is written on a thread of its own, by the protocol
of `save`, with a control group of its own for the votes.

    begin    all ranks   is there memory for the copies everywhere? copy, start the writer
    writer   all ranks   the whole of `Save.run`, at a pace that training hardly notices; ends by
                         itself
    failed   a step      asked for the vote, so that all ranks raise at one step
    settle   all ranks   wait for the writer; raise its failure on all of them

What it guarantees: one save is under way at a time, and its failure is raised on every rank, at the
boundary of a step or at the next call that all ranks make together, or logged where no call comes
any more. It costs no step: the engine goes on. The thread is no daemon, so the interpreter waits
for it at its end, and nothing is cut off; peers hear of that end before (`farewell`). Where
training leaves no processor idle, writing takes a small share of one (`pace`), and all that it can
get once a rank waits for it.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

import torch

from zerort.checkpoint.copies import Copies, bytes_of
from zerort.checkpoint.farewell import Farewell
from zerort.checkpoint.pace import Pace
from zerort.checkpoint.snapshot import Snapshot
from zerort.errors import CheckpointError
from zerort.mesh import Consensus, Control, beside
from zerort.mesh.process import this_process
from zerort.platforms import HERE
from zerort.step.interrupts import held
from zerort.trace import TraceSink

__all__ = ["TRACK", "Background", "hurry"]

_log = logging.getLogger("zerort")

TRACK = "checkpoint"
"""The lane of a trace on which writing stands."""
_SHARE = 0.75
"""Of the memory that is free, what copies may take at most: the files' pages want some too."""
_SOON = 10.0
"""Seconds within which a writer ends whose peer's has failed, unless it stands still."""

Write = Callable[[Control, Snapshot, Callable[[], None]], None]
"""Writes a snapshot with votes on a control group, and calls the third between pieces of work."""


@dataclass(frozen=True)
class _Room:
    """What a rank brings to the decision whether there is memory."""

    place: str
    """Where memory is shared."""
    needs: int
    """Bytes beyond those that it has."""
    free: int | None
    votes: bool
    """Whether it has a group for the votes."""


class _Failure:
    """Of a save, until it has been raised."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.abandoned = False
        self._process = os.getpid()

    def say(self) -> None:
        """Where no call comes any more that could raise it."""
        self.abandoned = True
        if self.text is not None and self._process == os.getpid():
            text, self.text = self.text, None
            _log.error("%s", text)


class Writer(threading.Thread):
    """Does one piece of work once it is let `go`, and keeps what that raised."""

    def __init__(self, what: str, failure: _Failure) -> None:
        super().__init__(name="zerort-checkpoint")
        self.what = what
        self.ended = threading.Event()
        self.pace = Pace()
        self._failure = failure
        self._may = threading.Event()
        self._work: Callable[[], None] | None = None
        self._process = os.getpid()

    def go(self, work: Callable[[], None] | None) -> None:
        """Does `work`, or nothing; once."""
        if not self._may.is_set():
            self._work = work
            self._may.set()

    def run(self) -> None:
        try:
            while not self._may.wait(1.0):
                if not threading.main_thread().is_alive():
                    return  # the main thread has ended without letting it go
            if self._work is not None:
                self._work()
        except BaseException as error:
            self._failure.text = _text(self.what, error)
        finally:
            self._work = None  # and what it holds
            self.ended.set()
            if self._failure.abandoned:
                self._failure.say()

    def wait(self, seconds: float | None = None) -> bool:
        """Until it has ended, which it hurries to; whether it has. In a fork of its process there
        is none.
        """
        hurry()
        return self._process != os.getpid() or self.ended.wait(seconds)


def hurry() -> None:
    """Before a call waits: no writer of this process rests any more. What is waited for may have to
    wait for the save of another engine.
    """
    for thread in threading.enumerate():
        if isinstance(thread, Writer):
            thread.pace.hurry()


def _text(what: str, error: BaseException) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{what} was not saved: {type(error).__name__}: {error}"


class Background:
    """Of one engine, whose ranks are those of `control`, and its state on `place`."""

    def __init__(
        self, control: Control, place: torch.device, patience: timedelta, sink: TraceSink
    ) -> None:
        self._control, self._place = control, place
        self._patience, self._sink = patience, sink
        self._ranks = Consensus(control, CheckpointError, alike=True)
        self._copies: Copies | None = None
        self._votes: Control | None = None
        self._writer: Writer | None = None
        self._failure = _Failure()
        self.part: Callable[[], None] = lambda: None
        """Where the program ends before a save does: tells peers that this rank has gone."""
        self._said = self._used = False
        finalizer = weakref.finalize(self, self._failure.say)
        finalizer.atexit = True

    # All ranks.

    def open(self) -> None:
        """Makes the group for the votes. Raises `CommError`."""
        if self._votes is not None:
            self._votes.close(waits=False)
        self._votes = None
        self._votes = beside(self._control, self._patience)

    def begin(self, what: str, snapshot: Snapshot, write: Write) -> bool:
        """Copies `snapshot` and has `what` written by `write`; behind `settle`. Returns False, with
        nothing begun, where the memory of a rank is short. Ctrl-C waits until it is begun.

        Raises `CheckpointError` on all ranks where a copy fails on one.
        """
        self._used = True
        if self._writer is not None:
            self._writer.wait()  # for pages
        copies = self._copies = self._copies or Copies(self._place)
        headline = f"{what} was not saved"
        rooms = self._ranks.gather(headline, lambda: self._room(copies, snapshot))
        if not all(room.votes for room in rooms):
            self.open()
        if (short := _short(rooms)) is not None:
            self._say_short(short)
            return False
        writer = Writer(what, self._failure)
        with held() as interrupts:
            try:
                copied = self._ranks.gather(
                    headline, lambda: self._started(copies, snapshot, writer)
                )
            except BaseException:
                writer.go(None)
                raise
            if all(copied):
                self._go(writer, snapshot, write)
            else:
                writer.go(None)
        interrupts.run()
        if not all(copied):
            self._say_short(f"rank {copied.index(False)} cannot get it")
        return all(copied)

    def settle(self, call: str) -> None:
        """Waits until nothing is being written, before `call`. Raises `CheckpointError` on all
        ranks where a save has failed that has not been raised yet.
        """
        if self._used:
            headline = f"{call} was not begun, because an asynchronous save before it has failed"
            try:
                self._ranks.agree(headline, self._finish)
            except CheckpointError:
                self._taken()  # where a peer has gone it has not been raised, and `close` says it
                raise

    # This rank.

    def failed(self) -> bool:
        """Whether a save has failed on this rank, and that has not been raised."""
        return self._failure.text is not None

    def refuse(self, ranks: Sequence[int]) -> None:
        """At the end of a step in whose vote these `ranks` have said that a save failed: raises
        `CheckpointError`.
        """
        if self._writer is not None and self._writer.wait(_SOON):
            self._writer = None
        text = self._taken() or f"on rank {ranks[0]}, whose error says why"
        raise CheckpointError(f"an asynchronous save has failed, and the step stands: {text}")

    def prepare(self, nbytes: int) -> None:
        """Has a writer make room for copies of so many bytes, where that is no question."""
        free = HERE.free_memory()
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self._control.world))
        if free is None or nbytes * ranks > _SHARE * free or self._writer is not None:
            return
        copies = self._copies = Copies(self._place)
        writer = Writer("memory for copies", _Failure())

        def touch() -> None:
            copies.reserve(nbytes)
            copies.touch(writer.pace.rest)

        with suppress(RuntimeError):  # no more threads: the save will say so
            writer.start()
            writer.go(touch)
            self._writer = writer

    def close(self) -> str | None:
        """Waits for the writer and gives all back. Returns why the last save failed, unless that
        has been raised.
        """
        if self._writer is not None:
            self._writer.wait()
        self._writer = self._copies = None
        if self._votes is not None:
            votes, self._votes = self._votes, None
            votes.close(waits=False)
        return self._taken()

    # What these need.

    def _room(self, copies: Copies, snapshot: Snapshot) -> _Room:
        process = this_process()
        needs = max(0, bytes_of(snapshot.tensors) - copies.nbytes)
        return _Room(
            f"{process.host} {process.place}", needs, HERE.free_memory(), self._votes is not None
        )

    def _started(self, copies: Copies, snapshot: Snapshot, writer: Writer) -> bool:
        try:
            copies.reserve(bytes_of(snapshot.tensors))
        except (MemoryError, RuntimeError):
            return False
        snapshot.tensors[:] = copies.copy(snapshot.tensors)
        try:
            writer.start()
        except RuntimeError:  # no more threads
            return False
        return True

    def _go(self, writer: Writer, snapshot: Snapshot, write: Write) -> None:
        votes, sink, what = self._votes, self._sink, writer.what
        assert votes is not None, "begin() opens the group"

        def work() -> None:
            begun = sink.now()
            try:
                write(votes, snapshot, writer.pace.rest)
            finally:
                sink.span(TRACK, what, begun, sink.now())

        writer.go(work)
        self._writer = writer
        with suppress(RuntimeError):  # no more threads: peers hear of an end when all is written
            Farewell(writer.ended, self.part).start()

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.wait()
            self._writer = None
        if self._failure.text is not None:
            raise CheckpointError(self._failure.text)

    def _taken(self) -> str | None:
        """The failure, which is raised now."""
        text, self._failure.text = self._failure.text, None
        if text is not None:
            # a group on which a rank has gone or was late is in no order any more
            self._drop_votes()
        return text

    def _drop_votes(self) -> None:
        if self._votes is not None:
            votes, self._votes = self._votes, None
            votes.close(waits=False)

    def _say_short(self, reason: str) -> None:
        if self._control.rank == 0 and not self._said:
            self._said = True
            _log.warning(
                "memory is short for a copy of what is saved (%s): asynchronous saves are "
                "synchronous until there is more",
                reason,
            )


def _short(rooms: Sequence[_Room]) -> str | None:
    """Where memory is short, and by how much; None where it is nowhere."""
    for place, ranks in groupby(sorted(rooms, key=lambda room: room.place), lambda r: r.place):
        here = list(ranks)
        needs = sum(room.needs for room in here)
        free = min((room.free for room in here if room.free is not None), default=None)
        if free is not None and needs > _SHARE * free:
            return (
                f"{needs / 1e9:.2f} GB on {place.partition(' ')[0]}, where {free / 1e9:.2f} GB "
                "are free"
            )
    return None
