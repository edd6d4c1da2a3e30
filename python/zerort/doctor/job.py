"""Under torchrun: what the job's ranks find together.

Rank 0 says it for all. What is as it should be it says of itself; a note or a problem of another
rank it names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta

from zerort.doctor.collectives import clocks, shared, tried
from zerort.doctor.finding import Finding, Level, Machine, note, ok, problem
from zerort.mesh import Mesh, connect

__all__ = ["gathered", "is_job", "merged", "met", "together"]


def is_job(machine: Machine) -> bool:
    """Whether this process is one of several."""
    return machine.number("RANK") is not None and (machine.number("WORLD_SIZE") or 1) > 1


def met(limit: float) -> Mesh:
    """The job's mesh. Raises `ZerortError` where ranks do not meet within `limit` seconds."""
    return connect(timedelta(seconds=limit))


def together(mesh: Mesh) -> Iterator[Finding]:
    """What only all ranks can find."""
    yield from clocks(mesh)
    yield from tried(mesh)
    yield from shared(mesh)


def gathered(mesh: Mesh, own: Sequence[Finding], about: Sequence[str] = ()) -> list[Finding]:
    """On every rank, what rank 0 says: its own, and below it what is not as it should be elsewhere.
    `about` are checks whose text has to be the same on all ranks.
    """
    by_rank: list[list[Finding]] = mesh.control.gather_objects(list(own))
    return [*merged(by_rank), *(_alike(check, by_rank) for check in about)]


_Kind = tuple[str, Level, str]


def _kind(one: Finding) -> _Kind:
    return one.check, one.level, one.remedy


def merged(by_rank: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Rank 0's, and those of others that are not as they should be. Of several that differ only in
    their figures, as those of the ranks of one host do, the first is said.
    """
    first: dict[_Kind, Finding] = {}
    ranks: dict[_Kind, set[int]] = {}
    for rank, findings in enumerate(by_rank):
        for one in findings:
            if one.level is not Level.OK:
                first.setdefault(_kind(one), one)
                ranks.setdefault(_kind(one), set()).add(rank)
    found = [_named(one, sorted(ranks.get(_kind(one), {0})), len(by_rank)) for one in by_rank[0]]
    return found + [
        _named(one, sorted(ranks[key]), len(by_rank))
        for key, one in first.items()
        if 0 not in ranks[key]
    ]


def _named(one: Finding, ranks: Sequence[int], world: int) -> Finding:
    if one.level is Level.OK or len(ranks) == world:
        return one
    text = f"rank{'s' if len(ranks) > 1 else ''} {_listed(ranks)}: {one.text}"
    return Finding(one.check, one.level, text, one.remedy)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if ranks[8:] else "")


def _alike(check: str, by_rank: Sequence[Sequence[Finding]]) -> Finding:
    texts: dict[str, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        said = "; ".join(one.text.split(",")[0] for one in findings if one.check == check)
        texts.setdefault(said, []).append(rank)
    name = f"{check}, all ranks"
    if len(texts) == 1:
        return ok(name, "the same")
    rows = "; ".join(f"{text or 'none'} on rank {_listed(ranks)}" for text, ranks in texts.items())
    kind = problem if check in ("zerort", "torch") else note
    return kind(name, rows, f"install one {check} on all hosts")
