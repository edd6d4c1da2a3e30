"""`csv_monitor`: a file for each name in output_path/job_name, a row for each event.

A resumed run goes on in the same files. Rows are handed to the operating system at each boundary;
one that a crash has cut off stands alone in its line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from csv import writer
from io import SEEK_END, TextIOWrapper
from pathlib import Path

from zerort.config.monitors import MonitorFolder
from zerort.features.monitors.member import Event, folder_of

__all__ = ["CsvFiles"]


class CsvFiles:
    """`Train/Samples/lr` is `Train_Samples_lr.csv`, with the header `step,lr`."""

    def __init__(self, settings: MonitorFolder) -> None:
        self._folder = folder_of(settings, "csv_monitor")
        self._files: dict[str, TextIOWrapper] = {}

    @staticmethod
    def check(settings: MonitorFolder) -> None:
        """Raises `ConfigError` without the folder."""
        folder_of(settings, "csv_monitor")

    def write(self, events: Sequence[Event]) -> None:
        """A row each."""
        for name, value, step in events:
            if name not in self._files:
                self._files[name] = _opened(self._folder, name)
            writer(self._files[name], lineterminator="\n").writerow((step, value))
        for name in {event.name for event in events}:
            self._files[name].flush()

    def close(self) -> None:
        """Ends the files, all of them where one raises."""
        with ExitStack() as stack:
            for file in self._files.values():
                stack.callback(file.close)
        self._files = {}


def _opened(folder: Path, name: str) -> TextIOWrapper:
    """The file of a name, at its end, which is the beginning of a line."""
    path = folder / f"{name.replace('/', '_').replace(' ', '_')}.csv"
    raw = path.open("a+b")
    size = raw.seek(0, SEEK_END)
    whole = True
    if size:
        raw.seek(-1, os.SEEK_END)
        whole = raw.read(1) == b"\n"
    file = TextIOWrapper(raw, encoding="utf-8", newline="")
    if not size:
        writer(file, lineterminator="\n").writerow(("step", name.rpartition("/")[2]))
    elif not whole:
        file.write("\n")
    return file
