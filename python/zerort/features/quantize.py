"""`quantize_training` (MoQ): after each step the parameters are rounded to few bits, and to fewer
with time.

The masters are not touched: the next step starts from full precision, and what is rounded here is
computed with and thrown away. All ranks have the same values after a step and round them alike; a
stochastic rounding draws from a generator seeded by the step and the parameter. A step that is
skipped changes nothing. Which bits a layer has is decided by `quantize_schedule`, what its values
are then by `quantize_values`.

Mirrors DeepSpeed 0.5 as documented: a step counts once, not six times a layer, and parameters
outside the blocks are a layer of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zerort.errors import ConfigError
from zerort.features.eigenvalue import BlockEigenvalue
from zerort.features.quantize_schedule import Schedule, factor
from zerort.features.quantize_values import quantized
from zerort.features.site import Site
from zerort.memory import FlatBucket, unintercepted
from zerort.step.events import Feature

__all__ = ["QuantizedTraining"]

_log = logging.getLogger("zerort")


@dataclass(frozen=True)
class _Quantized:
    """A parameter that is."""

    parameter: nn.Parameter
    number: int
    """In the plan."""
    layer: int


class QuantizedTraining(Feature):
    """Rounds each parameter of two or more dimensions that has a master."""

    name = "quantize_training"

    def __init__(self, site: Site) -> None:
        self._settings = site.config.quantize_training
        self._eigenvalue = site.find(BlockEigenvalue)
        self._says = self._settings.quantize_verbose and site.is_first
        self._sink = site.parts.sink
        flat = site.parts.boundary.flat
        blocks = [] if self._eigenvalue is None else self._eigenvalue.blocks
        layer = {id(p): index for index, block in enumerate(blocks) for p in block.params}
        self._layers = len(blocks) + 1
        self._numbers = len(flat.params)
        self._buckets: list[FlatBucket] = []
        self._params: list[_Quantized] = []
        for bucket in flat.trained:
            found = [
                _Quantized(parameter, number, layer.get(id(parameter), len(blocks)))
                for parameter, number in zip(bucket.params, bucket.spec.params, strict=True)
                if bucket.has_master and parameter.dim() > 1
            ]
            if found:
                self._buckets.append(bucket)
                self._params += found
        self._check_groups(flat.names)
        self.schedule = Schedule.of(self._settings, self._layers)
        if self._eigenvalue is not None:
            self._eigenvalue.is_wanted = lambda: self.schedule.falls(len(blocks))

    @classmethod
    def open(cls, site: Site) -> QuantizedTraining | None:
        """Where the configuration asks for it. Raises `ConfigError` naming a parameter that the
        groups do not divide.
        """
        return cls(site) if site.config.quantize_training.enabled else None

    def _check_groups(self, names: Sequence[str]) -> None:
        groups = self._settings.quantize_groups
        for each in sorted(self._params, key=lambda each: each.number):
            if each.parameter.numel() % groups:
                raise ConfigError(
                    f"quantize_training.quantize_groups: expected a number that divides the "
                    f"{each.parameter.numel()} elements of {names[each.number]}, got {groups}"
                )

    # Steps.

    def published(self) -> None:
        """Bits may fall, then parameters are rounded."""
        for layer in self.schedule.advance(self._factors()):
            if self._says:
                _log.info(
                    "quantize_training: layer %d has %d bits from step %d on, for %d steps",
                    layer,
                    self.schedule.bits[layer],
                    self.schedule.qsteps,
                    self.schedule.periods[layer] - self.schedule.qsteps,
                )
        self._round()

    def _factors(self) -> Sequence[int]:
        """By layer; 1 where this boundary had no eigenvalues, and outside the blocks."""
        found = () if self._eigenvalue is None else self._eigenvalue.latest
        factors = [factor(value) for value in found]
        return factors + [1] * (self._layers - len(factors))

    @unintercepted
    @torch.no_grad()
    def _round(self) -> None:
        if not self.schedule.begun:
            return
        with self._sink.range("quantize"):
            try:
                for each in self._params:
                    each.parameter.copy_(self._rounded(each))
            finally:  # else the masters would take what has been rounded by then
                for bucket in self._buckets:
                    bucket.note_writes()

    def _rounded(self, each: _Quantized) -> Tensor:
        values, settings, schedule = each.parameter, self._settings, self.schedule
        noise = None
        if settings.stochastic:
            seed = schedule.qsteps * self._numbers + each.number
            noise = torch.Generator().manual_seed(seed)
        found = quantized(
            values,
            schedule.bits[each.layer],
            groups=settings.quantize_groups,
            symmetric=settings.symmetric,
            noise=noise,
        )
        ratio = schedule.ratios[each.layer]
        if not ratio:
            return found
        return (ratio * values.float() + (1 - ratio) * found.float()).to(values.dtype)

    # Checkpoints.

    def restored(self) -> None:
        """Parameters follow from the masters: they are rounded as they were after the last step."""
        self._round()

    def state(self) -> dict[str, Any]:
        """The schedule's."""
        return self.schedule.state()

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state`. Raises `ValueError` where the layers or the bits do not fit."""
        self.schedule.load(state)
