"""Memory that the ranks of one host share: made by one of them, mapped by all, reserved by each.

It is a file without a name. The rank that makes it keeps it open until its peers have opened it
too, through what /proc shows of that process, and then nobody does: the memory belongs to the
processes that map it and ends with the last of them, however they end.

What it guarantees: all ranks get a segment, or each raises `Unshared` with the same reason. A
segment is as long as all have agreed, cannot become shorter, is opened by this user's processes
alone, and has its memory, all zeros: a write into it finds a page. Each rank has read what each
other wrote into its own part, so a host's or a container's name is not believed.

What it does not do: it does not know what lies in it.
"""

from __future__ import annotations

import errno
import importlib
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from zerort import _core
from zerort.mesh.control import GlooControl
from zerort.mesh.process import Process
from zerort.mesh.rounds import Told, heard
from zerort.platforms import HERE

__all__ = ["PAGE", "Unshared", "share"]

PAGE = 4096
_NONCE = 16
_SPARE = 64 << 20
"""Bytes that are left to everything else."""


class Unshared(Exception):
    """Why the ranks of a group do not share this memory; the same on all of them."""


@dataclass(frozen=True)
class _File:
    """An open file of another process's, and what is in it."""

    process: Process
    descriptor: int
    length: int


@dataclass(frozen=True)
class _Wanted:
    """By each rank: so many channels, and bytes of its own, whole pages."""

    channels: int
    memory: int


def share(control: GlooControl, channels: int, memory: int) -> _core.Segment:
    """A segment of `channels` with `memory` bytes for each rank, whole pages. All ranks of the
    group call it, and nothing is under way. Raises `Unshared` and `CommError`.
    """
    wanted = _Wanted(channels, memory)
    with _Descriptors() as opened:
        made = _together(control, lambda: _make(control, opened, wanted))
        segment: list[_core.Segment] = []

        def hold() -> bytes:
            segment.append(_map(control, opened, made[0], wanted))
            return _sign(segment[0], control.rank)

        nonces = _together(control, hold)
        # the file stays open where it was made until all have come here
        _together(control, lambda: _read(segment[0], nonces))
    # gaps between parameters are sent and summed, and nothing is ever packed there
    from_dlpack(segment[0].buffer(control.rank, 0, _NONCE)).zero_()
    return segment[0]


class _Descriptors:
    """What this rank has opened; closed in the end, for a mapping needs none."""

    def __init__(self) -> None:
        self._opened: list[int] = []

    def __enter__(self) -> _Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._opened:
            os.close(descriptor)

    def add(self, descriptor: int) -> int:
        """Returns it."""
        self._opened.append(descriptor)
        return descriptor


def _together(control: GlooControl, attempt: Callable[[], Any]) -> list[Any]:
    """What each rank's attempt returns, by rank. Raises `Unshared` where one has failed."""
    try:
        mine = Told(None, attempt())
    except Exception as error:
        mine = Told(str(error) or type(error).__name__)
    found = heard(control, mine)
    for rank, each in enumerate(found):
        if each.why_not is not None:
            raise Unshared(f"rank {control.groups.members.ranks[rank]}: {each.why_not}")
    return [each.value for each in found]


def _make(control: GlooControl, opened: _Descriptors, wanted: _Wanted) -> _File | None:
    """On the first rank the file; each looks whether there is memory for all."""
    free, total = HERE.free_memory(), control.world * wanted.memory
    if free is not None and free < total + _SPARE:
        raise Unshared(f"{total} bytes of shared memory are wanted and {free} are free")
    length = _core.Segment.length(
        world=control.world, channels=wanted.channels, memory=wanted.memory
    )
    me = _process(control, control.rank)
    if control.rank > 0:
        return None
    descriptor = opened.add(_file())
    os.ftruncate(descriptor, length)
    _seal(descriptor)
    return _File(me, descriptor, length)


def _process(control: GlooControl, rank: int) -> Process:
    peers = control.groups.peers.everyone
    ranks = control.groups.members.ranks
    process, me = peers[ranks[rank]].process, peers[ranks[control.rank]].process
    if not process.place or not process.beside(me):
        raise Unshared(f"its /proc does not show the process of rank {ranks[rank]}")
    return process


def _file() -> int:
    make = getattr(os, "memfd_create", None)
    if make is None:
        raise Unshared("this system has no files without a name")
    descriptor: int = make("zerort", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(descriptor, 0o600)
    return descriptor


def _seal(descriptor: int) -> None:
    """It keeps its length: a mapping behind a file's end would kill who touches it."""
    fcntl = importlib.import_module("fcntl")
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)


def _map(control: GlooControl, opened: _Descriptors, file: _File, wanted: _Wanted) -> _core.Segment:
    """Opens what the first rank has made, and reserves this rank's part of it."""
    path = f"/proc/{file.process.pid}/fd/{file.descriptor}"
    if control.rank == 0:
        descriptor = file.descriptor
    else:
        _process(control, 0)
        descriptor = opened.add(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    world, rank, memory = control.world, control.rank, wanted.memory
    start = file.length - (world - rank) * memory
    _reserve(descriptor, start if rank > 0 else 0, start + memory)
    return _core.Segment(
        descriptor, rank=rank, world=world, channels=wanted.channels, memory=memory
    )


def _reserve(descriptor: int, start: int, end: int) -> None:
    """Pages for this part. Without them the first write to one may be the end of the process."""
    while True:
        try:
            os.posix_fallocate(descriptor, start, end - start)
            return
        except InterruptedError:
            continue
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "?")
            raise Unshared(
                f"{end - start} bytes of shared memory cannot be reserved: {error.strerror} "
                f"({name})"
            ) from error


def _bytes(text: bytes) -> torch.Tensor:
    return torch.tensor([*text], dtype=torch.uint8)


def _sign(segment: _core.Segment, rank: int) -> bytes:
    nonce = secrets.token_bytes(_NONCE)
    from_dlpack(segment.buffer(rank, 0, _NONCE)).copy_(_bytes(nonce))
    return nonce


def _read(segment: _core.Segment, nonces: Sequence[bytes]) -> None:
    for rank, nonce in enumerate(nonces):
        found = bytes(from_dlpack(segment.buffer(rank, 0, _NONCE)).tolist())
        if found != nonce:
            raise Unshared(f"what rank {rank} has written is not what it reads")
