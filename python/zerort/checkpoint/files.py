"""The file system, one operation a method: the only place of this package that touches it.

What it guarantees: a file is created, never reopened for writing; nothing is followed through a
symbolic link; nothing is replaced unless the method's name says so. What it does not do: it knows
no protocol. The order of operations, which is what makes a save safe, stands in `save`; tests put
another `Disk` below, which records them or fails at one.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from zerort.errors import CheckpointError
from zerort.platforms import HERE

__all__ = ["Disk"]

_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


class Disk:
    """The operations that a checkpoint needs. Descriptors are plain integers; all errors are
    `OSError`.
    """

    system = HERE
    """What they are made of on this operating system."""

    def make_folder(self, path: Path) -> None:
        """A new folder; an existing one is an error."""
        path.mkdir()

    def make_folders(self, path: Path) -> None:
        """A folder and those that it lies in, as far as they are missing."""
        path.mkdir(parents=True, exist_ok=True)

    def sync_tree(self, path: Path) -> None:
        """All that is in a folder survives a power loss, once the folder's own name does."""
        for name in self.names(path):
            if self.is_folder(path / name):
                self.sync_tree(path / name)
            else:
                file = self.system.open(path / name, os.O_RDWR)
                try:
                    self.sync(file)
                finally:
                    self.close(file)
        self.sync_folder(path)

    def create(self, path: Path) -> int:
        """A new file, open for writing; an existing one is an error."""
        return self.system.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def reserve(self, file: int, size: int) -> None:
        """Room for `size` bytes, where the file system can promise it; the file stays as long as it
        is.
        """
        self.system.reserve(file, size)

    def write(self, file: int, data: memoryview) -> None:
        """All of `data`, at the end."""
        while data:
            data = data[os.write(file, data) :]

    def sync(self, file: int) -> None:
        """What was written survives a power loss from here on."""
        self.system.sync(file)

    def close(self, file: int) -> None:
        """Gives the descriptor back."""
        os.close(file)

    def sync_folder(self, path: Path) -> None:
        """The names in the folder, as they are now, survive a power loss from here on."""
        self.system.sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        """Moves a folder to a name that must be free."""
        self.system.rename(source, target)

    def exchange(self, first: Path, second: Path) -> None:
        """Two names change places in one instant. Raises `CheckpointError` where the file system
        has no such call.
        """
        try:
            self.system.exchange(first, second)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            raise CheckpointError(
                f"the file system of {second.parent} cannot exchange two folders in one instant "
                "(on Linux and macOS most can, on Windows none), "
                f"so {second.name} cannot be overwritten safely: save under another tag"
            ) from error

    def replace(self, source: Path, target: Path) -> None:
        """Moves a file over another, in one instant."""
        source.replace(target)

    def remove_file(self, path: Path) -> None:
        """Removes a file or a symbolic link."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Removes an empty folder."""
        path.rmdir()

    def hold(self, file: int) -> bool:
        """Locks an open file until `close`, so that others see that it is in use. False where the
        file system has no locks.

        Raises `BlockingIOError` while another process holds it; a process that dies lets go of it.
        """
        return self.system.lock(file)

    def in_use(self, path: Path) -> bool:
        """Whether a process holds the file, or may do so."""
        file = self.open(path)
        try:
            return not self.hold(file)
        except BlockingIOError:
            return True
        finally:
            self.close(file)

    def lock(self, path: Path) -> int | None:
        """Takes the lock file at `path` until `close`; None where the file system has no locks.

        Raises `BlockingIOError` while another process holds it; a process that dies lets go of it.
        """
        file = self.system.open(path, os.O_RDWR | os.O_CREAT)
        held = False
        try:
            held = self.hold(file)
        finally:
            if not held:
                os.close(file)
        return file if held else None

    def names(self, path: Path) -> list[str]:
        """What is in a folder, sorted."""
        return sorted(os.listdir(path))

    def exists(self, path: Path) -> bool:
        """Whether the name is taken, by anything."""
        return os.path.lexists(path)

    def is_folder(self, path: Path) -> bool:
        """Whether a folder has the name; a symbolic link is none."""
        return path.is_dir() and not path.is_symlink()

    def is_plain(self, path: Path) -> bool:
        """Whether a regular file has the name; a symbolic link is none."""
        return path.is_file() and not path.is_symlink()

    def open(self, path: Path) -> int:
        """A regular file, for reading. Raises `CheckpointError` for anything else, symbolic links
        included.
        """
        try:
            file = self.system.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CheckpointError(
                    f"{path} is a symbolic link: a checkpoint holds plain files only"
                ) from error
            raise
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise CheckpointError(f"{path} is no plain file")
        return file

    def size(self, file: int) -> int:
        """Bytes of an open file."""
        return os.fstat(file).st_size

    def read(self, file: int, start: int, into: memoryview) -> None:
        """Fills `into` from byte `start` on. Raises `CheckpointError` at the end of the file."""
        while into:
            count = self.system.read_at(file, start, into)
            if not count:
                raise CheckpointError(f"the file ends at byte {start}")
            start, into = start + count, into[count:]

    def read_whole(self, path: Path, limit: int) -> bytes:
        """A small file. Raises `CheckpointError` when it is longer than `limit` bytes."""
        file = self.open(path)
        try:
            size = self.size(file)
            if size > limit:
                raise CheckpointError(f"{path} has {size} bytes, more than the {limit} allowed")
            data = bytearray(size)
            self.read(file, 0, memoryview(data))
            return bytes(data)
        finally:
            self.close(file)

    def remove_tree(self, path: Path) -> None:
        """Removes a folder of files, or of such folders, or a file."""
        if self.is_folder(path):
            for name in self.names(path):
                self.remove_tree(path / name)
            self.remove_folder(path)
        else:
            self.remove_file(path)
