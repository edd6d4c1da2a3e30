"""One step of one rank, drawn as lanes on a common axis: what the loop did, and below it a row for
each bucket with its life, its collectives and, at stage 3, how long its parameters were whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from zerort.report.buckets import held_up
from zerort.report.run import Run
from zerort.report.svg import Scale, bar, inscribed, picture, time_axis
from zerort.report.timeline import Collective, RankStep, Slice, Whole
from zerort.report.words import KIND_NAMES, amount, ms
from zerort.trace.reader import Life

__all__ = ["ROW", "Lanes", "colour_of"]

LOOP, ROW, BAR = 26, 15, 10
_KINDS = frozenset(KIND_NAMES)
_REDUCES = ("reduce", "all_reduce", "all_to_all")


def colour_of(kind: str) -> str:
    """The class of a kind of time."""
    return kind if kind in _KINDS else "feature"


class Lanes:
    """Of one rank's step. `shift` is added to its times, so that ranks share an axis."""

    def __init__(self, run: Run, step: RankStep, scale: Scale, shift: float) -> None:
        self._run = run
        self._step = step
        self._scale = scale
        self._shift = shift
        self._collectives: dict[int, list[Collective]] = defaultdict(list)
        for one in step.collectives:
            self._collectives[one.bucket].append(one)
        self._lives: dict[int, list[tuple[Life, str]]] = defaultdict(list)
        for life, behind in held_up(step.lives):
            self._lives[life.bucket].append((life, behind))
        self._wholes: dict[int, list[Whole]] = defaultdict(list)
        for whole in step.wholes:
            for bucket in whole.buckets:
                self._wholes[bucket].append(whole)

    def order(self) -> list[int]:
        """Buckets as they leave; those that only gather behind them."""
        left = {bucket: found[0][0].launched for bucket, found in self._lives.items()}
        every = left.keys() | self._collectives.keys() | self._wholes.keys()
        return sorted(every, key=lambda bucket: (left.get(bucket, float("inf")), bucket))

    def loop(self, *, axis: bool = False) -> str:
        """The loop's row alone, with the time axis below it if that is asked for."""
        label = f"what the loop did in step {self._step.number}"
        if not axis:
            return picture(LOOP - 4, self._loop(0), label)
        return picture(LOOP + 18, [*time_axis(self._scale, 0, LOOP), *self._loop(2)], label)

    def buckets(self, shown: Sequence[int]) -> str:
        """A row for each of these buckets above a time axis."""
        foot = ROW * len(shown) + 4
        shapes = [*time_axis(self._scale, 0, foot)]
        for index, bucket in enumerate(shown):
            shapes += self._bucket(bucket, index * ROW + 3)
        return picture(foot + 18, shapes, f"the buckets of step {self._step.number}")

    def shapes(self) -> int:
        """How many would be drawn, at the most."""
        step = self._step
        return len(step.slices) + 5 * len(step.lives) + len(step.collectives) + len(step.wholes)

    # Rows.

    def _loop(self, top: float) -> Iterator[str]:
        for part in self._step.slices:
            yield self._drawn(
                part.start, part.end, top, LOOP - 6, colour_of(part.kind), _said(part)
            )
        for kind, start, end in _runs(self._step.slices):
            if kind in ("forward", "backward"):
                since, until = start + self._shift, end + self._shift
                yield inscribed(self._scale, since, until, top + 14, kind)

    def _bucket(self, bucket: int, top: float) -> Iterator[str]:
        contents = self._run.contents(bucket)
        head = f"bucket {bucket}" + (f": {contents}" if contents else "")
        for whole in self._wholes[bucket]:
            hint = (
                f"{head}\nunit {whole.unit}: {amount(whole.size)} of parameters are whole for "
                f"{ms(whole.end - whole.start)}"
            )
            yield self._drawn(whole.start, whole.end, top + BAR - 2, 4, "whole", hint)
        for life, behind in self._lives[bucket]:
            yield from self._life(life, behind, top, head)
        for one in self._collectives[bucket]:
            yield from self._collective(one, top, head)

    def _life(self, life: Life, behind: str, top: float, head: str) -> Iterator[str]:
        about = life.args
        carried = f"{amount(about.get('bytes', 0))} {about.get('dtype', '')}".strip()
        last, alone = about.get("last"), float(about.get("alone_ms", 0.0))
        came = f", {last} last" + (f", alone for {ms(alone)}" if alone > 0 else "") if last else ""
        hint = f"{head}\nfills for {ms(life.filling)}: {about.get('params', '')} gradients{came}"
        yield self._drawn(life.first, life.full, top + 2, BAR - 4, "filling", hint)
        if life.queued > 0:
            why = {"": "", "room": ", for room"}.get(behind, f", for {behind}, which goes first")
            hint = f"{head}\nfull, waits for its turn for {ms(life.queued)}{why}"
            yield self._drawn(life.full, life.launched, top + 2, BAR - 4, "queued", hint)
        hint = f"{head}\nin flight for {ms(life.in_flight)}: {carried}"
        yield self._drawn(life.launched, life.landed, top + 2, BAR - 4, "hidden", hint)
        hint = f"{head}\nsummed in {ms(life.summing)}"
        yield self._drawn(life.landed, life.retired, top, BAR, "sums", hint)

    def _collective(self, one: Collective, top: float, head: str) -> Iterator[str]:
        reduces = one.operation.startswith(_REDUCES)
        hint = f"{head}\n{one.operation} of {amount(one.size)} for {ms(one.end - one.start)}"
        if not reduces:
            yield self._drawn(one.start, one.end, top, BAR, "publish", hint)
            return
        # Where the loop stands still meanwhile it is exposed, elsewhere compute hides it.
        yield self._drawn(one.start, one.end, top, BAR, "flying", hint)
        for part in self._step.slices:
            if part.kind == "exposed" and part.thing == ("bucket", one.bucket):
                start, end = max(part.start, one.start), min(part.end, one.end)
                if end > start:
                    waited = f"{hint}\nthe loop stands still for it for {ms(part.took)}"
                    yield self._drawn(start, end, top, BAR, "exposed", waited)

    def _drawn(
        self, start: float, end: float, top: float, height: float, colour: str, hint: str
    ) -> str:
        # what the step before has sent begins in front of the picture
        start, end = max(start + self._shift, self._scale.start), end + self._shift
        return bar(self._scale, start, end, top, height, colour, hint)


def _said(part: Slice) -> str:
    name = KIND_NAMES.get(part.kind, part.kind)
    waited = f"\nstands still for {part.what}" if part.what else ""
    return f"{name}: {ms(part.took)}{waited}"


def _runs(slices: Sequence[Slice]) -> Iterator[tuple[str, float, float]]:
    """The longest stretch of each run of slices of one kind that only short others interrupt."""
    kind, start, end = "", 0.0, 0.0
    for part in slices:
        if part.kind == kind and part.start - end < 0.5:
            end = part.end
        elif part.kind in ("forward", "backward"):
            if kind:
                yield kind, start, end
            kind, start, end = part.kind, part.start, part.end
    if kind:
        yield kind, start, end
