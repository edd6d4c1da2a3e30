"""The random number generators of a process: Python's, torch's, the device's, and numpy's where it
is in use.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from zerort.device import device_for

__all__ = ["random_states", "restore_random_states"]


def random_states(device: torch.device) -> dict[str, Any]:
    """The states, as values that a checkpoint can hold."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": (version, torch.tensor(words), gauss),
        "torch": torch.get_rng_state(),
    }
    own = device_for(device).random_state()
    if own is not None:
        states[device.type] = own
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        states["numpy"] = (
            kind,
            torch.tensor(keys.tolist()),
            int(position),
            int(has_gauss),
            float(cached),
        )
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Goes on where the states were taken. A generator without a saved state is left alone."""
    if "python" in states:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if device.type in states:
        device_for(device).set_random_state(states[device.type])
    numpy = sys.modules.get("numpy")
    if "numpy" in states and numpy is not None:
        kind, keys, position, has_gauss, cached = states["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))
