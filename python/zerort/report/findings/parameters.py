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
    beside = _beside(figures) > cost / 2
    lasts = f"{ms(cost)} ({percent(cost, figures.split.wall)})"
    words = "Updated parameters are exposed: " + (
        f"they arrive beside the forward, which waits for them for {lasts} of a step"
        if beside
        else f"a step ends with {lasts} in which ranks gather each other's shards"
    )
    words += _pace(figures)
    return Finding("publish", cost, f"{words}.", _remedy(figures, cost, beside=beside))


def _beside(figures: Figures) -> float:
    """Milliseconds of a step that ranks stand still for updated parameters before its vote."""
    steps = [rank.steps[number] for rank in figures.run.ranks for number in figures.numbers]
    waited = (
        part.took
        for step in steps
        for part in step.slices
        if part.kind == "publish" and part.start < step.vote_start
    )
    return sum(waited) / len(steps)


def _pace(figures: Figures) -> str:
    """How many bytes of a step come how fast, where nothing else is gathered."""
    sent = [one for one in transfers(figures.run, figures.numbers) if one.operation == "all_gather"]
    steps = [[one for one in sent if one.step == number] for number in figures.numbers]
    size, took = sum(one.size for one in sent), sum(map(busy, steps))
    if not took or _gathers_units(figures):
        return ""
    return f": {amount(size / len(steps))} at {rate(size / took * 1000)}"


def _remedy(figures: Figures, cost: float, *, beside: bool) -> str:
    words = (
        "bf16 parameters halve what is gathered; at stage 0 there is nothing to gather, for the "
        "memory of a whole optimizer state."
    )
    if beside or _gathers_units(figures):
        return words
    hides = min(cost, figures.split.total("forward"))
    return (
        f'"zerort": {{"publish": "overlapped"}} has them arrive beside the next forward, which can '
        f"hide up to {ms(hides)}. {words}"
    )


def _gathers_units(figures: Figures) -> bool:
    """Whether passes gather the parameters that they use."""
    return any(name.startswith("unit ") for name in figures.run.facts) or any(
        rank.steps[number].wholes for rank in figures.run.ranks for number in figures.numbers
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
