"""The report of a profile: a summary, the largest modules by depth, and the model's tree with the
cost of each module before its own text.

The look is DeepSpeed's, and its labels are kept, so that what reads them goes on reading them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from zerort.profiling.costs import Cost, Node, largest, levels
from zerort.profiling.form import Form, Iteration, Peak
from zerort.profiling.strings import (
    duration_to_string,
    flops_to_string,
    macs_to_string,
    number_to_string,
    params_to_string,
)

__all__ = ["show_aggregated", "write"]

_WIDTH = 100
"""Columns where the terminal has fewer, or there is none."""

NOTES = """\
Flops are of matrix products, convolutions, attention and recurrent layers, two for a \
multiply-accumulate; what works on elements alone counts as none. They follow from shapes, so that \
FLOPS can exceed what the device has done.
What a module's own forward calls as a function is its own: its children's sums are less by that.
A latency holds what counting took, which matters where operations are small."""


def write(
    root: Node,
    form: Form,
    step: int = 1,
    iteration: Iteration | None = None,
    peak: Peak | None = None,
    path: str | os.PathLike[str] | None = None,
) -> None:
    """Writes the report to standard output, or to the file `path`, whose folder is made and which
    is overwritten. Raises `OSError` where it cannot be written.
    """
    if path:
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") if path else nullcontext(None) as file:
        console = _console(file)
        console.print()
        _line(console, f"{' zerort flops profiler ':-^78}")
        _line(console, f"Profile summary at step {step}:")
        console.print(_rows([*summary(root.cost, iteration, peak)]))
        _line(console, f"\n{' Aggregated profile per GPU ':-^78}")
        console.print(_aggregated(root, form))
        if form.detailed:
            _line(console, f"\n{' Detailed profile per GPU ':-^78}")
            for text in tree_lines(root, root.cost):
                _line(console, text)
        _line(console, NOTES)
        _line(console, "-" * 78)


def summary(
    cost: Cost, iteration: Iteration | None, peak: Peak | None
) -> Iterator[tuple[str, str]]:
    """(label, value) of the report's head."""
    if iteration is not None:
        yield "world size", str(iteration.world)
        yield "data parallel size", str(iteration.world)
        yield "model parallel size", "1"
        yield "batch size per GPU", str(iteration.micro_batch)
    yield "params per GPU", params_to_string(cost.params)
    yield "params of model = params per GPU * mp_size", params_to_string(cost.params)
    yield "fwd MACs per GPU", macs_to_string(cost.macs)
    yield "fwd flops per GPU", number_to_string(cost.flops).strip()
    yield "fwd flops of model = fwd flops per GPU * mp_size", number_to_string(cost.flops).strip()
    times = iteration.times if iteration is not None else None
    forward = cost.seconds if times is None else times.forward
    rate = _rate(cost.flops, forward)
    yield "fwd latency", duration_to_string(forward)
    yield "fwd FLOPS per GPU = fwd flops per GPU / fwd latency", flops_to_string(rate)
    if peak is not None:
        yield f"peak FLOPS of {peak.device}", flops_to_string(peak.flops)
        yield "fwd MFU = fwd FLOPS per GPU / peak FLOPS", _percent(rate, peak.flops)
    if iteration is not None:
        yield from _trained(cost, iteration, peak)


def _trained(cost: Cost, iteration: Iteration, peak: Peak | None) -> Iterator[tuple[str, str]]:
    times = iteration.times
    if times is None:
        return
    factor = 2 + iteration.recompute
    both = times.forward + times.backward
    whole = both + times.step
    yield "bwd latency", duration_to_string(times.backward)
    yield (
        f"bwd FLOPS per GPU = {factor:g} * fwd flops per GPU / bwd latency",
        flops_to_string(_rate(factor * cost.flops, times.backward)),
    )
    yield (
        f"fwd+bwd FLOPS per GPU = {factor + 1:g} * fwd flops per GPU / (fwd+bwd latency)",
        flops_to_string(_rate((factor + 1) * cost.flops, both)),
    )
    yield "step latency", duration_to_string(times.step)
    yield "iter latency", duration_to_string(whole)
    yield (
        f"FLOPS per GPU = {factor + 1:g} * fwd flops per GPU / iter latency",
        flops_to_string(_rate((factor + 1) * cost.flops, whole)),
    )
    yield "samples/second", f"{_rate(iteration.micro_batch * iteration.world, whole):.2f}"
    if peak is not None:
        yield (
            "MFU = 3 * fwd flops per GPU / iter latency / peak FLOPS",
            _percent(_rate(3 * cost.flops, whole), peak.flops),
        )


def show_aggregated(root: Node, form: Form) -> None:
    """The aggregated part alone, on standard output."""
    _console(None).print(_aggregated(root, form))


def _aggregated(root: Node, form: Form) -> Table:
    """The classes of modules that cost most at each depth, by parameters, MACs and latency."""
    depths = levels(root)
    shown = len(depths) - 1 if form.depth == -1 else min(form.depth, len(depths))
    table = Table(title=f"Top {form.top} by depth", title_justify="left", box=None, pad_edge=False)
    for heading in ("depth", "params", "MACs", "fwd latency"):
        table.add_column(heading, overflow="fold")
    for depth, nodes in enumerate(depths[:shown]):
        columns = (
            _cell(largest(nodes, lambda cost: cost.params, form.top), params_to_string),
            _cell(largest(nodes, lambda cost: cost.macs, form.top), macs_to_string),
            _cell(largest(nodes, lambda cost: cost.seconds, form.top), duration_to_string),
        )
        table.add_row(str(depth), *columns)
    return table


def tree_lines(node: Node, total: Cost, label: str = "", indent: str = "") -> Iterator[str]:
    """The lines of the module's `repr`, with each module's cost before its own text."""
    cost = node.cost
    parts = [
        f"{params_to_string(cost.params)} = {_share(cost.params, total.params)} Params",
        f"{macs_to_string(cost.macs)} = {_share(cost.macs, total.macs)} MACs",
        f"{duration_to_string(cost.seconds)} = {_share(cost.seconds, total.seconds)} latency",
        flops_to_string(cost.rate),
    ]
    own = _own_text(node.module)
    text = ", ".join([*parts, own] if own else parts)
    head = f"{indent}{label}{type(node.module).__name__}("
    if not node.children:
        yield f"{head}{text})"
        return
    yield head
    yield f"{indent}  {text}"
    for child in node.children:
        yield from tree_lines(child, total, f"({child.name}): ", f"{indent}  ")
    yield f"{indent})"


def _own_text(module: nn.Module) -> str:
    """On one line. A class whose text fails has the costs all the same."""
    try:
        return " ".join(module.extra_repr().split())
    except Exception as error:
        return f"extra_repr() raised {type(error).__name__}"


def _console(file: IO[str] | None) -> Console:
    console = Console(file=file, markup=False, highlight=False, emoji=False)
    console.width = max(console.width, _WIDTH)
    return console


def _rows(pairs: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for label, value in pairs:
        table.add_row(Text(f"{label}:"), Text(value))
    return table


def _cell(rows: Iterator[tuple[str, float]], as_string: Callable[[float], str]) -> Text:
    return Text("\n".join(f"{name} {as_string(value)}" for name, value in rows))


def _line(console: Console, text: str) -> None:
    # A module's text keeps its line, however long: wrapped, the tree could not be read.
    console.print(Text(text), soft_wrap=True)


def _rate(flops: float, seconds: float) -> float:
    return flops / seconds if seconds else 0.0


def _share(part: float, whole: float) -> str:
    return f"{round(100 * part / whole, 2) if whole else 0:g}%"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f} %"
