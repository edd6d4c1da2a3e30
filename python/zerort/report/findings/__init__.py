"""Findings in words: what a trace shows that costs time, each with its figure and a remedy.

A finding is a function from figures to a `Finding`, or to None where it does not hold. It says
nothing that the trace does not show, and little ones are kept back: what takes less than
`LEAST_MS` or `LEAST_SHARE` of a step is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zerort.report.figures import Figures
from zerort.report.findings import order, pace, parameters, reductions
from zerort.report.findings.contract import Finding

__all__ = ["FINDINGS", "Finding", "findings"]

FINDINGS: Sequence[Callable[[Figures], Finding | None]] = (
    reductions.cannot_hide,
    reductions.last_bucket,
    reductions.could_hide,
    reductions.latency,
    reductions.every_micro_batch,
    order.last_parameter,
    order.earlier_bucket,
    order.window,
    parameters.publish,
    parameters.gathers,
    pace.slow_rank,
    pace.vote,
    pace.roll_calls,
    pace.outside,
    pace.outliers,
    reductions.hidden,
)


def findings(figures: Figures) -> list[Finding]:
    """Those that hold, the dearest first."""
    found = [finding for look in FINDINGS if (finding := look(figures)) is not None]
    return sorted(found, key=lambda finding: -finding.cost)
