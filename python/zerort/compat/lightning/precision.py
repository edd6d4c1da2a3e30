"""Lightning's precision plugins under an engine, which scales the loss, clips and steps itself.

The plugins keep what they do around a step: the dtype of inputs, of new tensors, autocast. They
lose their gradient scaler, and clipping, which the engine does by the norm of the whole gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zerort.compat.lightning.packages import fabric, pytorch
from zerort.errors import ConfigError

__all__ = ["adapted", "adapted_of_fabric", "cast"]

_plugins = pytorch("plugins.precision")
_fabric = fabric("plugins.precision")
_Full: Any = _plugins.Precision
_Half: Any = _plugins.HalfPrecision
_Mixed: Any = _plugins.MixedPrecision
_FabricFull: Any = _fabric.Precision
_FabricHalf: Any = _fabric.HalfPrecision
_FabricMixed: Any = _fabric.MixedPrecision


class _Unclipped:
    """Its clipping only looks whether the engine does what is asked for."""

    clipping = 0.0
    """The norm that the engine clips to; 0 where it does not."""

    def clip_gradients(
        self, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm"
    ) -> None:
        """Raises `ConfigError` unless the engine clips to `clip_val`."""
        if not clip_val:
            return
        if str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)) != "norm":
            raise ConfigError(
                "clip_gradients by value: gradients are in shards, and are clipped by their norm "
                'alone; leave gradient_clip_algorithm out, or give "norm"'
            )
        if clip_val != self.clipping:
            raise ConfigError(
                f"clip_gradients to {clip_val}, and the engine clips to {self.clipping:g}: give "
                'gradient_clip_val to the Trainer, or "gradient_clipping" in the configuration '
                "where optimization is manual"
            )


class _Unscaled:
    """Without a gradient scaler."""

    def __init__(self, precision: str, device: str) -> None:
        super().__init__(precision, device)  # type: ignore[call-arg]
        self.scaler = None


class FullPrecision(_Unclipped, _Full):  # type: ignore[misc]
    """ "32-true"."""


class HalfPrecision(_Unclipped, _Half):  # type: ignore[misc]
    """ "bf16-true" and "16-true": the module in 16 bits, with fp32 masters."""


class MixedPrecision(_Unscaled, _Unclipped, _Mixed):  # type: ignore[misc]
    """ "bf16-mixed" and "16-mixed": autocast, and a loss scale of the engine's."""


class FabricFullPrecision(_FabricFull):  # type: ignore[misc]
    """ "32-true"."""


class FabricHalfPrecision(_FabricHalf):  # type: ignore[misc]
    """ "bf16-true" and "16-true": the engine casts the module."""

    def convert_module(self, module: Any) -> Any:
        """Nothing: it may have been born in shards."""
        return module


class FabricMixedPrecision(_Unscaled, _FabricMixed):  # type: ignore[misc]
    """ "bf16-mixed" and "16-mixed", without a scaler."""


def cast(plugin: Any, module: Any) -> Any:
    """`module` in the dtype that it computes in without an engine, under a plugin of Fabric's."""
    return _FabricHalf.convert_module(plugin, module) if isinstance(plugin, _FabricHalf) else module


def adapted(plugin: Any) -> Any:
    """The Trainer's `plugin` as one for an engine. Raises `ConfigError` for any other kind."""
    kinds = {_Full: FullPrecision, _Half: HalfPrecision, _Mixed: MixedPrecision}
    return _among(kinds, plugin)


def adapted_of_fabric(plugin: Any) -> Any:
    """Fabric's `plugin` as one for an engine. Raises `ConfigError` for a kind that is not known."""
    kinds = {
        _FabricFull: FabricFullPrecision,
        _FabricHalf: FabricHalfPrecision,
        _FabricMixed: FabricMixedPrecision,
    }
    return _among(kinds, plugin)


def _among(kinds: Mapping[Any, Any], plugin: Any) -> Any:
    """One of the kind that stands for the plugin's, made with what that was told."""
    if plugin is None or type(plugin) in kinds.values():
        return plugin
    kind = kinds.get(type(plugin))
    if kind is None:
        raise ConfigError(
            f"the precision plugin {type(plugin).__qualname__} is not supported: give "
            'precision="32-true", "bf16-true", "16-true", "bf16-mixed" or "16-mixed"'
        )
    if issubclass(kind, _Unscaled):
        return kind(plugin.precision, plugin.device)
    return kind() if plugin.precision == "32-true" else kind(plugin.precision)
