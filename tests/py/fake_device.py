"""A device whose clock the test turns, in the shape of `torch.cuda.Event(enable_timing=True)`."""

from __future__ import annotations

import torch


class FakeDevice:
    """One stream: what is recorded at `at_ms` has passed once `passed_ms` has reached it."""

    def __init__(self):
        self.at_ms = self.passed_ms = 1000.0

    def record(self):
        return FakeEvent(self, self.at_ms)


class FakeEvent:
    """An event that refuses to be asked too early, as CUDA's does."""

    def __init__(self, device, at_ms):
        self.device = device
        self.at_ms = at_ms

    def query(self):
        return self.at_ms <= self.device.passed_ms

    def synchronize(self):
        self.device.passed_ms = max(self.device.passed_ms, self.at_ms)

    def elapsed_time(self, end):
        assert self.query() and end.query(), (
            "an event was asked for its time before the device had passed it"
        )
        # CUDA's answer is a 32-bit float.
        return torch.tensor(end.at_ms - self.at_ms, dtype=torch.float32).item()


class LostEvent(FakeEvent):
    """An event of a device that has failed."""

    def query(self):
        return False

    def synchronize(self):
        raise RuntimeError("device-side assert")
