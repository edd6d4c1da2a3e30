"""Findings about what keeps a bucket from leaving."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from zerort.report.buckets import BucketCost
from zerort.report.figures import Figures
from zerort.report.findings.contract import Finding, matters
from zerort.report.words import count, listed, ms

__all__ = ["earlier_bucket", "last_parameter", "window"]

_MOSTLY = 0.8


def last_parameter(figures: Figures) -> Finding | None:
    """A bucket is full but for one parameter, long before that one comes."""
    late = [bucket for bucket in figures.buckets if _lacks_one(bucket, figures)]
    if not late:
        return None
    worst = max(late, key=lambda bucket: bucket.alone * bucket.launches)
    took = worst.alone * worst.launches
    behind = _behind(worst, figures)
    others = f" {count(len(behind), 'bucket waits', 'buckets wait')} behind it." if behind else ""
    return Finding(
        "last_parameter",
        min(took, _harm(worst, figures)),
        f"Bucket {worst.bucket} waits {ms(took)} a step for {worst.last}, which comes last; all "
        f"else in it ({worst.contents}) has come by then.{others}",
        f"Untie {worst.last} if it is used twice, or give it a bucket of its own: a smaller "
        "zerort.bucket_bytes parts it from the others.",
    )


def _lacks_one(bucket: BucketCost, figures: Figures) -> bool:
    usual = median(other.alone for other in figures.buckets)
    return (
        bucket.params > 1
        and bucket.last_share >= _MOSTLY
        and bucket.alone >= bucket.filling / 2
        and bucket.alone >= 2 * usual
        and matters(bucket.alone * bucket.launches, figures)
        and matters(_harm(bucket, figures), figures, 0.01)
    )


def _harm(bucket: BucketCost, figures: Figures) -> float:
    """What ranks stood still for it and for those behind it."""
    return bucket.exposed + sum(other.exposed for other in _behind(bucket, figures))


def _behind(bucket: BucketCost, figures: Figures) -> list[BucketCost]:
    """Buckets that were full, and mostly waited for this one or for one that did."""
    found: list[BucketCost] = []
    names = {f"bucket {bucket.bucket}"}
    for other in sorted(figures.buckets, key=lambda each: each.bucket):
        if other is not bucket and any(
            share > 0.5 and what in names for what, share in other.behind.items()
        ):
            found.append(other)
            names.add(f"bucket {other.bucket}")
    return found


def earlier_bucket(figures: Figures) -> Finding | None:
    """Full buckets wait for one whose turn comes first, and no single parameter is to blame."""
    waiting = [
        bucket
        for bucket in figures.buckets
        if any(what.startswith("bucket") and share > 0.5 for what, share in bucket.behind.items())
    ]
    if not waiting or last_parameter(figures) is not None:
        return None
    longest = max(waiting, key=lambda bucket: bucket.queued * bucket.launches)
    took = longest.queued * longest.launches
    cost = min(took, sum(bucket.exposed for bucket in waiting))
    if not matters(took, figures) or not matters(cost, figures, 0.01):
        return None
    names = listed([str(number) for number in sorted(bucket.bucket for bucket in waiting)])
    return Finding(
        "earlier_bucket",
        cost,
        f"Full buckets wait for their turn ({names}): bucket {longest.bucket} for {ms(took)} a "
        f"step, until {_first_of(waiting)} has left, which is before them in the order and fills "
        "later.",
        "The order is that of the gradients of the first step: use modules in one order in every "
        "step, or make buckets smaller (zerort.bucket_bytes).",
    )


def _first_of(waiting: Sequence[BucketCost]) -> str:
    """Of what buckets wait for, that which waits for none of them."""
    names = {f"bucket {bucket.bucket}" for bucket in waiting}
    every = [what for bucket in waiting for what in bucket.behind if what != "room"]
    first = [what for what in every if what not in names] or every
    return max(set(first), key=first.count)


def window(figures: Figures) -> Finding | None:
    """Full buckets wait until an earlier one has been retired."""
    waiting = [bucket for bucket in figures.buckets if bucket.behind.get("room", 0.0) > 0.5]
    took = sum(bucket.queued * bucket.launches for bucket in waiting)
    cost = min(took, sum(bucket.exposed for bucket in waiting))
    if not waiting or not matters(took, figures) or not matters(cost, figures, 0.01):
        return None
    names = listed([str(number) for number in sorted(bucket.bucket for bucket in waiting)])
    return Finding(
        "window",
        cost,
        f"Full buckets ({names}) wait {ms(took)} a step for room: no more than "
        f"{figures.fact('window')} may be under way at once.",
        "Raise zerort.window; each launched bucket keeps its bytes until it is retired.",
    )
