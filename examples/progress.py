"""What rank 0 shows: a live progress bar while training, and the report at the end. Other ranks
show nothing.

Where the output is not a terminal, a line is printed every tenth of the run instead of a bar.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text
from torch import Tensor

import zerort
from corpus import Corpus
from zerort.report.report import write_report
from zerort.report.run import load
from zerort.trace.reader import TraceError, read
from zerort.trace.summary import account

FIELDS = (
    "loss {loss:.3f}  {speed:,.0f} tokens/s  grad norm {norm:.2f}  exposed comm {exposed:.1f} %"
)


class Progress:
    """A bar over `total` optimizer steps, entered around training."""

    def __init__(self, total: int, shown: bool) -> None:
        self.console = Console(quiet=not shown)
        self._total = total
        self._bar = Bar(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)
        self._last = 0.0

    def introduce(self, engine: zerort.Engine, corpus: Corpus) -> None:
        """One line on what is about to be trained on what."""
        parameters = sum(parameter.numel() for parameter in engine.module.parameters())
        self.console.print(
            f"GPT of {parameters / 1e6:.1f} M parameters, ZeRO stage "
            f"{engine.config.zero_optimization.stage}, {len(corpus.train) / 1e6:.1f} MB of text, "
            f"{len(corpus.validation) / 1e6:.1f} MB held out"
            + (f", resumed at step {engine.global_steps}" if engine.global_steps else "")
        )

    def advance(self, engine: zerort.Engine, loss: Tensor, tokens: int) -> None:
        """One optimizer step over `tokens` tokens of all ranks is done; `loss` is this rank's last,
        in nats.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        line = FIELDS.format(
            loss=float(loss.detach()),
            speed=tokens / seconds,
            norm=engine.get_global_grad_norm(),
            exposed=100 * engine.exposed_communication / seconds,
        )
        self._bar.update(self._task, completed=engine.global_steps, description=line)
        if not self.console.is_terminal and engine.global_steps % max(1, self._total // 10) == 0:
            self.console.print(f"step {engine.global_steps}/{self._total}  {line}", highlight=False)

    def report(self, before: float, after: float, text: str, trace: Path | None) -> None:
        """Bits per byte before and after training, a sample, and what a step's time went to by rank
        0's trace.
        """
        if self.console.quiet:
            return
        self.console.print(Panel(Text(text), title="a sample", title_align="left"))
        self.console.print(f"validation: {before:.3f} bits per byte before, {after:.3f} after")
        if trace and trace.exists():
            recorded = read(trace)
            self.console.print(
                f"trace: {trace} (open it at https://ui.perfetto.dev); the median step of rank 0:"
            )
            try:
                told = str(account(recorded.events, dropped=recorded.dropped))
            except TraceError as error:  # a run that was resumed at its end
                told = str(error)
            self.console.print(told, highlight=False)

    def page(self, traces: Sequence[Path]) -> None:
        """Writes the report of all ranks' traces beside them, and names it: the last line."""
        if self.console.quiet or not traces:
            return
        try:
            run = load(traces)
        except TraceError as error:  # as above, or a folder that several runs have written into
            self.console.print(f"no report: {error}", markup=False, highlight=False)
            return
        page = write_report(run, traces[0].with_name("report.html"))
        self.console.print(f"report: {page} (open it in a browser)", soft_wrap=True)
        for loss in run.losses:
            self.console.print(f"  {loss}", markup=False, highlight=False)

    def __enter__(self) -> Progress:
        self._last = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
