"""Each feature at every stage that allows it, with and without accumulation, on one rank and on
two, with a checkpoint in the middle: the run that is resumed ends with the bits of the one that was
not interrupted, and what only observes changes no bit. All variants of a world share its processes.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from monitored import LOSS, values
from training import at_stage, keep
from zerort.device.markers import Markers
from zerort.start import observers

pytestmark = pytest.mark.timeout(180)

WINDOWS, SAVED = 5, 3
"""Of a run; of those, how many lie before its checkpoint."""
LAYERS = 2
SCALED = {"initial_scale_power": 6, "loss_scale_window": 2}
FEATURES: dict[str, dict[str, Any]] = {
    "none": {},
    "observers": {
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True},
        "csv_monitor": {"enabled": True, "job_name": "run"},
        "flops_profiler": {"enabled": True, "profile_step": SAVED},
    },
    "layer drop": {"progressive_layer_drop": {"enabled": True, "theta": 0.3, "gamma": 0.5}},
    "eigenvalues and quantized training": {
        "fp16": {"enabled": True, "auto_cast": True, **SCALED},
        "quantize_training": {
            "enabled": True,
            "quantize_bits": {"start_bits": 8, "target_bits": 4},
            "quantize_schedule": {"quantize_period": 1, "schedule_offset": 1},
            "eigenvalue": {"enabled": True, "layer_name": "layers", "layer_num": LAYERS},
        },
    },
    "AMP O1": {"amp": {"enabled": True, "opt_level": "O1", "max_loss_scale": 2**7}},
    "AMP O2": {"amp": {"enabled": True, "opt_level": "O2", "loss_scale": 64}},
}
BELOW_3 = "eigenvalues and quantized training"
CASES = [
    (name, stage, gas)
    for name, stage, gas in itertools.product(FEATURES, range(4), (1, 3))
    if stage < 3 or name != BELOW_3
]


def cases_of(world: int) -> list[tuple[str, int, int]]:
    """Gas 1 and 3 in turn from stage to stage; on one rank as it is not on two."""
    return [case for case in CASES if (case[2] == 3) is (case[1] % 2 == world % 2)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(LAYERS))
        self.thetas: list[float] = []

    def forward(self, x: Tensor, pld_theta: float = 1.0, **keywords: Any) -> Tensor:
        self.thetas.append(pld_theta)
        for layer in self.layers:
            x = x + pld_theta * torch.tanh(layer(x))
        return x.float().square().mean()


def engine_of(case: tuple[str, int, int], folder: str) -> Any:
    name, stage, gas = case
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 0.5,
        **at_stage(stage),
        **{
            key: {**section, "output_path": folder} if key == "csv_monitor" else section
            for key, section in FEATURES[name].items()
        },
    }
    if "flops_profiler" in config:
        report = os.path.join(folder, "flops.txt")
        config["flops_profiler"] = {**config["flops_profiler"], "output_file": report}
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = zerort.initialize(model=model, optimizer=optimizer, config=config)[0]
    keep(engine)
    return engine


def train(engine: Any, rank: int, windows: range) -> None:
    gas = engine.gradient_accumulation_steps()
    for micro in range(windows.start * gas, windows.stop * gas):
        drawn = torch.Generator().manual_seed(100 * micro + rank)
        engine.backward(engine(torch.randn(2, 4, generator=drawn)))
        engine.step()


def ended(engine: Any) -> dict[str, Any]:
    with zerort.zero.GatheredParameters(list(engine.module.parameters())):
        weights = torch.cat([p.detach().double().flatten() for p in engine.module.parameters()])
    return {
        "weights": weights,
        "norm": engine.get_global_grad_norm(),
        "scale": engine.loss_scale,
        "thetas": engine.module.thetas,
        "eigenvalues": engine.block_eigenvalue,
        "timers": engine.get_wall_clock_timers(),
        "speed": engine.tput_timer.avg_samples_per_sec(),
        "communication": engine.communication_summary(),
        "skipped": engine.skipped_steps,
    }


def run_cases(rank: int, world: int, folder: str) -> dict[Any, tuple[Any, ...]]:
    """Of each case the run in one go, the resumed one, and the ranges that both opened."""
    found = {}
    for case in cases_of(world):
        ranges: Counter[str] = Counter()
        depth = [0]

        def push(name: str, ranges: Counter[str] = ranges, depth: list[int] = depth) -> None:
            ranges[name] += 1
            depth[0] += 1

        def pop(depth: list[int] = depth) -> None:
            depth[0] -= 1

        pair = Markers(push, pop)
        observers.markers_of = lambda device, pair=pair: pair  # type: ignore[attr-defined]
        here = os.path.join(folder, str(CASES.index(case)))
        whole = engine_of(case, os.path.join(here, "whole"))
        train(whole, rank, range(SAVED))
        whole.save_checkpoint(os.path.join(here, "saved"))
        train(whole, rank, range(SAVED, WINDOWS))
        resumed = engine_of(case, os.path.join(here, "resumed"))
        resumed.load_checkpoint(os.path.join(here, "saved"))
        train(resumed, rank, range(SAVED, WINDOWS))
        found[case] = ended(whole), ended(resumed), dict(ranges), depth[0]
    return found


@pytest.fixture(scope="module")
def once(tmp_path_factory: Any) -> Callable[[int], tuple[Path, int, Any]]:
    """All cases of a world. pytest would make a fixture of the module's anew for each parameter
    beside the world.
    """

    @ranks.once(None)
    def made(world: int) -> tuple[Path, int, Any]:
        folder = tmp_path_factory.mktemp("grid")
        return folder, world, ranks.run(world, run_cases, str(folder), timeout=150)

    return made


@pytest.fixture
def runs(request: Any, once: Callable[[int], tuple[Path, int, Any]]) -> tuple[Path, int, Any]:
    return once(request.param)


def on_both(*, named: str = "") -> Any:
    """Cases on two ranks, and in the slow tests on one."""
    found = []
    for world, marks in ((2, ()), (1, pytest.mark.slow)):
        for case in cases_of(world):
            where = "{}, stage {}, gas {}, {} ranks".format(*case, world)
            if named in ("", case[0]):
                found.append(pytest.param(world, case, marks=marks, id=where))
    return pytest.mark.parametrize(("runs", "case"), found, indirect=["runs"])


@on_both()
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(runs: Any, case: Any) -> None:
    _, world, found = runs
    name, stage, gas = case
    for rank in range(world):
        whole, resumed, ranges, depth = found[rank][case]
        for key in ("weights", "norm", "scale", "skipped"):
            a, b = whole[key], resumed[key]
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, key
        assert torch.equal(whole["weights"], found[0][case][0]["weights"])
        # as of the last boundary at which bits were about to fall
        assert resumed["eigenvalues"] in (None, whole["eigenvalues"])
        windows = 2 * WINDOWS - SAVED
        assert whole["thetas"][-(WINDOWS - SAVED) * gas :] == resumed["thetas"]
        assert depth == 0 and ranges["zerort.forward"] == windows * gas
        assert ranges["zerort.backward"] == ranges["zerort.step"] == windows * gas
        assert ranges["zerort.vote"] >= windows
        assert 0 < whole["speed"] < math.inf
        plain = found[rank]["none", stage, gas][0]
        if name == "observers":
            assert torch.equal(whole["weights"], plain["weights"])
        else:
            assert (name == "none") is torch.equal(whole["weights"], plain["weights"])


@on_both(named="observers")
def test_what_observes_has_seen_the_run(runs: Any, case: Any) -> None:
    folder, world, found = runs
    _, _, gas = case
    here = folder / str(CASES.index(case))
    for rank in range(world):
        for ended in found[rank][case][:2]:
            timers = ended["timers"]
            for part in ("fwd", "bwd", "step"):
                assert timers[part] >= timers[f"{part}_microstep"] > 0
            summary = ended["communication"]["summary"]
            assert world == 1 or set(summary) == {"reduce_scatter", "all_gather"}
    samples = [2 * gas * world * (window + 1) for window in range(WINDOWS)]
    whole, resumed = (values(here / part / "run", LOSS) for part in ("whole", "resumed"))
    assert [step for step, _ in whole] == samples and resumed == whole[SAVED:]
    for part in ("whole", "resumed"):
        report = (here / part / "flops.txt").read_text("utf-8")
        assert report.count("Profile summary at step") == 1
        assert f"Profile summary at step {SAVED}:" in report


@pytest.mark.parametrize("runs", [2], indirect=True)
def test_what_is_tried_here_does_something(runs: Any) -> None:
    _, _, found = runs
    assert min(found[0]["layer drop", 0, 3][0]["thetas"]) < 1.0
    assert found[0][BELOW_3, 0, 3][0]["eigenvalues"]
    assert found[0]["AMP O1", 0, 3][0]["scale"] <= 2**7
