"""Forecasts of several stages as one table, in sizes that are read at a glance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zerort.forecast.figures import Forecast
from zerort.forecast.legs import Seating
from zerort.forecast.owners import Owners, unevenness
from zerort.memory import Kind

__all__ = ["show", "size"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(nbytes: float) -> str:
    """Bytes with four digits."""
    power = 0
    while nbytes >= 1024 and power < len(_UNITS) - 1:
        nbytes, power = nbytes / 1024, power + 1
    if not power:
        return f"{nbytes:.0f} B"
    return f"{nbytes:.{3 - len(str(int(nbytes))) + 1}f} {_UNITS[power]}"


def show(title: str, forecasts: Sequence[Forecast], chosen: int, console: Console) -> None:
    """One column a stage; a star at the `chosen` one. Rows without anything are left out."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("a rank")
    for one in forecasts:
        star = "*" if one.stage == chosen else ""
        table.add_column(f"stage {one.stage}{star}", justify="right")
    _plan(table, forecasts)
    places = [("on the device", False), ("on the host", True)]
    for heading, on_host in places:
        if any(one.taken(on_host=on_host) for one in forecasts):
            _memory(table, heading, forecasts, on_host)
    if any(len(set(one.by_rank)) > 1 for one in forecasts):
        uneven = (f"{unevenness(one.by_rank):.2f}" for one in forecasts)
        table.add_row("  of the fullest rank, over the mean", *uneven)
    if any(one.locked for one in forecasts):
        _row(table, "  page-locked, as torch rounds it", forecasts, lambda one: one.locked)
    sent = list(dict.fromkeys(kind for one in forecasts for kind in one.sent))
    rows: list[tuple[str, Callable[[Forecast], int]]] = [
        (f"  {kind.replace('_', ' ')}", lambda one, kind=kind: one.sent[kind])  # type: ignore[misc]
        for kind in sent
    ]
    rows += [
        ("  to the host", lambda one: one.to_host),
        ("  to the device", lambda one: one.to_device),
    ]
    rows[-2:-2] = [
        ("  of it between hosts", lambda one: one.between_hosts),
        ("  of it between copies", lambda one: one.between_copies),
    ]
    for heading, part in (("sent in a step", rows[:-2]), ("copied in a step", rows[-2:])):
        if any(count(one) for _, count in part for one in forecasts):
            table.add_section()
            table.add_row(heading)
            for name, count in part:
                _row(table, name, forecasts, count)
    console.print(table)


def _plan(table: Table, forecasts: Sequence[Forecast]) -> None:
    table.add_row("buckets", *(f"{len(one.plan.buckets):,}" for one in forecasts))
    if any(one.cap.reason for one in forecasts):  # else the file says it
        table.add_row("  at most", *(size(one.cap.nbytes or 0) for one in forecasts))
    largest = [
        max((s.numel * _item(s.dtype) for s in one.plan.buckets), default=0) for one in forecasts
    ]
    table.add_row("  the largest", *map(size, largest))
    if any(one.plan.units for one in forecasts):
        table.add_row(
            "units", *(f"{len(one.plan.units):,}" * bool(one.plan.units) for one in forecasts)
        )
    _hops(table, forecasts)
    if any(one.owners for one in forecasts):
        _owners(table, [one.owners for one in forecasts])


def _hops(table: Table, forecasts: Sequence[Forecast]) -> None:
    """Nothing where all ranks are in one group."""
    rows: list[tuple[str, Callable[[Seating], int]]] = [
        ("copies of the model state", lambda seating: seating.copies),
        ("hosts of a copy", lambda seating: seating.hosts),
        ("  ranks of each", lambda seating: seating.ranks),
    ]
    for name, tell in rows if any(one.seating.nested for one in forecasts) else ():
        table.add_row(name, *(f"{tell(one.seating):,}" for one in forecasts))


def _owners(table: Table, owners: Sequence[Owners | None]) -> None:
    """Nothing where every rank updates all."""
    table.add_section()
    table.add_row("whole parameters, each updated by its owner")
    rows: list[tuple[str, Callable[[Owners], str]]] = [
        ("  buckets of whole shards", lambda one: f"{one.owned:,}"),
        ("  buckets that are exchanged", lambda one: f"{one.exchanged:,}"),
        ("  padding", lambda one: f"{one.padding:.1%}"),
        ("  ranks that own some", lambda one: f"{one.ranks:,} of {len(one.elements):,}"),
        ("  elements, most over mean", lambda one: f"{unevenness(one.elements):.2f}"),
        ("  work, most over mean", lambda one: f"{unevenness(one.costs):.2f}"),
    ]
    for name, tell in rows:
        table.add_row(name, *("" if one is None else tell(one) for one in owners))


def _item(dtype: str) -> int:
    return {"f64": 8, "f32": 4}.get(dtype, 2)


def _memory(table: Table, heading: str, forecasts: Sequence[Forecast], on_host: bool) -> None:
    table.add_section()
    table.add_row(heading)
    for kind in Kind:
        _row(
            table,
            f"  {kind.value}",
            forecasts,
            lambda one, kind=kind: one.taken(kind, on_host=on_host),  # type: ignore[misc]
        )
    _row(table, "  together", forecasts, lambda one: one.taken(on_host=on_host))


def _row(
    table: Table, name: str, forecasts: Sequence[Forecast], count: Callable[[Forecast], int]
) -> None:
    counts = [count(one) for one in forecasts]
    if any(counts):
        table.add_row(name, *(size(each) if each else "-" for each in counts))
