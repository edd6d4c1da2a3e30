"""What an accelerator is asked for, on the stand-in: overlap, times, the right device, refusals."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerort
import zerort.device
from stand_in import Facade, Machine, Simulated, SimulatedAlone, SimulatedWork, Stream
from zerort.device import accelerator, device_for, place_of
from zerort.device.accelerator import AcceleratorStreams
from zerort.run.executor import Executor
from zerort.trace.reader import lives, read, steps

PACKAGE = Path(zerort.__file__).parent
ALIAS = Path("compat/deepspeed/accelerator.py")
"""Answers to DeepSpeed's names of devices, for code of other people's."""
LAYERS = 12


class Slow(SimulatedAlone):
    """One process whose collectives take their time on the device all the same."""

    def reduce_scatter(self, recv: Tensor, send: Tensor) -> Any:
        return SimulatedWork(self.machine, lambda: ([send], [recv]))


@pytest.fixture
def machine() -> Machine:
    return Machine()


ALONE = Simulated(alone=Slow)


def engine_on(machine: Machine, window: int | str, path: Path | None = None) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(LAYERS)))
    trace = {} if path is None else {"trace": {"enabled": True, "path": str(path)}}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 256},
        "zerort": {"window": window, **trace},
    }
    return zerort.initialize(model=model, config=config)[0]


# ---- overlap


@pytest.mark.parametrize("window", [1, 4, "all"])
def test_every_bucket_leaves_during_the_backward_although_the_device_is_behind(
    machine: Machine, window: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    start, launch_all = SimulatedWork.start, Executor.launch_all
    left: list[int] = []

    def counting(work: SimulatedWork) -> SimulatedWork:
        started.append(1)
        return start(work)

    def ending(executor: Executor) -> None:
        left.append(len(started))
        launch_all(executor)

    monkeypatch.setattr(SimulatedWork, "start", counting)
    monkeypatch.setattr(Executor, "launch_all", ending)
    with machine.running(ALONE):
        engine = engine_on(machine, window)
        for _ in range(3):
            started.clear()
            engine.backward(engine(torch.ones(2, 16)).square().mean())
            engine.step()
    assert left == [0, LAYERS, LAYERS]  # the first pass observes the order
    assert machine.races == []


# ---- times


def traced(machine: Machine, path: Path, collective_ms: float) -> Any:
    machine.collective_ms = collective_ms
    with machine.running(ALONE):
        engine = engine_on(machine, 4, path)
        for _ in range(3):
            engine.backward(engine(torch.ones(2, 16)).square().mean())
            engine.step()
        assert math.isnan(engine.exposed_communication)
        engine.destroy()
    recorded = read(path)
    return steps(recorded.events)[1:], lives(recorded.events)


def test_a_wait_that_the_backward_hides_is_not_exposed(machine: Machine, tmp_path: Path) -> None:
    found, _ = traced(machine, tmp_path / "trace.json", 1.0)
    for step in found:
        # the last bucket is full at the end of the backward: its collective and the last sums
        assert 1.0 <= step.exposed < 0.25 * step.wall


def test_a_collective_that_the_device_waits_for_is_exposed(
    machine: Machine, tmp_path: Path
) -> None:
    found, _ = traced(machine, tmp_path / "trace.json", 100.0)
    for step in found:
        # they run one after the other, and the backward lasts some 60 ms
        assert 1000.0 <= step.exposed <= 1200.0


# ---- another device than the current one


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[Machine, AcceleratorStreams]:
    """Streams of device 1, while device 0 is the current one."""
    machine = Machine()
    own = Stream(machine, "main of device 1", 1)
    facade = Facade(machine)
    current = {0: machine.main, 1: own}
    monkeypatch.setattr(accelerator, "torch", facade)
    monkeypatch.setattr(facade, "current_stream", lambda place: current[place.index], raising=False)

    def set_stream(stream: Stream) -> None:
        current[stream.device_index] = stream
        machine.device_index = stream.device_index

    monkeypatch.setattr(facade, "set_stream", set_stream, raising=False)
    for name, function in facade.indices.items():
        monkeypatch.setattr(accelerator, name, function)
    return machine, AcceleratorStreams(torch.device("cuda", 1))


def test_streams_are_those_of_the_models_device_whichever_is_current(
    streams: tuple[Machine, AcceleratorStreams],
) -> None:
    machine, own = streams
    lane = own.lane()
    machine.work(machine.main, 1.0)  # of device 0: nothing here may wait for it
    own.produced()
    with own.packing(lane):
        assert machine.device_index == 0
    with own.summing(lane):
        assert machine.device_index == 1
        assert accelerator.torch.current_stream(torch.device("cuda", 1)).name == "sums"
    assert machine.device_index == 0
    assert accelerator.torch.current_stream(torch.device("cuda", 1)).name == "main of device 1"
    own.join()
    assert machine.main.stream_id not in lane.free.clock
    assert [stream.device_index for stream in machine.streams] == [0, 0, 1, 1]


def test_the_current_device_is_given_back_when_a_sum_raises(
    streams: tuple[Machine, AcceleratorStreams],
) -> None:
    machine, own = streams
    with pytest.raises(ZeroDivisionError), own.summing(own.lane()):
        raise ZeroDivisionError
    assert machine.device_index == 0
    assert accelerator.torch.current_stream(torch.device("cuda", 1)).name == "main of device 1"


# ---- which devices


class On:
    """A tensor as far as its place goes."""

    def __init__(self, place: str) -> None:
        self.device = torch.device(place)


def named(*places: str) -> Any:
    return [(f"layers.{index}.weight", On(place)) for index, place in enumerate(places)]


def there_is(monkeypatch: pytest.MonkeyPatch, kind: str | None) -> None:
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: found)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    monkeypatch.setattr(accelerator, "_device_index", lambda: 0)


def test_a_model_without_values_or_on_the_cpu_has_no_accelerator() -> None:
    assert place_of(named("cpu", "meta", "cpu")) is None
    assert place_of([]) is None
    assert device_for(torch.device("cpu")).blocks


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_an_accelerator_that_torch_drives_is_taken(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there_is(monkeypatch, kind)
    place = place_of(named("cpu", f"{kind}:1", f"{kind}:1"))
    assert place == torch.device(kind, 1)
    assert not device_for(place).blocks
    assert zerort.device.default_place() == torch.device(kind, 0)


@pytest.mark.parametrize(
    ("kind", "place", "message"),
    [
        ("mps", "mps", "device mps is not supported: it has no 64-bit floats"),
        ("cuda", "xpu:0", "device xpu:0 is not supported: the accelerator that torch drives here"),
        (None, "hpu", "device hpu is not supported: torch finds no accelerator"),
        ("cuda", "xla", "device xla is not supported: .* to one that is, cpu or cuda"),
    ],
)
def test_a_model_on_another_accelerator_is_refused_by_name(
    kind: str | None, place: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there_is(monkeypatch, kind)
    with pytest.raises(zerort.ConfigError, match=message):
        place_of(named("cpu", place))


def test_a_model_on_the_metal_of_a_mac_is_no_reason_to_leave_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there_is(monkeypatch, "mps")
    assert zerort.device.default_place() == torch.device("cpu")


def test_a_model_on_two_accelerators_is_refused_by_both_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there_is(monkeypatch, "cuda")
    message = re.escape("layers.0.weight is on cuda:0 and layers.2.weight on cuda:1")
    with pytest.raises(zerort.ConfigError, match=message):
        place_of(named("cuda:0", "cpu", "cuda:1"))


def test_no_other_room_names_a_device_a_stream_or_an_event() -> None:
    naming = re.compile(r"\bcuda\b|\bxpu\b|torch\.(accelerator|Stream|Event)\(?|get_device_module")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "device" and path.relative_to(PACKAGE) != ALIAS
        for line in path.read_text(encoding="utf-8").splitlines()
        if naming.search(line) and "`torch.Event" not in line
    ]
    assert found == []
