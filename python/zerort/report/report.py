"""The whole page of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from zerort.report.drawn_step import step_section
from zerort.report.figures import Figures, figures
from zerort.report.findings import findings
from zerort.report.overview import findings_section, headline, lead, split_section
from zerort.report.page import Section, document
from zerort.report.run import Run
from zerort.report.tables import buckets_section, ranks_section, steps_section

__all__ = ["page_of", "write_page", "write_report"]

_FOOT = (
    "<footer>Written by <code>zerort trace report</code>. The traces themselves open at "
    "ui.perfetto.dev.</footer>"
)


def page_of(found: Figures, sections: Sequence[Section] = ()) -> str:
    """The page in HTML; `sections` are further ones, below its own."""
    own = (
        split_section(found),
        findings_section(findings(found)),
        step_section(found),
        buckets_section(found),
        ranks_section(found),
        steps_section(found),
    )
    every = [section for section in (*own, *sections) if section is not None]
    return document(headline(found), every, lead(found)).replace("</main>", f"{_FOOT}</main>")


def write_report(run: Run, out: Path, sections: Sequence[Section] = ()) -> Path:
    """Writes the page of a run, by a temporary file and a rename. Raises `OSError`."""
    return write_page(page_of(figures(run), sections), out)


def write_page(page: str, out: Path) -> Path:
    """Puts a file in place whole, or leaves what was there. Raises `OSError`."""
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(out)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return out
