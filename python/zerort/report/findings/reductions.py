"""Findings about gradients on the wire: whether the backward hides them."""

from __future__ import annotations

from statistics import median

from zerort.report.figures import Figures
from zerort.report.findings.contract import Finding, matters
from zerort.report.words import amount, count, ms, percent, rate

__all__ = ["cannot_hide", "could_hide", "every_micro_batch", "hidden", "last_bucket", "latency"]

_FOUR_BYTES = "f32"
_SUMS = ("bucket", "reduced gradients")
"""What is waited for; on an accelerator for all buckets at once."""


def exposed(figures: Figures) -> float:
    """Milliseconds of a step in which ranks stood still for sums of buckets."""
    return sum(took for of, took in figures.split.exposed() if of.startswith(_SUMS))


def passes(figures: Figures) -> float:
    """How often a step reduces a bucket."""
    launches = [bucket.launches for bucket in figures.buckets if bucket.launches]
    return median(launches) if launches else 0.0


def hiding(figures: Figures) -> float:
    """Milliseconds of backward in a step during which buckets may leave: all of it where every
    micro-batch is reduced, else the last one.
    """
    if passes(figures) > 1.5 or figures.fact("micro_batches", 1) <= 1:
        return figures.split.total("backward")
    lasting = []
    for rank in figures.run.ranks:
        for number in figures.numbers:
            slices = rank.steps[number].slices
            begun = max((part.start for part in slices if part.kind == "forward"), default=0.0)
            after = [part for part in slices if part.start >= begun and part.kind == "backward"]
            lasting.append(sum(part.took for part in after))
    return median(lasting)


def _is_too_much(figures: Figures) -> bool:
    return figures.wire is not None and figures.wire.busy > hiding(figures)


def cannot_hide(figures: Figures) -> Finding | None:
    """The wire needs longer than the backward lasts."""
    cost, wire = exposed(figures), figures.wire
    if wire is None or not _is_too_much(figures) or not matters(cost, figures):
        return None
    words = (
        f"Communication cannot hide: {amount(wire.size)} of gradients a step at "
        f"{rate(wire.rate)} need {ms(wire.busy)}, and the backward they could hide behind lasts "
        f"{ms(hiding(figures))}. The step stands still for them for {ms(cost)}."
    )
    if any(bucket.dtype == _FOUR_BYTES for bucket in figures.buckets):
        first_bytes = wire.line.alpha * wire.launches if wire.line else 0.0
        saved = min(cost, max(0.0, wire.busy - first_bytes) / 2)
        remedy = (
            f'communication_data_type "bf16" halves what is sent and saves up to {ms(saved)} a '
            "step; more micro-batches a step spread the rest over more compute."
        )
    else:
        remedy = (
            "More micro-batches a step (gradient_accumulation_steps) spread it over more compute; "
            "else it takes a faster network."
        )
    return Finding("cannot_hide", cost, words, remedy)


def last_bucket(figures: Figures) -> Finding | None:
    """There would be room to hide, but the last bucket leaves when the backward is over."""
    if figures.wire is None or _is_too_much(figures) or len(figures.buckets) < 2:
        return None
    last = _last_to_leave(figures)
    bucket = next((one for one in figures.buckets if one.bucket == last), None)
    if bucket is None or not matters(bucket.exposed, figures):
        return None
    if bucket.exposed < exposed(figures) / 2:
        return None
    return Finding(
        "last_bucket",
        bucket.exposed,
        f"Bucket {bucket.bucket} ({bucket.contents}, {amount(bucket.size)}) leaves last, when no "
        f"backward is left to hide it: the step stands still for it for {ms(bucket.exposed)}, "
        f"{percent(bucket.exposed, exposed(figures))} of all that is exposed.",
        "Smaller buckets (zerort.bucket_bytes) leave less for the end; "
        "a wire of fewer bytes shortens it.",
    )


def _last_to_leave(figures: Figures) -> int | None:
    """The bucket that is launched last in most passes that end a step."""
    rank = figures.run.ranks[0]
    last = [
        max(step.lives, key=lambda life: life.launched).bucket
        for number in figures.numbers
        if (step := rank.steps[number]).lives
    ]
    return max(set(last), key=last.count) if last else None


def could_hide(figures: Figures) -> Finding | None:
    """There would be room to hide, and no single bucket is to blame."""
    cost, wire = exposed(figures), figures.wire
    if wire is None or _is_too_much(figures) or not matters(cost, figures, 0.05):
        return None
    if last_bucket(figures) is not None:
        return None
    worst = max(figures.buckets, key=lambda bucket: bucket.exposed)
    most = (
        f" Longest for bucket {worst.bucket} ({worst.contents}), {ms(worst.exposed)}."
        if worst.exposed
        else ""
    )
    on_cores = figures.run.facts.get("device") == "cpu"
    return Finding(
        "could_hide",
        cost,
        f"The step stands still for sums for {ms(cost)}, though they could hide: the wire is busy "
        f"for {ms(wire.busy)}, and the backward beside it lasts {ms(hiding(figures))}.{most}",
        "On the CPU a collective needs a core while the backward has them all: leave one free "
        "(OMP_NUM_THREADS), or let the wire carry less (communication_data_type)."
        if on_cores
        else "Let the wire carry less (communication_data_type), or make buckets smaller, so that "
        "the first leave earlier (zerort.bucket_bytes).",
    )


def latency(figures: Figures) -> Finding | None:
    """Most of the wire's time passes before first bytes."""
    wire = figures.wire
    if wire is None or wire.line is None or wire.launches < 4:
        return None
    first_bytes = wire.line.alpha * wire.launches
    whole = sum(map(wire.line.took, wire.sizes)) / len(wire.sizes) * wire.launches
    cost = min(first_bytes, exposed(figures))
    if first_bytes < whole / 2 or not matters(cost, figures):
        return None
    enough = 9 * wire.line.alpha / wire.line.beta if wire.line.beta else None
    advice = f"from {amount(enough)} on it is a tenth" if enough else "they cost next to no bytes"
    return Finding(
        "latency",
        cost,
        f"Buckets are too small: {count(wire.launches, 'launch', 'launches')} a step pay "
        f"{ms(wire.line.alpha)} each before their first byte, "
        f"{percent(first_bytes, whole)} of the time that they are on the wire.",
        f"Raise zerort.bucket_bytes: {advice}.",
    )


def every_micro_batch(figures: Figures) -> Finding | None:
    """Gradients are reduced more than once a step."""
    times, cost = passes(figures), exposed(figures)
    if times < 1.5 or not matters(cost, figures):
        return None
    stage = figures.fact("stage", -1)
    return Finding(
        "every_micro_batch",
        cost * (times - 1) / times,
        f"Every gradient is reduced {times:.0f} times a step, once for each micro-batch, as stage "
        f"{stage} keeps only a shard of the sum: the step stands still for {ms(cost)} for it.",
        "Stage 1 reduces once a step, for the memory of whole gradients; fewer and larger "
        "micro-batches do too.",
    )


def hidden(figures: Figures) -> Finding | None:
    """Good news."""
    parts = figures.split
    if figures.run.world < 2 or parts.share("exposed", "publish", "vote") >= LITTLE:
        return None
    waiting = parts.total("exposed", "publish", "vote")
    return Finding(
        "hidden",
        0.0,
        f"Communication is hidden: of a step of {ms(parts.wall)} ranks stand still for "
        f"{ms(waiting)}, {percent(waiting, parts.wall)}.",
        "",
    )


LITTLE = 0.03
