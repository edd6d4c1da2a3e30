"""How many bits each layer has: a machine over the steps that were applied, without a tensor.

    before ── `offset` steps ──> begun: with each step whose number has reached a layer's period
                                 bits -= 1, period := 2 x factor x period, until `target`

A layer's factor is 1 to 5, so that what its loss is sensitive to keeps its bits longer. Where
values are mixed, the share of what is not quantized falls with each step, and is whole again when
bits fall. Ranks that have been given the same factors are in the same state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zerort.config.quantize import QuantizeTraining

__all__ = ["Schedule", "factor"]


def factor(eigenvalue: float) -> int:
    """By how much a period grows beyond doubling; `eigenvalue` is in [0, 1], 1 for the most
    sensitive of all blocks.
    """
    return 1 + int(4 * eigenvalue)


@dataclass
class Schedule:
    """The bits of some layers."""

    target: int
    change: float | None
    """How much less of a parameter itself is left with each step; None where nothing is mixed."""
    begins_at_once: bool
    offset: int
    """Steps before it begins; 0 once it has."""
    bits: list[int]
    periods: list[int]
    ratios: list[float]
    """The share of a layer's parameters that is not quantized; 0 where nothing is mixed."""
    qsteps: int = 0
    """Applied steps since the beginning."""

    @classmethod
    def of(cls, settings: QuantizeTraining, layers: int) -> Schedule:
        """At the start of training."""
        bits, plan, mixed = (
            settings.quantize_bits,
            settings.quantize_schedule,
            settings.fp16_mixed_quantize,
        )
        return cls(
            bits.target_bits,
            mixed.quantize_change_ratio if mixed.enabled else None,
            plan.schedule_offset == 0,
            plan.schedule_offset,
            [bits.start_bits] * layers,
            [plan.quantize_period] * layers,
            [float(mixed.enabled)] * layers,
        )

    @property
    def begun(self) -> bool:
        """Whether parameters are quantized. DeepSpeed's later versions quantize before the first
        step too.
        """
        return not self.offset and (self.qsteps > 0 or not self.begins_at_once)

    def falls(self, layers: int) -> bool:
        """Whether the bits of some of the first `layers` fall with the next step."""
        return not self.offset and any(
            self.bits[layer] != self.target and self.qsteps + 1 >= self.periods[layer]
            for layer in range(layers)
        )

    def advance(self, factors: Sequence[int]) -> list[int]:
        """A step has been applied. Returns the layers whose bits have fallen."""
        self.qsteps += 1
        if self.offset:
            if self.qsteps < self.offset:
                return []
            self.offset = self.qsteps = 0
        if self.change is not None:
            self.ratios = [max(0.0, ratio - self.change) for ratio in self.ratios]
        return [layer for layer, by in enumerate(factors) if self._fall(layer, by)]

    def _fall(self, layer: int, by: int) -> bool:
        if self.bits[layer] == self.target or self.qsteps < self.periods[layer]:
            return False
        self.bits[layer] -= 1
        self.periods[layer] *= 2 * by
        self.ratios[layer] = 0.0 if self.change is None else 1.0
        return True

    # Checkpoints.

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "qsteps": self.qsteps,
            "offset": self.offset,
            "bits": list(self.bits),
            "periods": list(self.periods),
            "ratios": list(self.ratios),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state`. Raises `ValueError` for another number of layers, and for fewer
        bits than `target`.
        """
        bits, periods, ratios = state["bits"], state["periods"], state["ratios"]
        if not len(bits) == len(periods) == len(ratios) == len(self.bits):
            raise ValueError(
                f"quantize_training: saved with {len(bits)} layers, and there are "
                f"{len(self.bits)}: give layer_num as it was"
            )
        if min(bits) < self.target:
            raise ValueError(
                f"quantize_training: saved with {min(bits)} bits, fewer than target_bits, "
                f"{self.target}: bits only fall"
            )
        self.qsteps, self.offset = state["qsteps"], state["offset"]
        self.bits, self.periods = list(bits), list(periods)
        self.ratios = [0.0 if self.change is None else ratio for ratio in ratios]
