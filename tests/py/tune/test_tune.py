"""Tuning within a run, and the command around one."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import homes
import ranks
import zerort
from homes import OPTIMIZER
from reference import History, Moment
from stand_in import Machine
from training import TABLE, at_stage, config_of, digest, engine_for, keep, take_step, weights
from zerort.cli import main
from zerort.config import load
from zerort.errors import ConfigError, StepError
from zerort.step.overlap import threshold
from zerort.tune import feature
from zerort.tune.feature import WARM_UP
from zerort.tune.fit import Line
from zerort.tune.model import Best, Setting
from zerort.tune.profile import Observer
from zerort.tune.task import VARIABLE, Task, overridden
from zerort.tune.wire import Wire

CHOSEN = Setting(4000, None)
TUNED = {"zerort": {"tune": True}}


def config(zero: dict[str, Any] | None = None, **zerort_keys: Any) -> dict[str, Any]:
    case = TABLE["groups_with_adamw"]
    made = config_of(case, 1, at_stage(2, **(zero or {})))
    del made["zero_optimization"]["reduce_bucket_size"]
    return {**made, "zerort": {"bucket_bytes": 64, **zerort_keys}}


def trained(engine: Any, rank: int, steps: int = 3) -> str:
    history, case = History(), TABLE["groups_with_adamw"]
    for step in range(steps):
        take_step(engine, case, rank, step)
        history.weights.append(weights(engine))
        history.norms.append(float(engine.get_global_grad_norm()))
    keep(engine)
    return digest(history)


# ---- "zerort": {"tune": true}


def first_windows(rank: int, world: int, zero: dict[str, Any]) -> Any:
    """Digests and buckets of a run that tunes and of one that began with what it chooses."""
    case, own = TABLE["groups_with_adamw"], feature.proposal
    feature.proposal = lambda *_: Best(CHOSEN, 1e-6)
    try:
        engine = engine_for(case, config(zero, tune=True))
        begun = len(engine._parts.reduction.plan.buckets)
        tuned = trained(engine, rank)
        plan = engine._parts.reduction.plan.digest
        assert feature.present_setting(engine._parts) == CHOSEN
        hooks = [p._backward_hooks for p in engine.module.parameters()]
    finally:
        feature.proposal = own
    there = engine_for(case, config(zero, bucket_bytes=CHOSEN.bucket_bytes, window="all"))
    chosen = trained(there, rank)
    buckets = len(there._parts.reduction.plan.buckets)
    assert there._parts.reduction.plan.digest == plan
    assert not any(hooks), "what observed has left hooks"
    return tuned, chosen, begun, buckets


@pytest.mark.parametrize("zero", [{}, OPTIMIZER], ids=["", "offloaded"])
def test_a_run_that_tunes_is_one_with_the_chosen_setting_from_the_start(
    zero: dict[str, Any],
) -> None:
    """On the CPU offloading asks for nothing."""
    here, there = ranks.shared(2, first_windows, zero)
    tuned, chosen, begun, buckets = here
    assert here == there
    assert tuned == chosen
    assert begun > buckets


def unpatched(rank: int, world: int) -> Any:
    """Nothing is replaced: whatever is chosen, all ranks choose it, and once."""
    engine = engine_for(TABLE["groups_with_adamw"], config(tune=True))
    found = []
    for step in range(3):
        take_step(engine, TABLE["groups_with_adamw"], rank, step)
        found.append(len(engine._parts.reduction.plan.buckets))
    keep(engine)
    return found, engine._parts.reduction.plan.digest


def test_ranks_choose_alike_and_nothing_moves_afterwards() -> None:
    here, there = ranks.shared(2, unpatched)
    assert here == there
    first, second, third = here[0]
    assert first == second == third


def long_before(rank: int, world: int, fails: bool) -> Any:
    """What the first window is predicted from, where half a second passes before it, and is said to
    take.
    """
    case, own, seen, said = TABLE["groups_with_adamw"], feature.proposal, [], []

    def present(parts: Any, predictor: Any, wires: Any) -> Best:
        seen.append((predictor.profile, predictor.seconds(parts.reduction.plan)))
        return Best(feature.present_setting(parts), 1.0)

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listening, log = Listening(), logging.getLogger("zerort")
    log.addHandler(listening)
    feature.proposal = present
    try:
        engine = engine_for(case, {**config(tune=True), "log_level": "info"})
        if fails and rank == 1:
            with pytest.raises(StepError):
                engine.backward(torch.ones(2, requires_grad=True))
        elif fails:
            case.micro(engine, Moment(rank, 0, 0))
            with pytest.raises(StepError):
                engine.step()
        time.sleep(0.5)
        take_step(engine, case, rank, 0)
    finally:
        feature.proposal = own
        log.removeHandler(listening)
        keep(engine)
    (profile, seconds), *_ = seen
    return profile.wall, profile.other, seconds, [text for text in said if "no other" in text]


@pytest.mark.parametrize("fails", [False, True], ids=["", "behind_a_window_that_failed"])
def test_what_lies_before_the_first_forward_is_no_part_of_a_step(fails: bool) -> None:
    (wall, other, seconds, said), _ = ranks.shared(2, long_before, fails)
    assert wall < 0.5
    assert other < 0.5
    assert said == [
        f"zerort.tune: no other buckets are predicted to be faster than {1000 * seconds:.1f} ms"
    ]


def failing_first(rank: int, world: int) -> Any:
    """A rank fails in the first window: the next one is the first."""
    case, own = TABLE["groups_with_adamw"], feature.proposal
    feature.proposal = lambda *_: Best(CHOSEN, 1e-6)
    try:
        engine = engine_for(case, config(tune=True))
        before = len(engine._parts.reduction.plan.buckets)
        if rank == 1:
            with pytest.raises(StepError):
                engine.backward(torch.ones(2, requires_grad=True))
        else:
            case.micro(engine, Moment(rank, 0, 0))
            with pytest.raises(StepError):
                engine.step()
        lost = len(engine._parts.reduction.plan.buckets)
        take_step(engine, case, rank, 1)
        return before, lost, len(engine._parts.reduction.plan.buckets)
    finally:
        feature.proposal = own
        keep(engine)


def test_a_window_in_which_a_rank_fails_is_passed_over() -> None:
    for before, lost, after in ranks.shared(2, failing_first):
        assert before == lost > after


def after_a_checkpoint(rank: int, world: int, folder: str) -> Any:
    case = TABLE["groups_with_adamw"]
    saver = engine_for(case, config())
    take_step(saver, case, rank, 0)
    saver.save_checkpoint(folder, "t")
    own = feature.proposal
    feature.proposal = lambda *_: Best(CHOSEN, 1e-6)
    try:
        engine = engine_for(case, config(tune=True))
        before = len(engine._parts.reduction.plan.buckets)
        engine.load_checkpoint(folder, "t")
        for each in (engine, saver):
            take_step(each, case, rank, 1)
    finally:
        feature.proposal = own
    same = all(map(torch.equal, weights(engine).values(), weights(saver).values()))
    keep(saver)
    keep(engine)
    return same, before == len(engine._parts.reduction.plan.buckets)


def test_a_checkpoint_that_was_loaded_stays_where_it_is(tmp_path: Path) -> None:
    assert ranks.shared(2, after_a_checkpoint, str(tmp_path)) == [(True, True)] * 2


def test_it_is_refused_where_buckets_cannot_be_changed() -> None:
    with pytest.raises(ConfigError, match="tune: at stage 3"):
        zerort.initialize(
            model=nn.Linear(4, 4),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
                **TUNED,
            },
        )


def test_homes_beside_a_device_are_tuned_in_no_way() -> None:
    """Its host's times say nothing of it, whatever is at home there."""
    setting = homes.Setting(2)
    with Machine().running():
        with pytest.raises(ConfigError, match="tune: on an accelerator the host's times"):
            zerort.initialize(model=nn.Linear(4, 4), config=setting.config(OPTIMIZER) | TUNED)
        engine = homes.engine_of(setting, OPTIMIZER)
        with pytest.raises(ConfigError, match=r"engine.tune\(\): on an accelerator"):
            engine.tune()
        keep(engine)


# ---- engine.tune


def observed(rank: int, world: int, folder: str) -> Any:
    case = TABLE["groups_with_adamw"]
    file = Path(folder) / "train.json"
    if rank == 0:
        file.write_text("// why\n" + json.dumps(config(publish="step")))
    # else what is between two steps, on a busy machine long, hides what small buckets cost
    engine = engine_for(case, config(publish="step"))
    heard: list[Any] = []
    engine.tune(steps=2, config=str(file))
    tuning = engine._events.features[-1]
    own = tuning._found
    tuning._found = lambda findings: (heard.append(findings), own(findings))
    hooks = []
    for step in range(WARM_UP + 4):
        take_step(engine, case, rank, step)
        hooks.append(any(p._backward_hooks for p in engine.module.parameters()))
    keep(engine)
    return heard, hooks


def test_engine_tune_finds_the_same_on_all_ranks_once_and_leaves_no_hook(tmp_path: Path) -> None:
    (here, hooks), (there, _) = ranks.shared(2, observed, str(tmp_path))
    assert here == there
    assert len(here) == 1
    found = here[0]
    assert found.steps == 2
    assert found.present == Setting(64, None)
    assert 0 < found.proposed_predicted <= found.predicted < 10
    assert 0 < found.measured < 10
    assert hooks == [False] * (WARM_UP - 1) + [True] * 3 + [False] * 2
    # each tiny bucket costs an alpha, so fewer are faster
    written = json.loads((tmp_path / "train.tuned.json").read_text())
    assert written["zerort"]["bucket_bytes"] == found.proposed.bucket_bytes > 64
    assert written["gradient_clipping"] == config()["gradient_clipping"]


def views(rank: int, world: int) -> Any:
    """From when on updates overlap in a prediction, by wish and by whether one rank has a view."""
    found, own = {}, feature.measure_wire
    feature.measure_wire = lambda mesh: Wire(2, Line(0.0, 0.0), Line(0.0, 0.0), 0.0)
    try:
        for wish in ("auto", "overlapped", "step"):
            engine = engine_for(TABLE["groups_with_adamw"], config(publish=wish))
            observer = Observer(engine._parts)
            take_step(engine, TABLE["groups_with_adamw"], rank, 0)
            observer.crossed()
            for viewed in (False, True):
                first = next(engine.module.parameters())
                view = first.data.view(-1)[1:] if viewed and rank == 1 else None
                found[wish, viewed] = feature.measured(engine._parts, observer).overlap
                del view
            observer.close()
            keep(engine)
    finally:
        feature.measure_wire = own
    return found


def test_updated_parameters_are_predicted_as_the_engine_would_wait_for_them_on_all_ranks() -> None:
    here, there = ranks.shared(2, views)
    assert here == there
    assert here["auto", False] == threshold("auto", timed=True)
    assert here["auto", False] is not None and here["auto", True] is None
    assert here["overlapped", False] == here["overlapped", True] == (0.0, 0.0)
    assert here["step", False] is here["step", True] is None


def test_engine_tune_refuses_what_it_cannot_observe(tmp_path: Path) -> None:
    engine = engine_for(TABLE["mlp"], config_of(TABLE["mlp"], 1))
    with pytest.raises(ConfigError, match="at least one step, got 0"):
        engine.tune(steps=0)
    with pytest.raises(ConfigError, match="No such file"):
        engine.tune(config=str(tmp_path / "none.json"))
    engine.destroy()


# ---- the command


def test_the_environment_puts_a_setting_in_the_place_of_the_programs(monkeypatch: Any) -> None:
    task = Task("f", 3, Setting(1 << 20, 2, "bf16"))
    monkeypatch.setenv(VARIABLE, task.environment()[VARIABLE])
    assert Task.given() == task
    given = load({"train_batch_size": 1, "zero_optimization": {"reduce_bucket_size": 10}})
    changed = overridden(given)
    assert (changed.cap_bytes, changed.cap_elements) == (1 << 20, None)
    assert (changed.zerort.window, changed.zerort.wire) == (2, "bf16")
    monkeypatch.setenv(VARIABLE, "nonsense")
    with pytest.raises(ConfigError, match="ZERORT_TUNE: expected what the command"):
        Task.given()


def command(folder: Path, capfd: Any, *words: str, options: tuple[str, ...] = ()) -> Any:
    """Status, the last line on stderr, and stdout."""
    file = folder / "train.json"
    file.write_text(json.dumps(config()))
    try:
        status = main(["tune", str(file), *options, "--", *words])
    except SystemExit as ended:
        status = ended.code
    said = capfd.readouterr()
    return status, said.err.strip().rpartition("\n")[2], said.out


PROGRAM = """
import sys, torch, zerort
model = torch.nn.Linear(8, 8)
engine, *_ = zerort.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    config={"train_micro_batch_size_per_gpu": 1, "steps_per_print": None})
for _ in range(int(sys.argv[1])):
    engine.backward(engine(torch.ones(1, 8)).sum())
    engine.step()
print("went on")
"""


def test_what_goes_wrong_is_one_line_and_a_status(tmp_path: Path, capfd: Any) -> None:
    ends: tuple[str, ...] = ("/bin/sh", "-c")
    status, said, _ = command(tmp_path, capfd, *ends, "exit 7")
    assert (status, said) == (7, "zerort: the command ended with status 7")
    status, said, _ = command(tmp_path, capfd, *ends, "kill -9 $$")
    assert (status, said) == (137, "zerort: the command ended with status 137")
    status, said, _ = command(tmp_path, capfd, *ends, "exit 0")
    assert (status, "never made an engine" in said) == (2, True)
    status, said, _ = command(tmp_path, capfd, "/no/such/program")
    assert (status, "cannot be run" in said) == (2, True)
    status, said, _ = command(tmp_path, capfd)
    assert (status, "expected the command that trains" in said) == (2, True)
    (tmp_path / "train.tuned.json").write_text("{}")
    status, said, _ = command(tmp_path, capfd, *ends, "exit 0")
    assert (status, "is not overwritten" in said) == (2, True)
    (tmp_path / "train.tuned.json").unlink()
    there = ("-o", str(tmp_path / "no" / "folder.json"))
    status, said, _ = command(tmp_path, capfd, *ends, "exit 0", options=there)
    assert (status, "cannot be written" in said) == (2, True)


@pytest.mark.slow
def test_a_program_that_ends_too_early_is_told_how_many_steps_it_takes(
    tmp_path: Path, capfd: Any
) -> None:
    program = (sys.executable, "-c", PROGRAM, "4")
    status, said, _ = command(tmp_path, capfd, *program, options=("--steps", "2"))
    assert status == 2
    assert f"after 4 steps, and {WARM_UP + 3} are needed" in said


def test_a_program_is_measured_and_ends_behind_its_steps(tmp_path: Path, capfd: Any) -> None:
    options = ("--steps", "2", "--json")
    program = (sys.executable, "-c", PROGRAM, "99")
    status, said, out = command(tmp_path, capfd, *program, options=options)
    assert status == 0, said
    assert "went on" not in said
    document = json.loads(out)
    assert document["settings"][0]["measured"] > 0
    assert document["written"] is None  # one rank sends nothing, so there is nothing to gain
    assert not (tmp_path / "train.tuned.json").exists()
