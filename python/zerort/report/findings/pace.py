"""Findings about who waits for whom, and about time outside the engine."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from zerort.report.figures import Figures
from zerort.report.findings.contract import Finding, matters
from zerort.report.words import KIND_WORDS, count, listed, ms, percent

__all__ = ["outliers", "outside", "roll_calls", "slow_rank", "straggler", "vote"]

_SLOWER = 1.05
_MOSTLY = 0.75


def straggler(figures: Figures) -> tuple[int, str, float, float] | None:
    """The rank that is slower than the others in most steps: rank, kind, ms a step, and how many
    times what the others take.
    """
    found = [
        slower
        for kind in ("forward", "backward", "optimizer", "outside")
        if (slower := _slowest(figures, kind)) is not None
    ]
    return max(found, key=lambda each: each[2]) if found else None


def _slowest(figures: Figures, kind: str) -> tuple[int, str, float, float] | None:
    took = {rank: parts.total(kind) for rank, parts in figures.ranks.items()}
    if len(took) < 2:
        return None
    rank = max(took, key=lambda each: took[each])
    others = _others(took, rank)
    if others <= 0 or took[rank] < _SLOWER * others or not matters(took[rank] - others, figures):
        return None
    slower = 0
    settled = figures.run.settled  # typical steps may be those in which one rank happens to be slow
    for number in settled:
        by_rank = {one.rank: one.steps[number].total(kind) for one in figures.run.ranks}
        slower += by_rank[rank] > 1.02 * _others(by_rank, rank)
    if slower < _MOSTLY * len(settled):
        return None
    return rank, kind, took[rank] - others, took[rank] / others


def _others(took: Mapping[int, float], rank: int) -> float:
    return median(value for other, value in took.items() if other != rank)


def slow_rank(figures: Figures) -> Finding | None:
    """One rank computes longer than the others, who wait for it."""
    found = straggler(figures)
    if found is None:
        return None
    rank, kind, longer, times = found
    where = KIND_WORDS.get(kind, kind)
    remedy = (
        "Look at what its data loader does; the others wait for it in the next collective."
        if kind == "outside"
        else "If its batches are not larger, look at that machine: clocks, heat, other processes."
    )
    return Finding(
        "slow_rank",
        longer,
        f"Rank {rank} is {100 * (times - 1):.0f} % slower than the others {where}: "
        f"{ms(longer)} a step, for which all wait.",
        remedy,
    )


def vote(figures: Figures) -> Finding | None:
    """Ranks stand still in the vote, which ends when the last has come."""
    cost, voting = figures.split.total("vote"), figures.voting
    if voting is None or not matters(cost, figures, 0.03):
        return None
    by_rank = {rank: parts.total("vote") for rank, parts in figures.ranks.items()}
    if voting.share >= _MOSTLY and by_rank[voting.last] <= min(by_rank.values()) + 0.5:
        waiting = listed([str(rank) for rank in by_rank if rank != voting.last])
        words = (
            f"The vote takes {ms(cost)} a step, as ranks wait there for rank {voting.last}, which "
            f"comes last in {percent(voting.share, 1)} of the steps ({ms(voting.late[voting.last])}"
            f" after the first). Waiting: {waiting}."
        )
        remedy = f"What rank {voting.last} does longer stands under 'Ranks side by side'."
    else:
        words = (
            f"The vote takes {ms(cost)} a step, as ranks come to it at different times; no rank "
            f"is the last in most steps (rank {voting.last} in {percent(voting.share, 1)})."
        )
        remedy = "Uneven batches, or a busy machine: batches of like length even it out."
    return Finding("vote", cost, words, remedy)


def roll_calls(figures: Figures) -> Finding | None:
    """At stage 3 ranks meet at the start of every pass."""
    cost = sum(took for of, took in figures.split.exposed() if of == "roll call")
    if not matters(cost, figures, 0.03):
        return None
    return Finding(
        "roll_calls",
        cost,
        f"Ranks wait {ms(cost)} a step for one another at the start of their passes (roll calls, "
        "small all-reduces of stage 3): they come there at different times.",
        "Fewer, larger micro-batches meet less often; a slow rank, if there is one, stands under "
        "'Ranks side by side'.",
    )


def outside(figures: Figures) -> Finding | None:
    """All ranks spend time between the engine's calls."""
    cost = median(parts.total("outside") for parts in figures.ranks.values())
    if not matters(cost, figures, 0.08):
        return None
    return Finding(
        "outside",
        cost,
        f"{ms(cost)} of a step ({percent(cost, figures.split.wall)}) pass outside the engine: in "
        "the data loader, the loss, or logging.",
        "Load data beside the step (DataLoader workers, pinned memory); read .item() of a loss "
        "seldom.",
    )


def outliers(figures: Figures) -> Finding | None:
    """Some steps take much longer than the others."""
    found = figures.outliers
    if not found:
        return None
    lost = sum(one.wall - figures.median for one in found)
    cost = lost / len(figures.run.settled)
    if not matters(cost, figures, 0.01):
        return None
    worst = max(found, key=lambda one: one.wall)
    return Finding(
        "outliers",
        cost,
        f"{count(len(found), 'step', 'steps')} of {len(figures.run.settled)} took over one and a "
        f"half times the median, {ms(lost)} together. The longest is step {worst.number} with "
        f"{ms(worst.wall)}, where {worst.words}.",
        "Checkpoints, evaluation and garbage collection are the usual causes; "
        "what they fall on is in 'Every step'.",
    )
