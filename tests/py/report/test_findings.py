"""Findings in words: each is said of a trace in which it holds, with its figure, and is not said of
one in which it does not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from traced import Load, Scene, many
from zerort.report.figures import figures
from zerort.report.findings import FINDINGS, Finding, findings
from zerort.report.run import load


def said(scene: Scene, folder: Path) -> dict[str, Finding]:
    found = findings(figures(load(scene.write(folder))))
    assert [one.cost for one in found] == sorted((one.cost for one in found), reverse=True)
    return {one.key: one for one in found}


QUIET = Scene()
"""Two buckets that leave early on a fast wire: nothing is wrong with it."""

HEAVY = Scene(loads=many(10, 10_000_000), rate=5e5)
LATE_FACTS = {"bucket 0": "head.weight .. tok.weight"}
LATE = [Load(prior=0.2, full=0.97, last="tok"), *(Load(prior=0.3, full=0.35) for _ in range(4))]


def slow(rank: int, step: int) -> float:
    return 23.0 if rank == 1 else 20.0


def slower(rank: int, step: int) -> float:
    return 30.0 if rank == 1 else 20.0


def now_and_then(rank: int, step: int) -> float:
    return 23.0 if rank == step % 2 else 20.0


def late_outside(rank: int, step: int) -> float:
    return 12.0 if rank == 1 else 1.0


def long_once(rank: int, step: int) -> float:
    return 400.0 if rank == 1 and step == 7 else 60.0


# key, a scene in which it holds, one that differs in that alone, and what its words must have
CASES: list[tuple[str, Scene, Scene, list[str]]] = [
    (
        "cannot_hide",
        HEAVY,
        replace(HEAVY, rate=1e7),
        [
            "100 MB of gradients a step",
            "0.498 GB/s need 201 ms",
            "lasts 60.0 ms",
            "saves up to 100 ms",
        ],
    ),
    (
        "cannot_hide",
        replace(HEAVY, loads=many(10, 10_000_000, dtype="bf16")),
        replace(HEAVY, backward=600.0),
        ["More micro-batches a step"],
    ),
    (
        "last_bucket",
        Scene(loads=many(4, 10_000_000), rate=1e6),
        Scene(loads=[*many(4, 10_000_000)[:3], Load(size=1000, prior=0.9, full=1.0)], rate=1e6),
        ["Bucket 3 (layers.3.a .. layers.3.b, 10 MB) leaves last", "for 10.1 ms, 100 %"],
    ),
    (
        "latency",
        Scene(loads=[*many(60, 1000), Load(16_000, 0.99, 1.0)], alpha=2.0),
        Scene(loads=[*many(60, 1000), Load(16_000, 0.99, 1.0)], alpha=0.1),
        ["61 launches a step pay 2.0 ms each", "100 % of the time"],
    ),
    (
        "every_micro_batch",
        replace(HEAVY, micro_batches=2, every=True),
        replace(HEAVY, micro_batches=2),
        ["reduced 2 times a step, once for each micro-batch, as stage 2"],
    ),
    (
        "last_parameter",
        Scene(loads=LATE, rate=2e5, facts=LATE_FACTS),
        Scene(loads=[replace(LATE[0], prior=0.95), *LATE[1:]], rate=2e5, facts=LATE_FACTS),
        [
            "Bucket 0 waits 46.2 ms a step for layers.0.tok, which comes last",
            "4 buckets wait behind",
        ],
    ),
    (
        "earlier_bucket",
        Scene(loads=[Load(prior=0.93, full=0.97), *LATE[1:]], rate=2e5),
        Scene(loads=[Load(prior=0.23, full=0.27), *LATE[1:]], rate=2e5),
        ["(1, 2, 3, 4)", "bucket 4 for 37.2 ms a step, until bucket 0 has left"],
    ),
    (
        "window",
        Scene(loads=many(6, 4_000_000), rate=2e5, window=1),
        Scene(loads=many(6, 4_000_000), rate=2e5),
        ["(1, 2, 3, 4, 5)", "no more than 1 may be under way"],
    ),
    (
        "publish",
        Scene(publish=20.0),
        Scene(publish=1.0),
        [
            "a step ends with 20.0 ms",
            "2 MB at 0.1 GB/s",
            '"overlapped"} has them arrive beside the next forward, which can hide up to 20.0 ms',
        ],
    ),
    (
        "publish",
        Scene(arrives=20.0, publish=0.01),
        Scene(arrives=1.0, publish=0.01),
        ["they arrive beside the forward, which waits for them for 20.0 ms (19 %) of a step"],
    ),
    (
        "gathers",
        Scene(gathers=9.0, stage=3, facts={"unit 0": "a .. b"}),
        Scene(gathers=0.5, stage=3),
        ["9.0 ms a step, most for unit 0 (a .. b) with 9.0 ms"],
    ),
    (
        "slow_rank",
        Scene(ranks=4, forward=slow),
        Scene(ranks=4, forward=now_and_then),
        ["Rank 1 is 15 % slower than the others in forward: 3.0 ms a step"],
    ),
    (
        "slow_rank",
        Scene(ranks=3, outside=late_outside),
        Scene(ranks=3, outside=12.0),
        ["Rank 1 is 1100 % slower than the others outside the engine", "data loader"],
    ),
    (
        "vote",
        Scene(ranks=4, forward=slower, loads=()),
        Scene(ranks=4, loads=()),
        [
            "wait there for rank 1, which comes last in 100 % of the steps (10.0 ms",
            "Waiting: 0, 2, 3",
        ],
    ),
    (
        "vote",
        Scene(forward=lambda rank, step: 30.0 if rank == step % 2 else 20.0, loads=()),
        Scene(forward=30.0, loads=()),
        ["no rank is the last in most steps"],
    ),
    ("roll_calls", Scene(roll_call=5.0, stage=3), Scene(roll_call=0.1, stage=3), ["5.0 ms a step"]),
    ("outside", Scene(outside=30.0), QUIET, ["30.0 ms of a step (26 %) pass outside"]),
    (
        "outliers",
        Scene(backward=long_once),
        QUIET,
        ["1 step of 11", "step 7 with 425 ms, where rank 1 was 340 ms longer in backward"],
    ),
    ("hidden", QUIET, HEAVY, ["Communication is hidden: of a step of 85.", "stand still for 1."]),
]


@pytest.mark.parametrize(
    ("key", "holds", "does_not", "words"),
    CASES,
    ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)],
)
def test_a_finding_is_said_where_it_holds_and_nowhere_else(
    key: str, holds: Scene, does_not: Scene, words: list[str], tmp_path: Path
) -> None:
    found = said(holds, tmp_path / "holds")
    assert key in found, found
    for phrase in words:
        assert phrase in f"{found[key].words} {found[key].remedy}", found[key]
    assert key not in said(does_not, tmp_path / "not")


def test_every_finding_has_a_trace_in_which_it_holds_and_one_in_which_it_does_not() -> None:
    names = {look.__name__ for look in FINDINGS}
    assert names - {"could_hide"} == {key for key, *_ in CASES}


def test_sums_that_could_hide_and_are_waited_for_all_the_same_are_said(tmp_path: Path) -> None:
    """As on a CPU whose cores are all busy: what was complete long ago is waited for."""
    calm = Scene(loads=many(4))
    busy = replace(calm, stall=6.0)
    found = said(busy, tmp_path / "busy")["could_hide"]
    assert "stands still for sums for 24.0 ms, though they could hide" in found.words
    assert "leave one free (OMP_NUM_THREADS)" in found.remedy
    elsewhere = said(replace(busy, facts={"device": "cuda"}), tmp_path / "cuda")["could_hide"]
    assert "OMP_NUM_THREADS" not in elsewhere.remedy
    assert "could_hide" not in said(calm, tmp_path / "calm")


def test_on_a_device_the_wire_is_known_by_the_buckets_lives_and_all_sums_are_waited_for_at_once(
    tmp_path: Path,
) -> None:
    heavy = replace(HEAVY, on_device=True, facts={"device": "cuda"})
    words = said(heavy, tmp_path / "heavy")["cannot_hide"].words
    assert "100 MB of gradients a step" in words
    assert "The step stands still for them for 147 ms" in words
    assert "need 201 ms" in words
    assert set(said(replace(QUIET, on_device=True), tmp_path / "quiet")) == {"hidden"}


def test_a_layer_that_computes_long_before_its_last_gradient_is_no_late_parameter(
    tmp_path: Path,
) -> None:
    """The bucket has filled for longer than it lacked that one."""
    first = Load(prior=0.55, full=0.9, first=0.05, last="tok")
    scene = Scene(loads=[first, *LATE[1:]], rate=2e5)
    assert "last_parameter" not in said(scene, tmp_path / "fills")
    short = replace(scene, loads=[replace(first, first=0.5), *LATE[1:]])
    assert "last_parameter" in said(short, tmp_path / "lacks")


def test_bytes_that_take_longer_than_their_start_are_no_latency(tmp_path: Path) -> None:
    loads = [*many(60, 100_000), Load(1_600_000, 0.99, 1.0)]
    assert "latency" not in said(Scene(loads=loads, alpha=1.0, rate=4e4), tmp_path / "bytes")
    assert "latency" in said(Scene(loads=loads, alpha=1.0, rate=4e6), tmp_path / "start")


def test_an_outlier_is_the_fault_of_who_was_slow_and_not_of_who_waited(tmp_path: Path) -> None:
    """Rank 0 waits for longer than rank 1 is late in either pass."""
    scene = Scene(
        forward=lambda rank, step: 120.0 if (rank, step) == (1, 7) else 20.0,
        backward=lambda rank, step: 300.0 if (rank, step) == (1, 7) else 60.0,
        loads=many(2),
    )
    words = said(scene, tmp_path)["outliers"].words
    assert "rank 1 was 240 ms longer in backward" in words


def test_what_a_forward_waits_for_updated_parameters_is_no_sum_of_a_bucket(tmp_path: Path) -> None:
    scene = Scene(arrives=20.0, publish=0.01)
    found = figures(load(scene.write(tmp_path)))
    assert found.split.total("publish") == pytest.approx(20.01, abs=0.02)
    dearest = found.buckets[0]
    assert (dearest.bucket, dearest.exposed) == (0, 0.0)
    assert dearest.published == pytest.approx(20.01, abs=0.02)
    assert found.split.total("forward") == pytest.approx(20.0, abs=0.02)
    assert "overlapped" not in said(scene, tmp_path / "again")["publish"].remedy
    units = replace(scene, arrives=0.0, publish=20.0, stage=3, facts={"unit 0": "a .. b"})
    assert "overlapped" not in said(units, tmp_path / "units")["publish"].remedy


def test_an_outlier_that_no_rank_computed_longer_in_is_nobodys_fault(tmp_path: Path) -> None:
    scene = Scene(
        forward=lambda rank, step: 25.0 if (rank, step) == (1, 7) else 20.0,
        held=lambda rank, step: 300.0 if step == 7 else 0.0,
    )
    words = said(scene, tmp_path)["outliers"].words
    assert "The longest is step 7" in words
    assert "no rank computed that much longer: the wire or the machine was busy" in words


def test_nothing_is_said_of_a_run_in_which_nothing_is_wrong(tmp_path: Path) -> None:
    assert set(said(QUIET, tmp_path)) == {"hidden"}


def test_a_rank_alone_has_nobody_to_wait_for(tmp_path: Path) -> None:
    found: dict[str, Any] = said(Scene(ranks=1), tmp_path)
    assert found.keys() <= {"publish", "outside"}
