"""Files in blocks of 1 MiB, each with a hash: written once and hashed meanwhile, read in slices
that are verified.

A block is the unit of trust. A rank that needs a slice of a file reads the blocks that cover it and
no others, and a byte that `BlockReader.read` has delivered belongs to a block whose hash was right.
The hashes themselves stand in the manifest or an index; this module neither stores nor finds them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from zerort.checkpoint.files import Disk
from zerort.errors import CheckpointError

__all__ = ["BLOCK", "BlockReader", "HashedFile", "Hashes", "Want"]

BLOCK = 1 << 20
"""Bytes of a block."""

WhatLiesAt = Callable[[int, int], str]
"""Names what lies between two bytes of a file, for the message about a damaged block."""


@dataclass(frozen=True)
class Hashes:
    """What a file was when it was written: its length and its blocks' xxh3-128, as hexadecimal
    digits.
    """

    bytes: int
    blocks: str
    """32 digits a block, in order; the last block may be short."""

    @property
    def xxh3_128(self) -> str:
        """The file's: the hash of its blocks' digits, so that no byte is hashed twice."""
        return xxhash.xxh3_128_hexdigest(self.blocks.encode())

    def of_block(self, index: int) -> str:
        """The digits of one block."""
        return self.blocks[32 * index : 32 * index + 32]


class HashedFile:
    """A file that is written once, front to back, and hashed on the way. `size` is how long it will
    be, if known.
    """

    def __init__(self, disk: Disk, path: Path, size: int = 0) -> None:
        self._disk, self._path = disk, path
        self._file: int | None = disk.create(path)
        if size:
            try:
                with _naming(path):
                    disk.reserve(self._file, size)
            except OSError:
                self.close()
                raise
        self._block = xxhash.xxh3_128()
        self._digits: list[str] = []
        self._bytes = 0

    def hold(self) -> None:
        """Shows others, until the file is closed, that it is in use."""
        self._disk.hold(self._descriptor())

    @property
    def bytes_written(self) -> int:
        """So far."""
        return self._bytes

    def write(self, data: memoryview | bytes, rest: Callable[[], None] | None = None) -> None:
        """Appends `data`; calls `rest` behind each block."""
        left = memoryview(data).cast("B")
        while left:
            # No chunk crosses the end of a block, and the hash leaves it in the cache for the copy.
            chunk = left[: BLOCK - self._bytes % BLOCK]
            self._block.update(chunk)
            self._bytes += len(chunk)
            if self._bytes % BLOCK == 0:
                self._end_block()
            with _naming(self._path):
                self._disk.write(self._descriptor(), chunk)
            left = left[len(chunk) :]
            if rest is not None:
                rest()

    def finish(self) -> Hashes:
        """Syncs and closes the file. It survives a power loss from here on, once its folder is
        synced too.
        """
        with _naming(self._path):
            self._disk.sync(self._descriptor())
        self.close()
        if self._bytes % BLOCK:
            self._end_block()
        return Hashes(self._bytes, "".join(self._digits))

    def close(self) -> None:
        """Closes the file as it is."""
        if self._file is not None:
            file, self._file = self._file, None
            with _naming(self._path):
                self._disk.close(file)

    def _descriptor(self) -> int:
        assert self._file is not None, "the file is closed"
        return self._file

    def _end_block(self) -> None:
        self._digits.append(self._block.hexdigest())
        self._block.reset()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Calls on descriptors know no name, and the message of a full disk should have one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@dataclass(frozen=True)
class Want:
    """Bytes wanted of a file: as many as `into` holds, from byte `start` on."""

    start: int
    into: memoryview

    @property
    def end(self) -> int:
        """The byte behind the last."""
        return self.start + len(self.into)


class BlockReader:
    """Reads slices of files; verifies each block it reads, and reads none twice in a pass."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._buffer = memoryview(bytearray(BLOCK))
        self.bytes_read = 0
        """From disk, in whole blocks."""

    def read(self, path: Path, hashes: Hashes, wants: Iterable[Want], what: WhatLiesAt) -> None:
        """Fills all `wants` in one pass. Raises `CheckpointError` naming the file and `what` is
        damaged; `OSError`.
        """
        with self._opened(path, hashes.bytes) as file:
            for index, touched in _by_block(wants):
                start = index * BLOCK
                end = min(start + BLOCK, hashes.bytes)
                # A want that covers the block is read in place; the others get a copy.
                whole = next(
                    (want for want in touched if want.start <= start and want.end >= end), None
                )
                block = (
                    whole.into[start - whole.start : end - whole.start]
                    if whole
                    else self._buffer[: end - start]
                )
                self._fill(path, file, start, block)
                if xxhash.xxh3_128_hexdigest(block) != hashes.of_block(index):
                    raise damaged(path, start, end, what)
                for want in touched:
                    if want is not whole:
                        _copy(block, start, want)

    def verify(self, path: Path, hashes: Hashes, what: WhatLiesAt, head: int = 0) -> bytes:
        """Reads all of a file and verifies all blocks. Returns its first `head` bytes. Raises as
        `read` does.
        """
        first = bytearray()
        with self._opened(path, hashes.bytes) as file:
            for start in range(0, hashes.bytes, BLOCK):
                end = min(start + BLOCK, hashes.bytes)
                block = self._buffer[: end - start]
                self._fill(path, file, start, block)
                if xxhash.xxh3_128_hexdigest(block) != hashes.of_block(start // BLOCK):
                    raise damaged(path, start, end, what)
                if start < head:
                    first += block[: head - start]
        return bytes(first)

    def check_size(self, path: Path, nbytes: int) -> None:
        """Raises `CheckpointError` when the file has not the length it was written with."""
        with self._opened(path, nbytes):
            pass

    @contextmanager
    def _opened(self, path: Path, nbytes: int) -> Iterator[int]:
        try:
            file = self._disk.open(path)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        try:
            size = self._disk.size(file)
            if size != nbytes:
                raise CheckpointError(f"{path} has {size} bytes, and {nbytes} were written")
            yield file
        finally:
            self._disk.close(file)

    def _fill(self, path: Path, file: int, start: int, block: memoryview) -> None:
        with _naming(path):
            self._disk.read(file, start, block)
        self.bytes_read += len(block)


def damaged(path: Path, start: int, end: int, what: WhatLiesAt) -> CheckpointError:
    """The error about a block whose hash is wrong."""
    return CheckpointError(f"{path} is damaged between bytes {start} and {end}: {what(start, end)}")


def _by_block(wants: Iterable[Want]) -> Iterator[tuple[int, Sequence[Want]]]:
    """Each block that is wanted, in order, with the wants that touch it."""
    waiting = deque(sorted((want for want in wants if len(want.into)), key=lambda want: want.start))
    active: list[Want] = []
    index = 0
    while waiting or active:
        if not active:
            index = waiting[0].start // BLOCK
        end = (index + 1) * BLOCK
        while waiting and waiting[0].start < end:
            active.append(waiting.popleft())
        yield index, active
        active = [want for want in active if want.end > end]
        index += 1


def _copy(block: memoryview, start: int, want: Want) -> None:
    """The part of `block`, which begins at byte `start`, that `want` asks for."""
    lo, hi = max(want.start, start), min(want.end, start + len(block))
    want.into[lo - want.start : hi - want.start] = block[lo - start : hi - start]
