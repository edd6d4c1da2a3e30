"""File systems that fail, and what a crash may leave: every prefix of the operations, and legal
reorderings of them.

POSIX promises little. The data of a file is on disk after `sync` of the file and may be there in
any part before; a name is on disk after `sync_folder` of its folder, and before that each operation
on the folder may have arrived or not, whatever the order in which they were called. `states` plays
this through on a tree in memory.
"""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zerort.checkpoint.files import Disk

MUTATING = (
    "make_folder",
    "create",
    "write",
    "sync",
    "close",
    "sync_folder",
    "rename",
    "exchange",
    "replace",
    "remove_file",
    "remove_folder",
)
Tear = Callable[[bytes], bytes]
NAMES = ("make_folder", "create", "rename", "exchange", "replace", "remove_file", "remove_folder")


class Watched(Disk):
    """Calls `hook` before every operation that changes something, and before those that ask for
    room or the lock.
    """

    def hook(self, name: str, args: tuple[Any, ...]) -> None:
        raise NotImplementedError


def _watched(name: str) -> Any:
    def method(self: Watched, *args: Any) -> Any:
        self.hook(name, args)
        return getattr(Disk, name)(self, *args)

    return method


for _name in (*MUTATING, "reserve", "lock"):
    setattr(Watched, _name, _watched(_name))


class Failing(Watched):
    """Fails at operation number `at`, before it has any effect: "kill", "raise" or "full". `seen`
    counts operations.
    """

    def __init__(self, at: int | None, how: str = "raise") -> None:
        self.at, self.how = at, how
        self.seen: list[str] = []

    def hook(self, name: str, args: tuple[Any, ...]) -> None:
        self.seen.append(name)
        if len(self.seen) - 1 != self.at:
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise RuntimeError("the failpoint")


@dataclass
class Operation:
    """A recorded call. Files are known by the path under which they were created."""

    name: str
    paths: tuple[str, ...]
    data: bytes = b""


class Recorder(Disk):
    """Keeps what it is asked to do, and does it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operations: list[Operation] = []
        self._files: dict[int, str] = {}


def _recorded(name: str) -> Any:
    def method(self: Recorder, *args: Any) -> Any:
        result = getattr(Disk, name)(self, *args)
        if name == "create":
            self._files[result] = str(args[0].relative_to(self.root))
        paths = tuple(
            self._files.get(arg, "") if isinstance(arg, int) else str(arg.relative_to(self.root))
            for arg in args
            if not isinstance(arg, memoryview)
        )
        data = bytes(args[1]) if name == "write" else b""
        self.operations.append(Operation(name, paths, data))
        return result

    return method


for _name in MUTATING:
    setattr(Recorder, _name, _recorded(_name))


@dataclass
class Tree:
    """Names and contents; a folder's content is None. Contents are keyed by the path of their
    creation.
    """

    nodes: dict[str, str | None] = field(default_factory=dict)
    stayed: list[dict[str, str]] = field(default_factory=list)
    """For every move that was lost, where the folders are by the names that they would have."""

    def lose(self, operation: Operation) -> None:
        """It has not arrived. What was done inside of a folder that it moved happens where the
        folder still is.
        """
        if operation.name == "exchange":
            one, two = operation.paths
            self.stayed.append({one: two, two: one})
        elif operation.name == "rename":
            self.stayed.append({operation.paths[1]: operation.paths[0]})

    def _now(self, path: str) -> str:
        for names in reversed(self.stayed):
            folder = next((name for name in names if path.startswith(f"{name}/")), None)
            path = path if folder is None else names[folder] + path[len(folder) :]
        return path

    def apply(self, operation: Operation) -> None:
        """Does it if it can be done: what depends on something lost is lost too."""
        first = self._now(operation.paths[0])
        if operation.name in ("make_folder", "create"):
            if str(Path(first).parent) in self.nodes and first not in self.nodes:
                self.nodes[first] = (
                    None if operation.name == "make_folder" else f"new:{operation.paths[0]}"
                )
        elif first not in self.nodes:
            return
        elif operation.name == "remove_file":
            self._take(first)
        elif operation.name == "remove_folder":
            if not any(name.startswith(f"{first}/") for name in self.nodes):
                self._take(first)
        elif operation.name == "exchange":
            one, two = self._take(first), self._take(operation.paths[1])
            self._put(operation.paths[1], one)
            self._put(first, two)
        else:
            moved = self._take(first)
            self._take(operation.paths[1])
            self._put(operation.paths[1], moved)

    def _take(self, path: str) -> dict[str, str | None]:
        inside = {
            name: node
            for name, node in self.nodes.items()
            if name == path or name.startswith(f"{path}/")
        }
        for name in inside:
            del self.nodes[name]
        return {name[len(path) :]: node for name, node in inside.items()}

    def _put(self, path: str, nodes: dict[str, str | None]) -> None:
        self.nodes.update({path + name: node for name, node in nodes.items()})


@dataclass
class CrashState:
    """What the disk holds: folders (None) and files, by path; and how many operations had been
    called.
    """

    after: int
    nodes: dict[str, bytes | None]

    def write(self, root: Path) -> None:
        for path, data in sorted(self.nodes.items()):
            if data is None:
                (root / path).mkdir(exist_ok=True)
            else:
                (root / path).write_bytes(data)


def snapshot(root: Path) -> dict[str, bytes | None]:
    """A folder as it is now, all of it on disk."""
    found: dict[str, bytes | None] = {".": None}
    for path in sorted(root.rglob("*")):
        found[str(path.relative_to(root))] = None if path.is_dir() else path.read_bytes()
    return found


def states(
    before: dict[str, bytes | None],
    operations: list[Operation],
    seen: set[int],
    seed: int,
    since: int = 0,
) -> Iterator[CrashState]:
    """States that a crash may leave, at every moment between the operations from number `since` on;
    contents that are in `seen` are left out.

    The states after the last operation come in any case, since more is promised of them.
    """
    chance = random.Random(seed)
    for after in range(since, len(operations) + 1):
        done = operations[:after]
        for lost in _losses(done, chance):
            for tear in (_whole, _lost, *[_torn(chance)] * 4):
                nodes = _state(before, done, lost, tear)
                key = hash(tuple(sorted((path, hash(data)) for path, data in nodes.items())))
                if key not in seen or after == len(operations):
                    seen.add(key)
                    yield CrashState(after, nodes)


# What becomes of bytes that were written and not synced.


def _whole(data: bytes) -> bytes:
    return data


def _lost(data: bytes) -> bytes:
    return b""


def _torn(chance: random.Random) -> Tear:
    def tear(data: bytes) -> bytes:
        at = chance.randrange(len(data) + 1)
        # The file ends there, or its length has arrived before its data.
        return data[:at] + (b"" if chance.random() < 0.5 else bytes(len(data) - at))

    return tear


def _losses(done: list[Operation], chance: random.Random) -> Iterator[frozenset[int]]:
    """Sets of operations on names that have not arrived: none, all, each alone, all but each, and
    some at random.
    """
    pending: list[int] = []
    for index, operation in enumerate(done):
        if operation.name in NAMES:
            pending.append(index)
        if operation.name == "sync_folder":
            pending = [
                i for i in pending if str(Path(done[i].paths[0]).parent) != operation.paths[0]
            ]
    yield frozenset()
    yield frozenset(pending)
    for index in pending:
        yield frozenset({index})
        yield frozenset(pending) - {index}
    for _ in range(8):
        yield frozenset(index for index in pending if chance.random() < 0.5)


def _state(
    before: dict[str, bytes | None], done: list[Operation], lost: frozenset[int], tear: Tear
) -> dict[str, bytes | None]:
    tree = Tree({path: None if data is None else path for path, data in before.items()})
    for index, operation in enumerate(done):
        if operation.name in NAMES:
            tree.lose(operation) if index in lost else tree.apply(operation)
    contents = {path: data for path, data in before.items() if data is not None}
    for path in sorted({operation.paths[0] for operation in done if operation.name == "create"}):
        contents[f"new:{path}"] = _content(path, done, tear)
    return {path: None if node is None else contents[node] for path, node in tree.nodes.items()}


def _content(path: str, done: list[Operation], tear: Tear) -> bytes:
    """The data of a file: all that was synced, and of the rest what `tear` leaves."""
    data, synced = b"", 0
    for operation in done:
        if operation.name == "write" and operation.paths[0] == path:
            data += operation.data
        if operation.name == "sync" and operation.paths[0] == path:
            synced = len(data)
    return data[:synced] + tear(data[synced:])
