"""What operating systems do differently, in one place: locks, what makes a write durable, renames
that replace nothing, whether a process runs, what memory it has taken and how much is free, memory
of its own, and whether others want the processor.

`Plain` asks for no more than Python has everywhere; each system adds what it has. So a promise that
a system cannot keep is weaker there, and nothing fails: Windows cannot sync a folder or exchange
two names, and a system without locks takes none. What is used here is `HERE`; tests put another in
its place.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["HERE", "Linux", "MacOS", "Plain", "Posix", "Windows", "system"]

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


def _flags(*names: str) -> int:
    found = 0
    for name in names:
        found |= getattr(os, name, 0)
    return found


class Plain:
    """Python's own file calls, and nothing beyond them."""

    def __init__(self) -> None:
        self._follows = not hasattr(os, "O_NOFOLLOW")
        # O_NONBLOCK: a pipe in the place of a file must not make the reader wait for a writer;
        # O_BINARY: elsewhere line ends would be translated
        self._always = _flags("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT")
        self._nonblock = _flags("O_NONBLOCK")

    def open(self, path: Path, flags: int) -> int:
        """A descriptor that no child inherits. A symbolic link is not followed: ELOOP."""
        if self._follows and path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        reads = flags & (os.O_WRONLY | os.O_RDWR) == 0
        return os.open(path, flags | self._always | (self._nonblock if reads else 0), 0o666)

    def read_at(self, file: int, start: int, into: memoryview) -> int:
        """Bytes read into `into` from byte `start` on; 0 at the end of the file."""
        os.lseek(file, start, os.SEEK_SET)
        data = os.read(file, len(into))
        into[: len(data)] = data
        return len(data)

    def reserve(self, file: int, size: int) -> None:
        """Room for `size` bytes, where the system can promise it. Raises `OSError` for none."""

    def peak_memory(self) -> int | None:
        """Bytes that this process has had of the host's memory, at most; None where the system does
        not tell.
        """
        return None

    def free_memory(self) -> int | None:
        """Bytes of the host's memory that this process may still take without anything being pushed
        out, by the limits that it is under; None where the system does not tell.
        """
        return None

    def memory(self, nbytes: int) -> mmap.mmap:
        """At least so many bytes of memory, zeros. Raises `OSError` for want of it."""
        return mmap.mmap(-1, nbytes)

    def waited_for_processor(self) -> float | None:
        """Seconds for which the calling thread could have run, and others did; None where the
        system does not tell.
        """
        return None

    def sync(self, file: int) -> None:
        """What was written survives a power loss from here on."""
        os.fsync(file)

    def sync_folder(self, path: Path) -> None:
        """The names in a folder survive a power loss from here on, where the system can say so."""

    def rename(self, source: Path, target: Path) -> None:
        """Moves a folder to a name that must be free."""
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)

    def exchange(self, first: Path, second: Path) -> None:
        """Two names change places in one instant. Raises ENOSYS where there is no such call."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(first), None, str(second))

    def lock(self, file: int) -> bool:
        """Locks an open file until it is closed; False where there are no locks.

        Raises `BlockingIOError` while another process holds it; a process that dies lets go of it.
        """
        return False

    def running(self, process: int) -> bool:
        """Whether there is a process of this id; True where that cannot be asked."""
        return True


class Windows(Plain):
    """Locks of a byte range; `os.kill` is no question there, it ends the process."""

    def __init__(self) -> None:
        super().__init__()
        self._msvcrt: Any = importlib.import_module("msvcrt")

    def lock(self, file: int) -> bool:
        """See `Plain.lock`."""
        os.lseek(file, 0, os.SEEK_SET)
        try:
            self._msvcrt.locking(file, self._msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in _HELD:
                raise BlockingIOError(error.errno, os.strerror(error.errno or 0)) from error
            raise
        return True


class Posix(Plain):
    """Locks of a whole file, folders that can be synced, positioned reads."""

    _RSS_UNIT = 1024
    """Bytes of what `getrusage` counts in."""

    def __init__(self) -> None:
        super().__init__()
        self._fcntl: Any = importlib.import_module("fcntl")
        self._folder = os.O_RDONLY | _flags("O_DIRECTORY", "O_CLOEXEC")
        self._libc = ctypes.CDLL(None, use_errno=True)

    def peak_memory(self) -> int | None:
        """As `getrusage` counts it."""
        resource = importlib.import_module("resource")
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * self._RSS_UNIT

    def read_at(self, file: int, start: int, into: memoryview) -> int:
        """See `Plain.read_at`; the place of other readers does not move."""
        return os.preadv(file, [into], start)

    def sync_folder(self, path: Path) -> None:
        """See `Plain.sync_folder`."""
        folder = os.open(path, self._folder)
        try:
            self.sync(folder)
        finally:
            os.close(folder)

    def lock(self, file: int) -> bool:
        """See `Plain.lock`."""
        try:
            self._fcntl.flock(file, self._fcntl.LOCK_EX | self._fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            raise
        return True

    def running(self, process: int) -> bool:
        """See `Plain.running`."""
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True
        return True

    def _call(self, name: str, first: Path, second: Path, *arguments: Any) -> None:
        call = getattr(self._libc, name, None)
        code = errno.ENOSYS
        if call is not None:
            if not call(*arguments):
                return
            code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(first), None, str(second))


class Linux(Posix):
    """`renameat2` and `fallocate`, where the file system has them; memory as /proc and the control
    groups tell it, and in large pages; what a thread has waited.
    """

    _NOREPLACE, _EXCHANGE, _AT_FDCWD, _KEEP_SIZE = 1, 2, -100, 1
    _HUGE = 1 << 21
    """Bytes of a large page."""

    def __init__(self, root: Path = Path("/")) -> None:
        super().__init__()
        self._root = root

    def memory(self, nbytes: int) -> mmap.mmap:
        """See `Plain.memory`; in large pages, and no child's.

        A child that is forked would share the pages, and the next write to each would copy it.
        """
        if nbytes >= self._HUGE:
            nbytes += -nbytes % self._HUGE
        found = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
            with suppress(OSError):  # a kernel without it
                found.madvise(advice)
        return found

    def waited_for_processor(self) -> float | None:
        """See `Plain.waited_for_processor`; as the scheduler counts it."""
        row = self._text("proc/thread-self/schedstat").split()
        return int(row[1]) / 1e9 if len(row) > 1 and row[0] != "0" else None

    def free_memory(self) -> int | None:
        """See `Plain.free_memory`."""
        free = _rows(self._text("proc/meminfo")).get("MemAvailable:")
        known = [*([] if free is None else [free << 10]), *self._group_room()]
        return min(known, default=None)

    def _group_room(self) -> Iterator[int]:
        """What each control group that this process is in has left. What files take there is given
        back when it is wanted.
        """
        for line in self._text("proc/self/cgroup").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                names = ("", "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = (
                    "memory/",
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                    "total_inactive_file",
                )
            else:
                continue
            where = Path(path.lstrip("/"))
            for group in (where, *where.parents):
                # a container sees its own group as the root, whatever it is called outside
                yield from self._room(f"sys/fs/cgroup/{names[0]}{group}", *names[1:])

    def _room(self, group: str, limit: str, used: str, files: str) -> Iterator[int]:
        most, now = (self._text(f"{group}/{name}").strip() for name in (limit, used))
        if most.isdigit() and now.isdigit():
            cached = _rows(self._text(f"{group}/memory.stat")).get(files, 0)
            yield max(0, int(most) - int(now) + cached)

    def _text(self, path: str) -> str:
        try:
            return (self._root / path).read_text()
        except OSError:
            return ""

    def reserve(self, file: int, size: int) -> None:
        """See `Plain.reserve`; the length of the file stays.

        Blocks asked for one write at a time cost more than the writing: saves of 1 GB took three
        times as long.
        """
        length = ctypes.c_long(size)
        if self._libc.fallocate(file, self._KEEP_SIZE, ctypes.c_long(0), length) != 0:
            code = ctypes.get_errno()
            if code == errno.ENOSPC:
                raise OSError(code, os.strerror(code))

    def rename(self, source: Path, target: Path) -> None:
        """See `Plain.rename`; no process can take the name in between."""
        try:
            self._renameat2(source, target, self._NOREPLACE)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
                raise
            super().rename(source, target)

    def exchange(self, first: Path, second: Path) -> None:
        """See `Plain.exchange`."""
        self._renameat2(first, second, self._EXCHANGE)

    def _renameat2(self, source: Path, target: Path, flags: int) -> None:
        here, names = self._AT_FDCWD, (os.fsencode(source), os.fsencode(target))
        flag = ctypes.c_uint(flags)
        self._call("renameat2", source, target, here, names[0], here, names[1], flag)


def _rows(text: str) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


class MacOS(Posix):
    """`renamex_np`, and a sync that reaches the disk: `fsync` only reaches the drive's cache."""

    _RSS_UNIT = 1
    _SWAP, _EXCL = 2, 4

    def sync(self, file: int) -> None:
        """See `Plain.sync`."""
        try:
            self._fcntl.fcntl(file, self._fcntl.F_FULLFSYNC)
        except OSError:  # the file system has none
            os.fsync(file)

    def rename(self, source: Path, target: Path) -> None:
        """See `Plain.rename`; no process can take the name in between."""
        try:
            self._renamex(source, target, self._EXCL)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
                raise
            super().rename(source, target)

    def exchange(self, first: Path, second: Path) -> None:
        """See `Plain.exchange`."""
        self._renamex(first, second, self._SWAP)

    def _renamex(self, source: Path, target: Path, flags: int) -> None:
        names = (os.fsencode(source), os.fsencode(target))
        self._call("renamex_np", source, target, *names, ctypes.c_uint(flags))


def system(name: str) -> Plain:
    """What there is on the platform `name`, as in `sys.platform`."""
    known: dict[str, Callable[[], Plain]] = {"linux": Linux, "darwin": MacOS, "win32": Windows}
    try:
        return known.get(name, Posix if os.name == "posix" else Plain)()
    except ImportError:
        return Plain()


HERE = system(sys.platform)
"""The operating system that this runs on."""
