"""Which rank has gone, when a collective has failed: gloo tells an address, a person needs a rank.

Every rank knows every other's host and process id from the start. After a failure the processes of this host are
looked at for a moment: one that is gone or a zombie was lost, one that is stopped was stopped. Of other hosts nothing
is known.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Peer", "told"]

Peer = tuple[str, int]
"""Host name and process id."""

_ALL_ARE_THERE = (
    "every rank is running, so one of them has not come to this point: it makes fewer steps, waits for something else, "
    "or needs longer than zerort.timeout"
)

PATIENCE = 1.0
"""Seconds: a connection closes a little before its process is gone."""


def myself() -> Peer:
    """This process."""
    return socket.gethostname(), os.getpid()


def told(peers: Sequence[Peer]) -> str:
    """One sentence on which ranks of this host are gone or stopped, and where else to look."""
    here = socket.gethostname()
    local = {rank: pid for rank, (host, pid) in enumerate(peers) if host == here and pid != os.getpid()}
    deadline = time.monotonic() + PATIENCE
    while not (found := {rank: fate for rank, pid in local.items() if (fate := _fate(pid))}):
        if time.monotonic() > deadline:
            others = sorted({host for host, _ in peers} - {here})
            return f"no rank of this host has gone; look at {', '.join(others)}" if others else _ALL_ARE_THERE
        time.sleep(0.02)
    return "; ".join(f"rank {rank} (process {local[rank]}) {fate}" for rank, fate in found.items())


def _fate(pid: int) -> str | None:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None if _exists(pid) else "has exited"
    return {"Z": "has exited", "X": "has exited", "T": "is stopped", "t": "is stopped"}.get(state)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
