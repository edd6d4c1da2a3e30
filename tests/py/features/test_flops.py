"""The flops profiler on the engine: one report, of one step's first forward, at every stage; and
training goes on as without it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ranks
import zerort
from breaking import raises_in_backward
from catching import assert_told, caught
from models import VOCABULARY, TinyGPT
from stand_in import Event, Machine, Simulated
from training import at_stage, keep, weights
from zerort.errors import ConfigError, PlanError, StepError
from zerort.profiling import FlopsProfiler, get_model_profile, laps
from zerort.profiling.strings import duration_to_string

pytestmark = pytest.mark.timeout(120)

ON = {"enabled": True, "profile_step": 1}
HEAD = "zerort flops profiler"


def engine_over(
    model: nn.Module, stage: int = 0, gas: int = 1, section: Any = ON, **more: Any
) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        **at_stage(stage),
        **({"flops_profiler": section} if section else {}),
        **more,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = zerort.initialize(model=model, optimizer=optimizer, config=config)[0]
    keep(engine)
    return engine


def seeded() -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT()


def tokens(seed: int, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (2, length), generator=generator)


def train(engine: Any, micro_batches: int, rank: int = 0) -> str:
    """What was printed meanwhile."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for index in range(micro_batches):
            engine.backward(engine(tokens(10 * index + rank)))
            engine.step()
    return printed.getvalue()


def value(text: str, label: str) -> str:
    found = re.findall(rf"^{re.escape(label)}: +(.*?) *$", text, re.MULTILINE)
    assert len(found) == 1, (label, text)
    return found[0]


def hooks_of(module: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]


CASES = [(0, 1), (0, 3), (1, 3), (2, 1), (2, 3), (3, 1), (3, 3)]


def profiled_and_not(rank: int, world: int) -> list[tuple[Any, ...]]:
    found = []
    for stage, gas in CASES:
        plain = engine_over(seeded(), stage, gas, section=None)
        train(plain, 3 * gas, rank)
        engine = engine_over(seeded(), stage, gas)
        before = hooks_of(engine.module)
        text = train(engine, 3 * gas, rank)
        same = all(torch.equal(a, b) for a, b in zip(*map(values, (plain, engine)), strict=True))
        found.append((text, same, before == hooks_of(engine.module)))
    return found


def values(engine: Any) -> list[Tensor]:
    return list(weights(engine).values())


@ranks.once(maxsize=None)
def both_ranks() -> Any:
    return ranks.run(2, profiled_and_not)


EXPECTED = get_model_profile(seeded(), args=[tokens(0)], print_profile=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"stage {case[0]}, gas {case[1]}")
def test_one_rank_reports_one_step_once_and_trains_as_without_it(case: tuple[int, int]) -> None:
    first, second = (found[CASES.index(case)] for found in both_ranks())
    assert first[0].count(HEAD) == 1 and HEAD not in second[0]
    assert "Profile summary at step 1:" in first[0]
    flops, macs, params = EXPECTED
    for label, expected in (
        ("world size", "2"),
        ("batch size per GPU", "2"),
        ("params per GPU", params),
        ("fwd MACs per GPU", macs),
        ("fwd flops per GPU", str(flops)),
    ):
        assert value(first[0], label) == expected
    assert "(layers): ModuleList(" in first[0], "the tree is the user's own model"
    assert first[1] and second[1], "the weights are the same to the bit"
    assert first[2] and second[2], "no hook is left"


def test_the_step_is_counted_from_zero_and_one_beyond_the_run_never_comes() -> None:
    for step in (0, 2, 3):
        engine = engine_over(seeded(), section={"enabled": True, "profile_step": step})
        texts = [train(engine, 1) for _ in range(3)]
        assert [HEAD in text for text in texts] == [index == step for index in range(3)]
        assert step == 3 or f"at step {step}:" in texts[step]


def test_the_report_is_of_the_windows_first_forward() -> None:
    engine = engine_over(seeded(), gas=3, section={"enabled": True, "profile_step": 0})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for length in (12, 6, 3):
            engine.eval()
            with torch.no_grad():
                engine(tokens(0, 4))
            engine.train()
            engine.backward(engine(tokens(0, length)))
            engine.step()
    assert value(printed.getvalue(), "fwd flops per GPU") == EXPECTED[0]


class Ticks(nn.Module):
    """On a clock of its own a forward takes 2 seconds, and a backward 5."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.now = seeded(), 0.0

    def tick(self, seconds: float) -> None:
        self.now += seconds

    def forward(self, x: Tensor) -> Tensor:
        self.tick(2)
        loss: Tensor = self.inner(x)
        loss.register_hook(lambda gradient: self.tick(5))
        return loss


def test_times_are_a_micro_batchs_share_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Ticks()
    engine = engine_over(model, gas=3, zerort={"peak_flops": 1e9})
    monkeypatch.setattr(laps, "time", SimpleNamespace(perf_counter=lambda: model.now))
    engine.optimizer.register_step_post_hook(lambda *_: model.tick(1.5))
    text = train(engine, 6)
    for label, expected in (
        ("fwd latency", "2 s"),
        ("bwd latency", "5 s"),
        ("step latency", "500 ms"),
        ("iter latency", "7.5 s"),
        ("samples/second", "0.27"),
    ):
        assert value(text, label) == expected
    flops = get_model_profile(seeded(), args=[tokens(0)], print_profile=False, as_string=False)[0]
    label = "MFU = 3 * fwd flops per GPU / iter latency / peak FLOPS"
    assert value(text, label) == f"{100 * 3 * flops / 7.5 / 1e9:.2f} %"


def test_without_a_backward_of_the_engines_there_are_no_times_of_it() -> None:
    engine = engine_over(seeded())
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for index in range(2):
            engine(tokens(index)).backward()
            engine.step()
    assert value(printed.getvalue(), "fwd flops per GPU") == EXPECTED[0]
    assert "bwd latency" not in printed.getvalue()


def test_what_is_recomputed_counts_in_the_rates() -> None:
    section = {**ON, "recompute_fwd_factor": 1.0, "detailed": False, "top_modules": 3}
    text = train(engine_over(seeded(), section=section), 2)
    value(text, "FLOPS per GPU = 4 * fwd flops per GPU / iter latency")
    assert "Detailed profile" not in text and "Top 3 by depth" in text


class Fails(nn.Module):
    """Raises in its forward, once, when asked to."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.inner, self.error = seeded(), error

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.inner(x)
        error, self.error = self.error, None
        if error is not None:
            raise error
        return loss


def test_a_forward_that_raises_is_not_the_one_that_is_reported() -> None:
    model = Fails()
    engine = engine_over(model, gas=3, section={"enabled": True, "profile_step": 0})
    before = hooks_of(model)
    for error in (ValueError("mine"), KeyboardInterrupt()):
        model.error = error
        with pytest.raises(type(error)):
            engine(tokens(0, 5))
        assert hooks_of(model) == before
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    text = train(engine, 3)
    assert text.count(HEAD) == 1 and value(text, "fwd flops per GPU") == EXPECTED[0]


def test_what_this_torch_cannot_count_is_said() -> None:
    model = Fails(NotImplementedError("There was no rule registered for HOP cond and mode x"))
    engine = engine_over(model, section={"enabled": True, "profile_step": 0})
    error = caught(lambda: engine(tokens(0)))
    assert_told(error, StepError, "cannot count what the forward calls", "HOP cond")
    model.error = NotImplementedError("mine")
    with pytest.raises(NotImplementedError, match="mine"):
        engine(tokens(0))


def fail_on_one(rank: int, world: int, micro: int) -> tuple[str, list[Any]]:
    """The profiled window fails on rank 1, in this micro-batch, and is tried again."""
    engine = engine_over(seeded(), gas=2, section={"enabled": True, "profile_step": 0})
    errors = []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for index in range(2):
            loss = engine(tokens(rank, 5))
            if rank == 1 and index == micro:
                loss = raises_in_backward(loss, ValueError("exploded"))
            errors += [caught(partial(engine.backward, loss)), caught(engine.step)]
    return printed.getvalue() + train(engine, 4, rank), errors


@pytest.mark.parametrize("micro", [0, 1])
def test_a_window_that_failed_is_not_the_one_that_is_reported(micro: int) -> None:
    (text, errors), (silent, _) = ranks.run(2, fail_on_one, micro)
    assert_told(errors[-1], StepError, "rank 1", "exploded")
    assert text.count(HEAD) == 1 and silent == ""
    assert value(text, "fwd flops per GPU") == EXPECTED[0]


def compiled(rank: int, world: int) -> list[Any]:
    found = []
    for stage, how in ((0, "whole"), (2, "blocks"), (3, "blocks")):
        model, plain = seeded(), seeded()
        if how == "blocks":
            for layer in model.layers:
                layer.compile(backend="aot_eager")
        engine, other = engine_over(model, stage), engine_over(plain, stage, section=None)
        if how == "whole":
            engine.compile("aot_eager")
        text = train(engine, 3, rank)
        train(other, 3, rank)
        same = all(torch.equal(a, b) for a, b in zip(*map(values, (engine, other)), strict=True))
        found.append((text, same))
    return found


@pytest.mark.slow
def test_a_compiled_module_is_counted_uncompiled_on_all_ranks() -> None:
    for (text, same), (_, same_there) in zip(*ranks.run(2, compiled, timeout=100), strict=True):
        assert value(text, "fwd flops per GPU") == EXPECTED[0]
        assert same and same_there


class Recomputed(nn.Module):
    """A compiled layer whose activations are computed anew in the backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        layer.compile(backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return y


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own
@pytest.mark.parametrize("gas", [1, 2])
def test_what_a_backward_computes_anew_is_not_compiled_either_and_is_again(gas: int) -> None:
    def stance() -> str:
        return str(torch._dynamo.eval_frame._stance.stance)

    torch._dynamo.reset()
    model, plain = seeded(), seeded()
    model.layers = nn.ModuleList(Recomputed(layer) for layer in model.layers)
    engine = engine_over(model, gas=gas)
    other = engine_over(plain, gas=gas, section=None)
    stances = []
    text = ""
    for index in range(3 * gas):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            loss = engine(tokens(index))
            stances.append(stance())
            engine.backward(loss)
            engine.step()
        text += printed.getvalue()
        assert stance() == "default"
        other.backward(other(tokens(index)))
        other.step()
    assert [name == "force_eager" for name in stances] == [i == gas for i in range(3 * gas)]
    assert value(text, "fwd flops per GPU") == EXPECTED[0]
    assert all(map(torch.equal, values(engine), values(other)))


def test_an_engine_that_is_given_back_in_between_leaves_nothing_uncompiled() -> None:
    engine = engine_over(seeded(), section={"enabled": True, "profile_step": 0})
    engine(tokens(0))
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    engine.destroy()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_run_that_is_resumed_reports_its_step(tmp_path: Path) -> None:
    section = {"enabled": True, "profile_step": 2}
    engine = engine_over(seeded(), section=section)
    assert HEAD not in train(engine, 1)
    engine.save_checkpoint(tmp_path)
    resumed = engine_over(seeded(), section=section)
    resumed.load_checkpoint(tmp_path)
    assert [HEAD in train(resumed, 1) for _ in range(3)] == [False, True, False]


def test_a_profiler_of_ones_own_reads_the_engines_timers() -> None:
    engine = engine_over(seeded(), gas=2, section=None, wall_clock_breakdown=True)
    train(engine, 2)
    profiler = FlopsProfiler(engine.module, engine)
    profiler.start_profile()
    engine(tokens(0))
    profiler.stop_profile()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        profiler.print_model_profile()
    text, times = printed.getvalue(), engine.get_wall_clock_timers()
    assert value(text, "fwd flops per GPU") == EXPECTED[0]
    for label, name in (("fwd latency", "fwd"), ("bwd latency", "bwd"), ("step latency", "step")):
        assert value(text, label) == duration_to_string(times[name] / 2 / 1e3)


def test_an_accelerators_times_are_its_own_and_nobody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the simulated device every operation takes a millisecond, and the host far less."""
    waits: list[str] = []
    monkeypatch.setattr(Event, "synchronize", lambda event: waits.append("event"))
    monkeypatch.setattr(Event, "query", lambda event: True)
    machine = Machine()
    with machine.running(Simulated()), contextlib.redirect_stdout(io.StringIO()) as printed:
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        engine = engine_over(model, section={**ON, "profile_step": 0})
        loss = engine(torch.ones(2, 16)).square().mean()
        engine.backward(loss)
        assert waits == machine.syncs == []
        engine.step()
    assert waits, "the report reads the times"
    text = printed.getvalue()
    assert value(text, "fwd latency") == "3 ms"
    assert "(1): Tanh(0 = 0% Params, 0 MACs = 0% MACs, 1 ms = 33.33% latency" in text


def with_others(rank: int, world: int, folder: str) -> list[tuple[str, bool]]:
    """fp16, layer drop and a monitor beside the profiler."""
    others = {
        "fp16": {"enabled": True, "initial_scale_power": 8},
        "progressive_layer_drop": {"enabled": True, "theta": 0.5, "gamma": 0.1},
        "csv_monitor": {"enabled": True, "output_path": folder},
    }
    found = []
    for stage in (1, 3):
        engines = [
            engine_over(Keeping(), stage, 2, section=section, **others) for section in (ON, None)
        ]
        text = "".join(train(engine, 6, rank) for engine in engines)
        found.append((text, all(map(torch.equal, *map(values, engines)))))
    return found


class Keeping(nn.Module):
    """Takes what layer drop gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = seeded()

    def forward(self, x: Tensor, progressive_layer_drop: bool, pld_theta: float) -> Tensor:
        loss: Tensor = self.inner(x) * pld_theta
        return loss


def test_beside_other_features_it_changes_nothing_either(tmp_path: Path) -> None:
    for (text, same), (_, same_there) in zip(
        *ranks.run(2, with_others, str(tmp_path)), strict=True
    ):
        assert text.count(HEAD) == 1 and value(text, "fwd flops per GPU") == EXPECTED[0]
        assert same and same_there


# ---- where it goes


def test_a_file_is_written_and_standard_output_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "flops.txt"
    engine = engine_over(seeded(), section={**ON, "output_file": str(path)})
    assert not path.exists() and path.parent.is_dir()
    assert train(engine, 3) == ""
    assert path.read_text().count(HEAD) == 1


def test_a_file_that_can_no_longer_be_written_has_the_report_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "flops.txt"
    engine = engine_over(seeded(), section={**ON, "output_file": str(path)})
    path.mkdir()
    assert HEAD in train(engine, 2)
    assert "flops_profiler.output_file" in caplog.text and "the report is printed" in caplog.text
    assert engine.global_steps == 2


def start_with_a_folder(rank: int, world: int, path: str) -> Any:
    section = {**ON, "output_file": f"{path}-of-rank-{rank}" if rank else path}
    return caught(lambda: engine_over(seeded(), section=section))


def test_a_file_that_cannot_be_written_stops_all_ranks_at_the_start(tmp_path: Path) -> None:
    first, second = ranks.run(2, start_with_a_folder, str(tmp_path))
    assert_told(first, ConfigError, "flops_profiler.output_file", str(tmp_path), "another path")
    assert_told(second, PlanError, "rank 0", "flops_profiler.output_file")


def test_a_tree_that_cannot_be_shown_is_shown_without_its_text() -> None:
    class Odd(nn.Linear):
        def extra_repr(self) -> str:
            raise ValueError("no text")

    model = nn.Sequential(Odd(4, 4))
    engine = engine_over(model, section={"enabled": True, "profile_step": 0})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        engine.backward(engine(torch.ones(2, 4)).sum())
        engine.step()
    assert "extra_repr() raised ValueError" in printed.getvalue()


def test_the_times_of_each_step_are_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "zerort")
    train(engine_over(seeded()), 1)
    assert "time (ms) | forward" in caplog.text


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"profile_step": -1}, "profile_step: expected a number of at least 0, got -1"),
        ({"module_depth": -2}, "module_depth: expected a number of at least -1, got -2"),
        ({"top_modules": 0}, "top_modules: expected a number of at least 1, got 0"),
        ({"recompute_fwd_factor": -0.5}, "recompute_fwd_factor: expected a number of at least 0"),
        ({"enabled": "yes"}, "enabled: expected true or false"),
        ({"profil_step": 2}, 'did you mean "profile_step"?'),
        ({"output_file": 3}, "output_file: expected a string"),
    ],
)
def test_numbers_out_of_range_and_unknown_keys_are_refused(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        engine_over(seeded(), section=json.loads(json.dumps(section)))
