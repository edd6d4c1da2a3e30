"""Findings about parameters on the wire: updated ones, and those that stage 3 gathers."""

from __future__ import annotations

from zerort.report.figures import Figures
from zerort.report.findings.contract import Finding, matters
from zerort.report.wire import busy, transfers
from zerort.report.words import amount, ms, percent, rate

__all__ = ["gathers", "publish"]


def publish(figures: Figures) -> Finding | None:
    """Ranks stand still until updated parameters have come."""
    cost = figures.split.total("publish")
    if not matters(cost, figures, 0.05) or figures.run.world < 2:
        return None
    words = (
        f"Updated parameters are exposed: a step ends with {ms(cost)} "
        f"({percent(cost, figures.split.wall)}) in which ranks gather each other's shards"
    )
    sent = [one for one in transfers(figures.run, figures.numbers) if one.operation == "all_gather"]
    if sent and figures.fact("stage") < 3:
        steps = [[one for one in sent if one.step == number] for number in figures.numbers]
        size, took = sum(one.size for one in sent), sum(map(busy, steps))
        words += f": {amount(size / len(steps))} at {rate(size / took * 1000)}"
    return Finding(
        "publish",
        cost,
        f"{words}.",
        "bf16 parameters halve what is gathered; at stage 0 there is nothing to gather, for the "
        "memory of a whole optimizer state.",
    )


def gathers(figures: Figures) -> Finding | None:
    """Passes stand still for a unit's parameters."""
    waits = [(of, took) for of, took in figures.split.exposed() if of.startswith("unit")]
    cost = sum(took for _, took in waits)
    if not waits or not matters(cost, figures, 0.03):
        return None
    worst, took = waits[0]
    contents = figures.run.facts.get(worst, "")
    return Finding(
        "gathers",
        cost,
        f"Passes wait for parameters: {ms(cost)} a step, most for {worst}"
        f"{f' ({contents})' if contents else ''} with {ms(took)}.",
        "Let more be whole at once (zero_optimization.stage3_max_live_parameters) and gather "
        "further ahead (stage3_prefetch_bucket_size), as far as memory allows.",
    )
