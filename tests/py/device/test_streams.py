"""The order that CUDA streams are put into, on streams that only remember what has happened before
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import ranks
import zerort
from zerort.device import CudaStreams, HostStreams


class Stream:
    """Knows every piece of work that is over before whatever is given to it next."""

    def __init__(self, *_: object) -> None:
        self.cuda_stream = id(self)
        self.before: set[str] = set()

    def wait_stream(self, other: Stream) -> None:
        self.before |= other.before

    def run(self, work: str) -> None:
        self.before.add(work)


class Device:
    """Where `torch.cuda` would be asked for streams."""

    def __init__(self) -> None:
        self.current = Stream()

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        outside, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = outside


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: made.current)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    return made


@pytest.fixture
def streams(device: Device) -> CudaStreams:
    return CudaStreams(torch.device("cuda", 0))


def _produce(device: Device, streams: CudaStreams, stream: Stream, gradient: str) -> None:
    with device.on(stream):
        stream.run(gradient)
        streams.produced()


def test_a_bucket_is_packed_after_the_streams_of_all_its_gradients(
    device: Device, streams: CudaStreams
) -> None:
    other = Stream()
    streams.begin()
    _produce(device, streams, other, "one")
    _produce(device, streams, device.current, "two")
    assert "one" not in device.current.before
    streams.before_pack(shared=False)
    assert {"one", "two"} <= device.current.before


def test_memory_of_a_packed_gradient_is_not_written_before_it_was_read(
    device: Device, streams: CudaStreams
) -> None:
    other = Stream()
    streams.begin()
    _produce(device, streams, other, "one")
    streams.before_pack(shared=False)
    device.current.run("pack")
    assert "pack" not in other.before
    streams.after_pack()
    assert "pack" in other.before


def test_a_bucket_waits_for_the_sum_of_the_one_whose_memory_it_takes(
    device: Device, streams: CudaStreams
) -> None:
    streams.begin()
    with streams.side():
        device.current.run("sum")
    streams.before_pack(shared=False)
    assert "sum" not in device.current.before, "it shares no memory, and would wait for nothing"
    streams.before_pack(shared=True)
    assert "sum" in device.current.before


def test_sums_run_between_the_step_before_and_the_step_after(
    device: Device, streams: CudaStreams
) -> None:
    device.current.run("the step before")
    streams.begin()
    with streams.side():
        assert "the step before" in device.current.before
        device.current.run("sum")
    assert "sum" not in device.current.before
    streams.join()
    assert "sum" in device.current.before


def test_a_pass_forgets_the_streams_of_the_pass_before(
    device: Device, streams: CudaStreams
) -> None:
    other = Stream()
    streams.begin()
    _produce(device, streams, other, "one")
    streams.begin()
    other.run("something else")
    streams.before_pack(shared=False)
    assert "something else" not in device.current.before


class Told(HostStreams):
    """Streams that keep what they are told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before_pack(self, *, shared: bool) -> None:
        self.calls.append(f"before_pack shared={shared}")

    def after_pack(self) -> None:
        self.calls.append("after_pack")

    @contextmanager
    def side(self) -> Iterator[None]:
        self.calls.append("side")
        yield

    def begin(self) -> None:
        self.calls.append("begin")

    def join(self) -> None:
        self.calls.append("join")


def _what_streams_are_told(rank: int, world: int, window: int) -> list[str]:
    engine, *_ = zerort.initialize(
        model=nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)),
        config={
            "train_batch_size": 1,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 64},
            "zerort": {"window": window},
        },
    )
    executor = engine._parts.reduction._executor
    told = executor.streams = Told()
    engine.backward(engine(torch.ones(1, 8)).sum())
    told.calls.append("end of backward")
    engine.step()
    return told.calls


@pytest.mark.parametrize("window", [1, 2])
def test_the_executor_tells_streams_of_each_pack_and_each_sum(window: int) -> None:
    (calls,) = ranks.run(1, _what_streams_are_told, window)
    pack = [f"before_pack shared={window == 1}", "after_pack"]
    sums = [*pack, "side", *pack, "side"] if window == 1 else [*pack, *pack, "side", "side"]
    assert [call for call in calls[: calls.index("end of backward")] if call != "join"] == [
        "begin",
        *sums,
    ]
    assert calls[-1] == "join"
