"""Which rank has gone, when a collective has failed: gloo tells an address, a person needs a rank.

Every rank knows every other's host and process id from the start. After a failure two things are
asked, for a moment: of this host, which processes are gone (one that is gone or a zombie was lost,
one that is stopped was stopped); of all hosts, who has left word of what it waited for. A rank that
waited for nothing has not come to the collective at all.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

__all__ = ["Board", "Peer", "Peers", "myself"]

PATIENCE = 1.0
"""Seconds: a connection closes a little before its process is gone, and time-outs end one after
another.
"""

_NOT_HERE = "makes fewer steps, waits for something else, or needs longer than zerort.timeout"


@dataclass(frozen=True)
class Peer:
    """A process of the job."""

    host: str
    process: int


class Board(Protocol):
    """Where ranks leave word for one another without a collective: what is used of
    torch.distributed's Store.
    """

    def set(self, key: str, value: str, /) -> None:
        """Leaves `value`."""

    def get(self, key: str, /) -> bytes:
        """What was left."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all of them were."""


def myself() -> Peer:
    """This process."""
    return Peer(socket.gethostname(), os.getpid())


@dataclass(frozen=True)
class Peers:
    """The ranks of a group, as the job numbers them. `name` is the engine's own on the board."""

    everyone: Mapping[int, Peer]
    rank: int
    name: str
    board: Board | None

    def among(self, ranks: Sequence[int]) -> Peers:
        """The same of a part of the ranks."""
        return replace(self, everyone={rank: self.everyone[rank] for rank in ranks})

    def told(self, what: str) -> str:
        """One sentence on why `what`, a collective that this rank waited for, may have failed."""
        if not self.everyone:
            return "a rank has gone, or cannot be reached, before the ranks had met"
        words: dict[int, str] = {}
        # A board whose host hangs does not answer either: it may only keep a thread waiting that
        # nobody waits for.
        asking = threading.Thread(target=self._exchange, args=(what, words), daemon=True)
        asking.start()
        deadline = time.monotonic() + PATIENCE
        while not (fates := self._fates()):
            if time.monotonic() > deadline:
                return self._judged(what, dict(words))
            time.sleep(0.02)
        return "; ".join(f"{self._named(rank)} {fate}" for rank, fate in fates.items())

    def _fates(self) -> dict[int, str]:
        """Of the other processes of this host: which are gone or stopped."""
        here = self.everyone[self.rank].host
        others = (
            (rank, peer)
            for rank, peer in self.everyone.items()
            if peer.host == here and rank != self.rank
        )
        return {rank: fate for rank, peer in others if (fate := _fate(peer.process))}

    def _exchange(self, what: str, words: dict[int, str]) -> None:
        """Leaves word, and keeps gathering the others'."""
        if self.board is None:
            return
        deadline = time.monotonic() + PATIENCE
        try:
            self.board.set(self._key(self.rank), what)
            while time.monotonic() < deadline and len(words) < len(self.everyone):
                for rank in self.everyone:
                    if rank not in words and self.board.check([self._key(rank)]):
                        words[rank] = self.board.get(self._key(rank)).decode()
                time.sleep(0.05)
        except (RuntimeError, ValueError):
            return  # the board has gone with its host; what came is told

    def _judged(self, what: str, words: Mapping[int, str]) -> str:
        silent = [rank for rank in self.everyone if rank not in words and rank != self.rank]
        elsewhere = [
            f"{self._named(rank)} waited for {word}" for rank, word in words.items() if word != what
        ]
        if not words:
            found = [
                f"every rank of this host is running, so one of them or of another host {_NOT_HERE}"
            ]
        elif silent:
            found = [
                f"{', '.join(map(self._named, silent))} did not come to this point: it {_NOT_HERE}"
            ]
        else:
            found = (
                [] if elsewhere else ["every rank waited for it: look at the network between them"]
            )
        return "; ".join(found + elsewhere)

    def _named(self, rank: int) -> str:
        peer = self.everyone[rank]
        where = "" if peer.host == self.everyone[self.rank].host else f" on {peer.host}"
        return f"rank {rank} (process {peer.process}{where})"

    def _key(self, rank: int) -> str:
        return f"zerort/{self.name}/{rank}"


def _fate(process: int) -> str | None:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None if _exists(process) else "has exited"
    return {"Z": "has exited", "X": "has exited", "T": "is stopped", "t": "is stopped"}.get(state)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
