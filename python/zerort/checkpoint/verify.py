"""Whether a checkpoint is what was written: every byte against its hash, every header against the
manifest.

`problems` finds all there is to find and changes nothing. Ranks can share the work: each looks at
its part of the files. What a checkpoint means (whether it fits a model) is not asked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from zerort.checkpoint.blocks import BlockReader
from zerort.checkpoint.files import Disk
from zerort.checkpoint.manifest import FileEntry
from zerort.checkpoint.parsing import parse
from zerort.checkpoint.reading import Reader
from zerort.checkpoint.tags import listed, read_manifest
from zerort.checkpoint.tensors import header_bytes, read_header
from zerort.errors import CheckpointError
from zerort.mesh import Consensus

__all__ = ["newest_good", "problems"]


def problems(
    folder: Path, tag: str, disk: Disk | None = None, part: int = 0, parts: int = 1
) -> list[str]:
    """What is wrong with the checkpoint DIR/TAG, a sentence each; empty when nothing is.

    With `parts`, only every `parts`-th file is read, from number `part` on.
    """
    disk = disk or Disk()
    try:
        manifest = parse(read_manifest(disk, folder, tag))
        manifest.plan  # noqa: B018 (raises where the buckets are no layout)
        reader = Reader(disk, folder / tag, manifest)
        reader.check_names()
    except (CheckpointError, OSError) as error:
        return [str(error)]
    return [
        problem
        for entry in manifest.files[part::parts]
        for problem in _of_file(disk, reader, entry)
    ]


def _of_file(disk: Disk, reader: Reader, entry: FileEntry) -> Iterator[str]:
    path = reader.folder / entry.name
    try:
        hashes, what = reader.hashes(entry), reader.what(entry.name)
        first = BlockReader(disk).verify(path, hashes, what, head=8)
        if not entry.name.endswith(".safetensors"):
            return
        length = header_bytes(first, entry.bytes)
        head = bytearray(length)
        file = disk.open(path)
        try:
            disk.read(file, 0, memoryview(head))
        finally:
            disk.close(file)
        found = {
            (t.name, t.code, t.shape, t.start, t.end) for t in read_header(bytes(head), entry.bytes)
        }
    except (CheckpointError, OSError) as error:
        yield str(error)
        return
    listed_ = {(t.name, t.dtype, t.shape, t.start, t.end) for t in reader.in_file(entry.name)}
    for name, *_ in sorted(found ^ listed_):
        yield f"{path}: the header and the manifest disagree about tensor {name}"


def newest_good(ranks: Consensus, disk: Disk, folder: Path, skip: str | None) -> str | None:
    """The newest tag, other than `skip`, without a problem; all ranks look at their part of the
    files.
    """
    part, parts = ranks.comm.rank, ranks.comm.world
    for tag in ranks.first(str(folder), lambda: _candidates(disk, folder, skip)):
        look = partial(problems, folder, tag, disk, part, parts)
        found = ranks.gather(str(folder / tag), look)
        if not any(found):
            return tag
    return None


def _candidates(disk: Disk, folder: Path, skip: str | None) -> list[str]:
    return [
        entry.tag
        for entry in listed(disk, folder)
        if entry.manifest is not None and entry.tag != skip
    ]
