"""What `zerort config` prints for a model is what engines over it take and send, on two ranks.

Counted are bytes under every tensor of a rank, what its collectives send and what it copies between
a device and its host. Each figure that is printed has to be right within 2 %.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import forecasted
import ranks
import zerort
from forecasted import Counts
from stand_in import Machine
from zerort.cli import main
from zerort.config import load_part
from zerort.forecast import Job, forecast, made_by
from zerort.forecast.commands import SECTIONS

WORLD, WITHIN = 2, 0.02
SMALL = 12_000
"""Bytes of step counts, ballots, scalars and fingerprints, of some 2 million."""
PRECISIONS: dict[str, Any] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}},
    "bf16 masters": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    "bf16 states": {
        "bf16": {
            "enabled": True,
            "bf16_master_weights_and_grads": True,
            "bf16_optimizer_states": True,
        }
    },
    "fp16 masters": {
        "fp16": {"enabled": True, "initial_scale_power": 4, "fp16_master_weights_and_grads": True}
    },
    "bf16 sums": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
}
OPTIMIZERS = {
    "AdamW": {"lr": 1e-3},
    "SGD": {"lr": 1e-3},
    "Lion": {"lr": 1e-3},
    "RMSprop": {"lr": 1e-3, "centered": True, "momentum": 0.9},
}
OPTIMIZER = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
PARAM = {"offload_param": {"device": "cpu"}}
HALF = {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}
UNSAID = {"reduce_bucket_size": "auto"}
ROOM = {"stage3_max_live_parameters": 4 * forecasted.WIDTH**2}


def config(
    stage: int,
    precision: str = "bf16",
    gas: int = 1,
    optimizer: str = "AdamW",
    transport: str = "gloo",
    **zero: Any,
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": gas,
        "optimizer": {"type": optimizer, "params": OPTIMIZERS[optimizer]},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": forecasted.WIDTH**2 + 4 * forecasted.WIDTH,
            "stage3_param_persistence_threshold": forecasted.WIDTH,
            **zero,
        },
        "zerort": {"transport": transport},
        **PRECISIONS[precision],
    }


ON_CPU: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"stage {stage}, {precision}": ("make", config(stage, precision, 1 + stage % 2))
        for stage in range(4)
        for precision in PRECISIONS
    },
    **{
        f"stage {stage}, {kind}": ("make", config(stage, optimizer=kind))
        for stage, kind in ((1, "SGD"), (2, "Lion"), (3, "RMSprop"))
    },
    "stage 0, fp32, gas 2, each": (
        "make",
        config(0, "fp32", 2) | {"zerort": {"reduce_at": "micro_batch", "transport": "gloo"}},
    ),
    "stage 2, gas 3": ("make", config(2, gas=3)),
    "stage 3, a room": ("make", config(3, gas=2, **ROOM)),
    "stage 3, frozen": ("partly_frozen", config(3)),
    "stage 1, frozen": ("partly_frozen", config(1)),
    "stage 3, window 2": ("make", config(3) | {"zerort": {"window": 2, "transport": "gloo"}}),
    **{
        f"stage {stage}, int8": (
            "make",
            config(stage, kind, gas) | {"zerort": {"wire": "int8", "transport": "gloo"}},
        )
        for stage, kind, gas in ((0, "fp32", 1), (1, "bf16", 2), (2, "bf16", 2), (3, "fp32", 1))
    },
    "stage 2, int8, feedback": (
        "make",
        config(2) | {"zerort": {"wire": "int8", "wire_error_feedback": True, "transport": "gloo"}},
    ),
    **{
        f"stage {stage}, {precision}, long": ("long", config(stage, precision, **UNSAID))
        for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"))
    },
    "stage 2, offloads": ("make", config(2, **OPTIMIZER)),
    "stage 3, offloads": ("make", config(3, **OPTIMIZER, **PARAM)),
}
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"stage {stage}, {precision}, shared": (
            "make",
            config(stage, precision, gas, transport="shared"),
        )
        for stage, precision, gas in (
            (0, "fp32", 2),
            (1, "bf16", 1),
            (2, "fp32", 1),
            (3, "bf16", 2),
        )
    },
    "stage 3, a room, shared": ("make", config(3, "fp32", transport="shared", **ROOM)),
    **{
        f"stage {stage}, {wire}, window 2, shared": (
            "make",
            config(stage) | {"zerort": {"wire": wire, "window": 2, "transport": "shared"}},
        )
        for stage, wire in ((0, "bf16"), (2, "int8"))
    },
}
ON_CPU |= SHARED
BESIDE_A_HOST: dict[str, tuple[str, dict[str, Any]]] = {
    "stage 2": ("make", config(2)),
    "stage 1, gas 3, optimizer": ("make", config(1, gas=3, **OPTIMIZER)),
    "stage 2, gas 3, optimizer": ("make", config(2, gas=3, **OPTIMIZER)),
    "stage 2, fp32, optimizer": ("make", config(2, "fp32", **OPTIMIZER)),
    "stage 2, bf16 masters, optimizer": ("make", config(2, "bf16 masters", **OPTIMIZER)),
    "stage 3, optimizer": ("make", config(3, **OPTIMIZER)),
    "stage 3, half of it": ("make", config(3, **HALF)),
    "stage 3, shards": ("make", config(3, **PARAM)),
    "stage 3, both, a room, gas 2": ("make", config(3, gas=2, **OPTIMIZER, **PARAM, **ROOM)),
    "stage 3, fp32, both": ("make", config(3, "fp32", **OPTIMIZER, **PARAM)),
    "stage 3, bf16 states, both": ("make", config(3, "bf16 states", **OPTIMIZER, **PARAM)),
    "stage 3, frozen, both": ("partly_frozen", config(3, **OPTIMIZER, **PARAM)),
}


QUICK = {
    *(f"stage {stage}, {precision}" for stage in (0, 3) for precision in ("fp32", "bf16")),
    "stage 1, bf16 masters",
    "stage 2, fp16",
    "stage 2, Lion",
    "stage 3, a room",
    "stage 3, frozen",
    "stage 0, int8",
    "stage 2, int8",
    "stage 2, gas 3, optimizer",
    "stage 3, both, a room, gas 2",
    "stage 2, fp32, long",
    "stage 3, fp32, long",
    "stage 0, fp32, shared",
    "stage 2, fp32, shared",
    "stage 3, a room, shared",
}
"""Those of every day."""


def each(cases: dict[str, Any]) -> Any:
    marked = [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in cases
    ]
    return pytest.mark.parametrize("name", marked)


def count_all(rank: int, world: int, beside: bool, quick: bool) -> dict[str, Counts]:
    cases = BESIDE_A_HOST if beside else ON_CPU
    return {
        name: forecasted.count(
            rank, getattr(forecasted, model), settings, Machine() if beside else None
        )
        for name, (model, settings) in cases.items()
        if (name in QUICK) == quick
    }


@ranks.once(None)
def counted(beside: bool, quick: bool) -> list[dict[str, Counts]]:
    return ranks.run(WORLD, count_all, beside, quick, timeout=200)


UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Printed:
    """The column of a stage, by part and row."""

    def __init__(self, text: str, stage: int) -> None:
        self.cells: dict[tuple[str, str], float] = {}
        part, column = "", -1
        for line in text.splitlines():
            cells = re.split(r"\s{2,}", line.strip())
            if cells[0] == "a rank":
                column = next(i for i, c in enumerate(cells) if c.startswith(f"stage {stage}"))
            elif len(cells) > column > 0:
                number, _, unit = cells[column].partition(" ")
                if unit in UNITS or number == "-":
                    value = 0.0 if number == "-" else float(number) * UNITS[unit]
                    self.cells[part, cells[0]] = value
            elif len(cells) == 1:
                part = cells[0]

    def __call__(self, part: str, row: str) -> float:
        return self.cells.get((part, row), 0.0)


def printed(
    folder: Path, capsys: Any, case: tuple[str, dict[str, Any]], device: str, *more: str
) -> Printed:
    model, settings = case
    path = folder / "ds.json"
    path.write_text(json.dumps(settings))
    line = ["config", str(path), "--model", f"forecasted:{model}", "--world", str(WORLD)]
    assert main([*line, "--device", device, *more]) == 0
    return Printed(capsys.readouterr().out, settings["zero_optimization"]["stage"])


def near(found: float, said: float, small: int = 0) -> bool:
    return abs(found - said) <= WITHIN * said + small


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def check(say: Printed, ranks_found: list[Counts]) -> None:
    at_rest = say("on the device", "together") - say("on the device", "gathered, at most")
    # the fullest rank is what is printed; others have less only where parts are frozen
    device = max(found.device for found in ranks_found)
    assert near(device, at_rest, SMALL), (device, at_rest)
    host = max(found.host for found in ranks_found)
    assert near(host, say("on the host", "together"), SMALL), host
    for found in ranks_found:
        assert near(found.gathered, say("on the device", "gathered, at most"))
        assert near(found.to_host, say("copied in a step", "to the host"))
        assert near(found.to_device, say("copied in a step", "to the device"))


@each(ON_CPU)
def test_on_cpu_ranks(name: str, tmp_path: Path, capsys: Any) -> None:
    found = [rows[name] for rows in counted(False, name in QUICK)]
    say = printed(tmp_path, capsys, ON_CPU[name], "cpu")
    check(say, found)
    sent = say("sent in a step", "gradients") + say("sent in a step", "parameters")
    for one in found:
        # through memory nothing is handed to a library that could count
        assert one.sent == 0 if name in SHARED else near(one.sent, sent), (one.sent, sent)


@each(BESIDE_A_HOST)
def test_on_a_device_beside_a_host(name: str, tmp_path: Path, capsys: Any) -> None:
    found = [rows[name] for rows in counted(True, name in QUICK)]
    say = printed(tmp_path, capsys, BESIDE_A_HOST[name], "accelerator")
    check(say, found)
    assert (found[0].host > 0) == ("offload" in json.dumps(BESIDE_A_HOST[name]))


# ---- what the command line is given


def makes_nothing() -> str:
    return "model"


def reads_values() -> Any:
    model = forecasted.make()
    assert float(next(model.parameters()).detach().sum()) != 0
    return model


class Broken:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("not today")


broken = Broken()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("forecasted", "expected MODULE:FACTORY, as in train:make_model"),
        (":make", "expected MODULE:FACTORY"),
        ("no_such_module:make", "it cannot be imported (ModuleNotFoundError"),
        ("forecasted:nothing", "it cannot be imported (AttributeError"),
        ("test_forecast:broken.make", "it cannot be imported (RuntimeError: not today)"),
        ("forecasted:count", "it raised TypeError"),
        ("test_forecast:reads_values", "it raised RuntimeError"),
        ("test_forecast:makes_nothing", "expected a torch.nn.Module, got str"),
    ],
)
def test_a_factory_that_makes_no_model_is_named(
    model: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config(2)))
    assert main(["config", str(path), "--model", model]) == 2
    error = capsys.readouterr().err
    assert f"zerort: --model {model}: {message}" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "line",
    [
        ["--numel", "0"],
        ["--numel", "-7B"],
        ["--numel", "nan"],
        ["--numel", "1e400"],
        ["--numel", "many"],
        ["--numel", "7B", "--model", "forecasted:make"],
        ["--numel", "7B", "--world", "0"],
        ["--numel", "7B", "--world", "two"],
        ["--numel", "7B", "--device", "tpu"],
    ],
)
def test_a_line_with_a_mistake_is_status_2(line: list[str], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config(2)))
    with pytest.raises(SystemExit) as stopped:
        main(["config", str(path), *line])
    assert stopped.value.code == 2


def test_a_size_alone_in_a_file_full_of_auto(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    path = tmp_path / "ds.json"
    auto = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 0, **OPTIMIZER, "reduce_bucket_size": "auto"},
    }
    path.write_text(json.dumps(auto | {"zero_optimization": {"stage": 2, **OPTIMIZER}}))
    assert main(["config", str(path), "--numel", "0.5B", "--largest", "50e6"]) == 0
    text = capsys.readouterr().out
    assert "500,000,000 parameters, 8 ranks, fp32, AdamW, 1 micro-batch a step" in text
    assert "stage 0: configuration: zero_optimization: offload_optimizer.device is cpu" in text
    assert "stage 2*" in text and "stage 0 " not in text
    path.write_text(json.dumps(auto))
    assert main(["config", str(path), "--numel", "0.5B"]) == 1  # its mistakes, and no plan
    assert "buckets" not in capsys.readouterr().out.replace("bucket_", "")


def test_how_long_buckets_may_become_is_said_with_its_reason(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config(2, "fp32", **UNSAID)))
    line = ["config", str(path), "--model", "forecasted:long", "--world", "2"]
    assert main([*line, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["forecasts"]
    keys = ("buckets", "bucket_cap_bytes", "bucket_cap_elements", "bucket_cap_reason")
    numel = sum(tensor.numel() for tensor in made_by("forecasted:long").parameters())
    tenth = (13, 4 * numel // 10, None, "a tenth of the trained parameters")
    one = (2, 25 * 2**20, None, "as much as a unit")  # and what stays whole
    assert [tuple(stage[key] for key in keys) for stage in stages] == [tenth, tenth, tenth, one]
    assert main(line) == 0
    text = capsys.readouterr().out
    assert "  at most" in text
    assert "Buckets at stages 0, 1, 2: a tenth of the trained parameters, as zerort.bu" in text
    assert "Buckets at stage 3: as much as a unit" in text
    path.write_text(json.dumps(config(2, "fp32", reduce_bucket_size=10**6)))
    assert main(line) == 0
    text = capsys.readouterr().out
    assert "  at most" not in text and "zerort.bucket_bytes is not given" not in text


@pytest.mark.parametrize(
    "name",
    [
        "stage 2, gas 3",
        "stage 3, frozen",
        "stage 3, window 2",
        *(f"stage {stage}, {kind}, long" for stage, kind in ((0, "fp32"), (1, "bf16"))),
        *(f"stage {stage}, fp32, long" for stage in (2, 3)),
    ],
)
def test_the_plan_of_a_model_on_meta_is_the_engines(name: str) -> None:
    model, given = ON_CPU[name]
    engine = zerort.initialize(model=getattr(forecasted, model)(), config=given)[0]
    own = load_part(given, SECTIONS)
    on_meta = made_by(f"forecasted:{model}")
    assert all(tensor.is_meta for tensor in (*on_meta.parameters(), *on_meta.buffers()))
    found = forecast(own, on_meta, Job(1, on_accelerator=False), 3)
    assert found.plan.digest == engine._parts.reduction.plan.digest
    engine.destroy()
