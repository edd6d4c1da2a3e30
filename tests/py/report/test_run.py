"""Files that become a run, and those that do not: each is one line, and status 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from traced import Scene
from zerort import _core
from zerort.cli import main
from zerort.report.run import Rank, Run, load
from zerort.report.split import split
from zerort.report.timeline import Collective, RankStep
from zerort.report.wire import transfers


def refused(capsys: pytest.CaptureFixture[str], out: Path, *files: object) -> str:
    """The line that the command says of these files, and nothing else."""
    assert main(["trace", "report", *map(str, files), "-o", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("zerort: ")
    assert len(said.err.splitlines()) == 1, said.err
    return said.err


def test_a_folder_is_the_traces_in_it_beside_whatever_else_there_is(tmp_path: Path) -> None:
    Scene(ranks=3).write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"train_batch_size": 8}))
    assert [rank.rank for rank in load([tmp_path]).ranks] == [0, 1, 2]


def test_what_is_no_trace_is_refused_and_no_page_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    foreign = tmp_path / "foreign.json"
    foreign.write_text("{}")
    assert "foreign.json: JSON, but not a trace that zerort wrote" in refused(capsys, out, foreign)
    assert "missing.json: cannot be read" in refused(capsys, out, tmp_path / "missing.json")
    assert "a folder without a trace of zerort" in refused(capsys, out, tmp_path)
    assert not out.exists()


def test_a_page_never_replaces_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = Scene(ranks=2).write(tmp_path)
    before = paths[0].read_text()
    assert "is one of the traces" in refused(capsys, paths[0], *paths)
    assert "is one of the traces" in refused(capsys, paths[0], tmp_path)
    assert paths[0].read_text() == before


def test_a_trace_of_another_version_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Scene(ranks=1).write(tmp_path)[0]
    path.write_text(path.read_text().replace('"format":1', '"format":7', 1))
    assert "a trace of format 7" in refused(capsys, tmp_path / "report.html", path)


def test_of_a_file_cut_off_in_the_middle_the_page_has_what_can_be_read_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = Scene(ranks=2, steps=20).write(tmp_path / "run")
    text = paths[1].read_text()
    paths[1].write_text(text[: len(text) // 2])
    out = tmp_path / "report.html"
    line = refused(capsys, out, *paths)
    assert "the file of rank 1 breaks off after step" in line
    assert f"{out} has what could be read" in line
    page = out.read_text()
    assert "the file of rank 1 breaks off after step" in page
    assert 5 < load(paths).numbers[-1] < 15
    paths[1].write_text(text[:70])
    assert "cut off before its first event" in refused(capsys, out, *paths)


def test_a_rank_without_a_step_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed rank leaves the empty file of its start."""
    paths = Scene(ranks=2).write(tmp_path / "run")
    _core.Trace(1, 10).write(str(paths[1]))
    text = paths[1].read_text().replace('"dropped":0', '"dropped":0,"run":{"name":"scene"}')
    paths[1].write_text(text)
    out = tmp_path / "report.html"
    assert "rank 1 has no whole step, so it is left out" in refused(capsys, out, *paths)
    assert "the trace holds no whole step" in refused(capsys, out, paths[1])


def test_missing_ranks_are_named_and_the_others_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = Scene(ranks=4).write(tmp_path / "run")
    out = tmp_path / "report.html"
    line = refused(capsys, out, paths[0], paths[2])
    assert "of 4 ranks 2 are missing (1, 3)" in line
    assert "of 4 ranks 2 are missing (1, 3)" in out.read_text()
    assert ">4 ranks · " in out.read_text()


def test_ranks_of_different_runs_and_a_rank_twice_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Scene(ranks=2, name="abc").write(tmp_path / "one")
    other = Scene(ranks=2, name="def").write(tmp_path / "other")
    out = tmp_path / "report.html"
    line = refused(capsys, out, one[0], other[1])
    assert f"{other[1]}: of another run than {one[0]} (def, abc)" in line
    twice = shutil.copy(one[0], tmp_path / "copy.json")
    assert "rank 0 is in two of the files" in refused(capsys, out, one[0], twice)
    assert not out.exists()


def test_ranks_that_have_no_step_in_common_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = Scene(ranks=2, steps=3).write(tmp_path)
    paths[1].write_text(paths[1].read_text().replace('"step":', '"step":10'))
    line = refused(capsys, tmp_path / "report.html", *paths)
    assert "no step in common (rank 0: 1 to 3; rank 1: 101 to 103)" in line


def test_a_clock_that_jumps_is_refused_with_rank_and_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def jumps(rank: int, step: int) -> float:
        return 3_600_000.0 if rank == 1 and step >= 7 else 0.0

    paths = Scene(ranks=2, clock=jumps).write(tmp_path / "jumps")
    line = refused(capsys, tmp_path / "report.html", *paths)
    assert "rank 1: its clock jumps by 3,600,000 ms against that of rank 0 before step 7" in line


def test_clocks_that_differ_or_drift_are_aligned_by_the_vote(tmp_path: Path) -> None:
    def ahead(rank: int, step: int) -> float:
        return rank * (3_600_000.0 + 0.4 * step)

    run = load(Scene(ranks=3, clock=ahead).write(tmp_path))
    for rank in run.ranks:
        for number in run.numbers:
            assert rank.ahead[number] == pytest.approx(ahead(rank.rank, number), abs=1.0)


def test_a_vote_that_one_rank_sees_late_is_no_jump(tmp_path: Path) -> None:
    """Its process had no core for a second."""
    run = load(Scene(clock=lambda rank, step: 1000.0 * (rank == 1 and step == 6)).write(tmp_path))
    assert run.ranks[1].ahead[6] == pytest.approx(0.0, abs=0.1)


def test_a_collective_is_on_the_wire_from_when_the_last_rank_has_started_it() -> None:
    def step(start: float) -> RankStep:
        sent = [Collective("reduce_scatter", 0, start, 112.0, 4096)]
        return RankStep(1, 0.0, 200.0, collectives=sent)

    ranks = [Rank(0, {1: step(100.0)}, {1: 0.0}), Rank(1, {1: step(1110.0)}, {1: 1000.0})]
    (found,) = transfers(Run(ranks, [1]), [1])
    assert (found.start, found.end, found.took) == (110.0, 112.0, 2.0)


def test_the_parts_of_a_step_are_as_long_as_the_step(tmp_path: Path) -> None:
    """Whatever nests in what: each moment counts once."""
    run = load(Scene(ranks=2, micro_batches=3, every=True, gathers=2.0).write(tmp_path))
    for rank in run.ranks:
        for step in rank.steps.values():
            assert sum(part.took for part in step.slices) == pytest.approx(step.wall, abs=1e-3)
            for before, after in zip(step.slices, step.slices[1:], strict=False):
                assert before.end == pytest.approx(after.start, abs=1e-6)
    parts = split(run, run.settled).by_kind()
    expected: dict[str, Any] = {"forward": 20.0, "backward": 60.0, "exposed": 6.0, "outside": 1.0}
    for kind, took in expected.items():
        assert parts[kind] == pytest.approx(took, abs=0.01), parts
