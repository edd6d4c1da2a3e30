"""A subject out of the trace of a run: what one rank computed, without what it waited for.

A trace knows buckets and no parameters. So each bucket stands for as many parameters as it has,
equally long, whose gradients come evenly between its first and its last. Planning them in larger
buckets is exact to that; in smaller ones it is as good as the assumption.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from zerort.config.zero import Zero
from zerort.simulate.subject import BYTES, FORMATS, Dtype, Subject
from zerort.step.overlap import WISHES
from zerort.trace.reader import Event, Life, Recorded, Step, TraceError, lives, read, steps
from zerort.trace.sink import WAIT

__all__ = ["of_trace"]


_SENT_AS: Mapping[str, tuple[Dtype, float]] = {
    **{dtype: (dtype, BYTES[dtype]) for dtype in FORMATS},
    "u8": ("f32", 1 + 4 / 256),
}
"""What a bucket's elements were sent as, and the bytes of each; of bytes it is not known what they
were, so they are taken for fp32.
"""


class _Bucket(NamedTuple):
    first: int
    """ns behind the start of a backward at which its first gradient comes."""
    full: int
    params: int
    numel: int
    dtype: Dtype


def of_trace(path: str | Path) -> Subject:
    """Of the median step of one rank's file, the first left out. Raises `TraceError`."""
    recorded = read(path)
    found = steps(recorded.events, dropped=recorded.dropped)
    found = found[1:] or found
    if not found:
        raise TraceError(f"{path}: it holds no whole step")
    spans = _backwards(recorded.events)
    if not spans or not any(step.parts["backward"] for step in found):
        raise TraceError(f"{path}: it holds no backward: simulate needs a step of training")
    every = lives(recorded.events)
    buckets = _buckets(every, spans, _on_host(recorded))
    if not buckets:
        raise TraceError(f"{path}: it holds no bucket: no gradient was reduced in this run")
    return _subject(path, recorded, found, every, buckets)


def _subject(
    path: str | Path,
    recorded: Recorded,
    found: Sequence[Step],
    every: Sequence[Life],
    buckets: Sequence[_Bucket],
) -> Subject:
    micro_batches = _whole(recorded.facts, "micro_batches", 1)
    world, stage = _whole(recorded.facts, "world", 1), _whole(recorded.facts, "stage", 2)
    numel = sum(bucket.numel for bucket in buckets)
    publish = recorded.facts.get("publish")
    part = {name: median(step.parts[name] for step in found) for name in found[0].parts}
    sums = _sums(every, len(found))
    other = median(step.other for step in found) + part["publish"]
    owned = numel / world if Zero(stage=min(stage, 3)).shards_optimizer else numel
    params = list(_parameters(buckets))
    on_host = _on_host(recorded)
    return Subject(
        Path(path).name,
        [numel for numel, _, _ in params],
        [dtype for _, dtype, _ in params],
        [at for _, _, at in params],
        _ns(part["forward"] / micro_batches),
        _ns(part["backward"] / micro_batches),
        micro_batches=micro_batches,
        other_ns=_ns(max(0.0, other - sums)) if on_host else _ns(max(0.0, other)),
        update_element_ns=part["optimizer"] * 1e6 / owned,
        sum_byte_ns=sums * 1e6 / _sent(buckets) if on_host else 0.0,
        blocks=on_host,
        stage=stage,
        publish=publish if publish in WISHES else "auto",
        measured=(world, median(step.wall for step in found)),
        notes=tuple(_notes(recorded, found, buckets)),
    )


def _notes(recorded: Recorded, found: Sequence[Step], buckets: Sequence[_Bucket]) -> Iterator[str]:
    params = sum(bucket.params for bucket in buckets)
    yield (
        f"compute: rank {recorded.rank}'s median of {len(found)} steps; {params} parameters in "
        f"{len(buckets)} buckets, each bucket's taken as equally long"
    )
    if recorded.cut:
        yield "the file breaks off; what stands before that is used"


def _on_host(recorded: Recorded) -> bool:
    return str(recorded.facts.get("device", "cpu")).startswith("cpu")


def _whole(facts: Mapping[str, Any], name: str, usual: int) -> int:
    try:
        return max(int(facts.get(name, usual)), 0 if name == "stage" else 1)
    except (TypeError, ValueError):
        return usual


class _Span(NamedTuple):
    start: float
    end: float
    waits: Sequence[tuple[float, float]]

    def computed(self, at: float) -> float:
        """ms of its own until then, without waits."""
        at = min(max(at, self.start), self.end)
        waited = sum(max(0.0, min(at, end) - start) for start, end in self.waits)
        return at - self.start - waited


def _backwards(events: Iterable[Event]) -> list[_Span]:
    """In ms, in order."""
    spans = [event for event in events if event["ph"] == "X"]
    waits = [_ends(event) for event in spans if event["name"] == WAIT]
    found = sorted(_ends(event) for event in spans if event["name"] == "backward")
    return [
        _Span(start, end, [wait for wait in waits if start <= wait[0] < end])
        for start, end in found
    ]


def _ends(event: Event) -> tuple[float, float]:
    return event["ts"] / 1000, (event["ts"] + event["dur"]) / 1000


def _buckets(every: Sequence[Life], spans: Sequence[_Span], on_host: bool) -> list[_Bucket]:
    """Medians over passes, the first pass left out: it launches everything at its end."""
    by_bucket: dict[int, list[tuple[float, float]]] = defaultdict(list)
    about: dict[int, Mapping[str, Any]] = {}
    starts = [span.start for span in spans]
    for life in every:
        if "bytes" not in life.args or life.args.get("dtype") not in _SENT_AS:
            continue
        span = spans[max(0, bisect_right(starts, life.full) - 1)]
        # On a device gradients are hooked while the host runs ahead; a launch is in its streams.
        full = life.full if on_host else life.launched
        first = life.first if on_host else full - life.filling
        by_bucket[life.bucket].append((span.computed(first), span.computed(full)))
        about[life.bucket] = life.args
    found = []
    for bucket, moments in sorted(by_bucket.items()):
        later = moments[1:] or moments
        args = about[bucket]
        first, full = (median(side) for side in zip(*later, strict=True))
        dtype, width = _SENT_AS[args["dtype"]]
        numel = int(int(args["bytes"]) / width)
        params = min(max(1, int(args.get("params", 1))), max(1, numel))
        found.append(_Bucket(_ns(min(first, full)), _ns(full), params, numel, dtype))
    return found


def _parameters(buckets: Sequence[_Bucket]) -> Iterator[tuple[int, Dtype, int]]:
    """(elements, dtype, arrival), in registration order: what comes last is registered first."""
    for bucket in sorted(buckets, key=lambda bucket: bucket.full, reverse=True):
        for index in range(bucket.params, 0, -1):
            at = bucket.first + (bucket.full - bucket.first) * index // bucket.params
            lo, hi = (bucket.numel * i // bucket.params for i in (index - 1, index))
            yield hi - lo, bucket.dtype, at


def _sums(every: Sequence[Life], count: int) -> float:
    """ms of a step in which what had arrived was summed."""
    return sum(life.summing for life in every) / max(1, count + 1)


def _sent(buckets: Sequence[_Bucket]) -> int:
    return max(1, sum(bucket.numel * BYTES[bucket.dtype] for bucket in buckets))


def _ns(milliseconds: float) -> int:
    return max(0, round(milliseconds * 1e6))
