"""Progressive layer drop: theta as recorded, what a module's forward gets, models that drop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from training import at_stage, keep
from zerort.config.features import ProgressiveLayerDrop
from zerort.errors import ConfigError
from zerort.features.layer_drop import LayerDrop
from zerort.step.accumulation import Counters

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "pld.json").read_text("utf-8"))
EXACT = {"rel": 1e-15, "abs": 0}


IN_RANGE = [r for r in RECORDED["schedule"] if 0 <= r["theta"] <= 1 and r["gamma"] >= 0]


@pytest.mark.parametrize("row", IN_RANGE, ids=lambda row: f"{row['theta']}-{row['gamma']}")
def test_theta_falls_as_recorded(row: dict[str, Any]) -> None:
    counters = Counters()
    settings = ProgressiveLayerDrop(enabled=True, theta=row["theta"], gamma=row["gamma"])
    drop = LayerDrop(settings, nn.Identity(), counters)
    assert drop.theta == row["before_any_step"]
    found = []
    for t in row["t"]:
        counters.global_steps = t + 1
        found.append(drop.theta)
    assert found == pytest.approx(row["theta_t"], **EXACT)


class Told(nn.Module):
    """Remembers the keyword arguments of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.told: dict[str, Any] = {}

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        self.told = keywords
        return self.inner(x).sum()


def test_the_engine_has_what_theta_is_asked_of() -> None:
    engine = engine_over(Told())
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 2)))
        engine.step()
    drop = engine.progressive_layer_drop
    assert drop.get_theta() == engine.get_pld_theta() < 1.0
    assert drop.get_state() == engine.module.told | {"pld_theta": drop.get_theta()}
    assert engine_over(Told(), section={"enabled": False}).progressive_layer_drop is None


class TakesNone(Told):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


ON = {"enabled": True, "theta": 0.5, "gamma": 0.1}


def engine_over(
    model: nn.Module, stage: int = 0, gas: int = 1, section: Any = ON, **more: Any
) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": gas,
        "progressive_layer_drop": section,
        **at_stage(stage),
        **more,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = zerort.initialize(model=model, optimizer=optimizer, config=config)[0]
    keep(engine)
    return engine


def train(engine: Any, times: int = 1, scale: float = 1.0) -> None:
    for _ in range(times):
        engine.backward(engine(torch.ones(1, 2) * scale))
        engine.step()


# where it resumes, DeepSpeed's theta is 1 for a window
RUNS = [run for run in RECORDED["engine"] if "resume" not in run["name"]]


@pytest.mark.parametrize("recorded", RUNS, ids=lambda recorded: recorded["name"])
def test_the_engine_tells_its_module_as_recorded(recorded: dict[str, Any]) -> None:
    model = Told()
    engine = engine_over(model, min(recorded["stage"], 2), recorded["gas"])
    for row in recorded["rows"]:
        event = row["event"]
        if event == "initialized":
            assert engine.get_pld_theta() == row["get_pld_theta"]
            continue
        if event.startswith("engine.module forward"):
            continue  # a forward that is not the engine's is told nothing here
        model.train("eval" not in event)
        if event.startswith("micro"):
            train(engine, scale=float("nan") if "NaN" in event else 1.0)
            assert engine.get_pld_theta() == pytest.approx(row["after_step_get_pld_theta"], **EXACT)
        elif "caller" in event:
            engine(torch.ones(1, 2), progressive_layer_drop=False, pld_theta=0.123)
        else:
            engine(torch.ones(1, 2))
        assert model.told == pytest.approx(row["forward_kwargs"], **EXACT)


def test_a_module_that_takes_no_keywords_is_told_so_by_python() -> None:
    engine = engine_over(TakesNone())
    with pytest.raises(TypeError, match="progressive_layer_drop"):
        engine(torch.ones(1, 2))


@pytest.mark.parametrize("section", [{"theta": 0.1, "gamma": 0.1}, {}, {"enabled": False}])
def test_a_section_that_does_not_enable_it_tells_nothing(section: dict[str, Any]) -> None:
    model = Told()
    engine = engine_over(model, section=section)
    engine(torch.ones(1, 2))
    assert model.told == {} and engine.get_pld_theta() is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("theta", 2), ("theta", -1), ("theta", "0.5"), ("gamma", -1), ("thteta", 3)],
)
def test_what_is_out_of_range_is_named_by_its_path(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"progressive_layer_drop.{key}"):
        engine_over(Told(), section={"enabled": True, key: value})


def test_a_skipped_step_advances_it_and_a_resumed_run_goes_on_as_if_uninterrupted(
    tmp_path: Path,
) -> None:
    engine = engine_over(Told(), 2)
    train(engine, 2)
    train(engine, scale=float("nan"))
    assert engine.skipped_steps == 1
    engine.save_checkpoint(tmp_path)
    resumed = engine_over(Told(), 2)
    resumed.load_checkpoint(tmp_path)
    assert resumed.get_pld_theta() == engine.get_pld_theta() == pytest.approx(0.9093653765389909)


# ---- A model that drops layers: each rank its own ones at stages 0 to 2, all alike at stage 3.


class Dropping(nn.Module):
    """Layer i of L is kept with probability 1 - i/L (1 - theta), else it is the identity."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 4)
        self.drawn = torch.Generator().manual_seed(seed)
        self.kept: list[list[bool]] = []

    def forward(
        self, x: Tensor, progressive_layer_drop: bool = False, pld_theta: float = 1.0
    ) -> Tensor:
        draws = torch.rand(len(self.layers), generator=self.drawn, dtype=torch.float64)
        count = len(self.layers)
        kept = [float(draw) < 1 - (i + 1) / count * (1 - pld_theta) for i, draw in enumerate(draws)]
        for layer, keeps in zip(self.layers, kept, strict=True):
            x = torch.tanh(layer(x)) if keeps else x
        self.kept.append(kept)
        return self.head(x).square().mean()


def drop_layers(rank: int, world: int, stage: int, gas: int) -> tuple[Any, ...]:
    model = Dropping(seed=rank if stage < 3 else 0)
    section = {"enabled": True, "theta": 0.2, "gamma": 1.0}
    engine = engine_over(model, stage, gas, section, gradient_clipping=0.0)
    data = torch.Generator().manual_seed(rank)
    batches = torch.randn(6 * gas, 2, 4, generator=data)
    for batch in batches:
        engine.backward(engine(batch))
        engine.step()
    with zerort.zero.GatheredParameters(list(model.parameters())):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, model.kept, batches


def twin_of(results: list[tuple[Any, ...]], gas: int) -> dict[str, Tensor]:
    """Plain torch over the layers that each rank kept."""
    model = Dropping(seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for micro in range(len(results[0][2])):
        for _, kept, batches in results:
            x = batches[micro]
            for layer, keeps in zip(model.layers, kept[micro], strict=True):
                x = torch.tanh(layer(x)) if keeps else x
            (model.head(x).square().mean() / gas / len(results)).backward()
        if (micro + 1) % gas == 0:
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("stage", "gas"), [(0, 1), (1, 3), (2, 1), (2, 3), (3, 1), (3, 3)])
def test_a_model_that_drops_layers_trains_to_its_twins_weights(stage: int, gas: int) -> None:
    results = ranks.shared(2, drop_layers, stage, gas)
    kept = results[0][1]
    assert all(kept[0]) and not all(all(row) for row in kept[gas * 2 :])
    for weights, *_ in results:
        for name, value in twin_of(results, gas).items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7)
