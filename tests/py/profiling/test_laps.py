"""Times of modules where the host runs ahead of the device: read late, without a wait before."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fake_device import FakeDevice
from zerort.profiling import laps
from zerort.profiling.laps import Laps
from zerort.profiling.recording import Recording


class Behind:
    """A device that has done nothing yet of what was recorded."""

    def __init__(self) -> None:
        self.clock, self.waited = FakeDevice(), 0

    def moment(self) -> Any:
        self.clock.at_ms += 10.0
        event = self.clock.record()
        synchronize = event.synchronize

        def counted() -> None:
            self.waited += 1
            synchronize()

        event.synchronize = counted
        return event


def test_no_lap_waits_for_the_device_and_its_time_is_the_devices() -> None:
    device = Behind()
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    recording = Recording(module, device)  # type: ignore[arg-type]
    recording.start()
    module(torch.ones(1, 2))
    recording.stop()
    assert device.waited == 0
    # six moments, ten milliseconds apart: the root's are the first and the last
    assert abs(recording.seconds(module) - 0.050) < 1e-6
    assert abs(recording.seconds(module[0]) - 0.010) < 1e-6


def test_laps_do_not_pile_up(monkeypatch: Any) -> None:
    monkeypatch.setattr(laps, "_PENDING", 10)
    device = Behind()
    kept = Laps(device)  # type: ignore[arg-type]
    for _ in range(25):
        kept.add("lap", kept.now())
        assert len(kept._pending) < 10
    assert abs((kept.seconds("lap") or 0) - 0.250) < 1e-6


def test_a_module_within_itself_is_timed_once() -> None:
    class Again(nn.Module):
        def forward(self, depth: torch.Tensor) -> torch.Tensor:
            return self(depth - 1) if depth > 0 else depth

    device = Behind()
    module = Again()
    recording = Recording(module, device)  # type: ignore[arg-type]
    recording.start()
    module(torch.tensor(3))
    recording.stop()
    assert abs(recording.seconds(module) - 0.010) < 1e-6
