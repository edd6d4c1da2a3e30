"""Which rank has gone, when a collective has failed: gloo tells an address, a person needs a rank.

Every rank knows every other's process from the start. After a failure it asks for a moment:

    its host     which processes have ended or are stopped
    the board    what the others wait for, which processes their hosts miss, and the last words of
                 those that have ended or did not come

What it guarantees: a rank that runs is never called dead. A process is looked for only where its id
means something; of one on another host, or in another container, no more is said than that it
cannot be reached or did not come. What it does not do: it decides nothing, it words an error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from zerort.mesh.board import Board, Unanswered
from zerort.mesh.last_words import FINISHED, PARTED
from zerort.mesh.process import Process

__all__ = ["Peer", "Peers"]

PATIENCE = 1.0
"""Seconds: a connection closes a little before its process is gone, and time-outs end one after
another.
"""

_POLL = 0.02
_NAMED = 8  # ranks that a sentence has room for
_LATE = (
    "makes fewer steps (which engine.join() allows), waits for something else, or needs longer "
    "than zerort.timeout"
)
_CONSEQUENCES = ("ended with CommError", f"{PARTED} CommError")


@dataclass(frozen=True)
class Peer:
    """A rank's process, and where its last words will be."""

    process: Process
    last_words: str


@dataclass
class Heard:
    """What a rank has found out about the others, by rank."""

    answered: bool
    """Whether the board has."""
    waits: dict[int, str] = field(default_factory=dict)
    fates: dict[int, str] = field(default_factory=dict)
    words: dict[int, str] = field(default_factory=dict)

    def ended(self) -> dict[int, str]:
        """How: in its own words, unless its host knows more."""
        known = {rank: fate for rank, fate in self.fates.items() if "code" in fate}
        words = {
            rank: said for rank, said in self.words.items() if said != FINISHED or rank not in known
        }
        return {**self.fates, **words}


@dataclass(frozen=True)
class Peers:
    """The ranks of a group, as the job numbers them; none before they have met. `name` is the
    engine's own on the board, which is None where ranks have no store in common.
    """

    everyone: Mapping[int, Peer]
    rank: int
    name: str
    board: Board | None

    def among(self, ranks: Sequence[int]) -> Peers:
        """The same of a part of the ranks."""
        return replace(self, everyone={rank: self.everyone[rank] for rank in ranks})

    def apart(self, ranks: Sequence[int]) -> bool:
        """Whether these are on several hosts, by the names of those."""
        return len({self.everyone[rank].process.host for rank in ranks}) > 1

    def explain(self, what: str) -> str:
        """One sentence on why `what`, a collective that this rank waited for, may have failed."""
        if not self.everyone:
            return (
                "a rank has gone, or did not come, before the ranks had met: look at their output"
            )
        heard = self._ask(what)
        ended = heard.ended()
        # Who came and was let down, or says that a peer had gone, has ended for the same reason.
        first = {
            rank: how
            for rank, how in ended.items()
            if rank not in heard.waits and not how.startswith(_CONSEQUENCES)
        }
        if ended:
            found = sorted((first or ended).items())
            return "; ".join(f"{self._named(rank)} {how}" for rank, how in found[:_NAMED])
        return self._judge(what, heard)

    # Asking.

    def _ask(self, what: str) -> Heard:
        heard, known = Heard(self._post({"rank": self.rank, "waits": what})), 0
        deadline = time.monotonic() + PATIENCE
        while True:
            here = self._fates()
            heard.fates.update(here)
            if heard.answered:
                known = self._read(heard, known)
            if heard.fates or time.monotonic() > deadline:
                break
            time.sleep(_POLL)
        if here:
            self._post({"fates": {str(rank): fate for rank, fate in here.items()}})
        if heard.answered:
            self._find_last_words(heard)
        if self.rank == 0 and not all(map(self._beside, self.everyone)):
            # Its process may hold the store, and what stands there is for other hosts too.
            time.sleep(max(0.0, deadline - time.monotonic()))
        return heard

    def _fates(self) -> dict[int, str]:
        """Of the other processes of this place: which have ended or are stopped."""
        others = (
            (rank, peer.process)
            for rank, peer in self.everyone.items()
            if rank != self.rank and self._beside(rank)
        )
        return {rank: fate for rank, process in others if (fate := process.fate())}

    def _post(self, entry: Mapping[str, object]) -> bool:
        """Whether the board has taken it."""
        if self.board is None:
            return False
        try:
            self.board.post(self._log, json.dumps(entry), PATIENCE)
        except Unanswered:
            return False
        return True

    def _read(self, heard: Heard, known: int) -> int:
        """Takes in what is new; returns how many entries are known then."""
        assert self.board is not None
        try:
            # as long at the end of a wait as before: a busy store is not one that has gone
            entries = self.board.news(self._log, known, PATIENCE)
        except Unanswered:
            heard.answered = False
            return known
        for entry in map(json.loads, entries):
            if entry.get("rank") in self.everyone:  # the engine may have other groups
                heard.waits[entry["rank"]] = entry["waits"]
            for rank, fate in entry.get("fates", {}).items():
                if int(rank) in self.everyone and int(rank) != self.rank:
                    heard.fates[int(rank)] = fate
        return known + len(entries)

    def _find_last_words(self, heard: Heard) -> None:
        """Of those that have ended, else of those that did not come."""
        assert self.board is not None
        asked = sorted(heard.fates) or self._silent(heard)
        keys = {self.everyone[rank].last_words: rank for rank in asked[: 8 * _NAMED]}
        try:
            found = self.board.find(keys, PATIENCE)
        except Unanswered:
            heard.answered = False
            return
        heard.words.update({keys[key]: words for key, words in found.items()})

    @property
    def _log(self) -> str:
        return f"zerort/{self.name}"

    # Judging.

    def _judge(self, what: str, heard: Heard) -> str:
        """No peer is known to have ended."""
        elsewhere = [
            f"{self._named(rank)} waited for {other}"
            for rank, other in sorted(heard.waits.items())
            if other != what and rank != self.rank
        ]
        # On a slow network the buckets under way may not be the same ones.
        parted = {_operation(waits) for waits in [what, *heard.waits.values()]} != {
            _operation(what)
        }
        return "; ".join([*self._missing(heard, parted), *elsewhere[:_NAMED]])

    def _missing(self, heard: Heard, parted: bool) -> list[str]:
        silent = self._silent(heard)
        here = [rank for rank in silent if self._beside(rank)]
        there = [rank for rank in silent if rank not in here]
        sentences = []
        if there:
            store = "" if heard.answered else ", and the job's store does not answer either"
            sentences.append(
                f"{self._all(there)} cannot be reached or did not come to this point{store}: look "
                "at the network between the hosts, and at what those ranks do"
            )
        elif here and not heard.answered:
            return [
                "every rank of this host is running, but could not be asked what it waits for: one "
                f"of them {_LATE}"
            ]
        if here and heard.answered:
            sentences.append(
                f"{self._all(here)} is running but did not come to this point: it {_LATE}"
            )
        if not silent and not parted:
            sentences.append(
                "every rank waited for it, or for another bucket: the network between them is cut, "
                "or needs longer than zerort.timeout"
            )
        return sentences

    def _silent(self, heard: Heard) -> list[int]:
        """Who has not said what it waits for."""
        return [rank for rank in self.everyone if rank not in heard.waits and rank != self.rank]

    def _beside(self, rank: int) -> bool:
        """Whether that process can be seen from here."""
        return self.everyone[rank].process.beside(self.everyone[self.rank].process)

    def _all(self, ranks: Sequence[int]) -> str:
        more = len(ranks) - _NAMED
        shown: Iterable[str] = map(self._named, ranks[:_NAMED])
        return ", ".join(shown) + (f" and {more} more" if more > 0 else "")

    def _named(self, rank: int) -> str:
        mine, other = self.everyone[self.rank].process, self.everyone[rank].process
        where = ""
        if other.host != mine.host:
            where = f" on {other.host}"
        elif not self._beside(rank):
            where = f" in another container or machine named {other.host}"
        return f"rank {rank} (process {other.pid}{where})"


def _operation(what: str) -> str:
    """Without the bucket."""
    return what.partition(" of ")[0]
