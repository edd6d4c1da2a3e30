"""Lightning's precision plugins under an engine, which scales the loss, clips and steps itself.

The plugins keep what they do around a step: the dtype of inputs, of new tensors, autocast. They
lose their gradient scaler, and clipping, which the engine does by the norm of the whole gradient.
"""

from __future__ import annotations

from typing import Any

from zerort.compat.lightning.packages import fabric, pytorch
from zerort.errors import ConfigError

__all__ = ["adapted", "adapted_of_fabric"]

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


class FullPrecision(_Unclipped, _Full):  # type: ignore[misc]
    """ "32-true"."""


class HalfPrecision(_Unclipped, _Half):  # type: ignore[misc]
    """ "bf16-true" and "16-true": the module in 16 bits, with fp32 masters."""


class MixedPrecision(_Unclipped, _Mixed):  # type: ignore[misc]
    """ "bf16-mixed" and "16-mixed": autocast, and a loss scale of the engine's."""

    def __init__(self, precision: str, device: str) -> None:
        super().__init__(precision, device)
        self.scaler = None


def adapted(plugin: Any) -> Any:
    """The Trainer's `plugin` as one for an engine. Raises `ConfigError` for any other kind."""
    if plugin is None or isinstance(plugin, _Unclipped):
        return plugin
    kind = type(plugin)
    if kind is _Full:
        return FullPrecision()
    if kind is _Half:
        return HalfPrecision(plugin.precision)
    if kind is _Mixed:
        return MixedPrecision(plugin.precision, plugin.device)
    raise _unsupported(plugin)


class FabricFullPrecision(_FabricFull):  # type: ignore[misc]
    """ "32-true"."""

    def cast(self, module: Any) -> Any:
        """What a module without an engine computes in."""
        return module


class FabricHalfPrecision(_FabricHalf):  # type: ignore[misc]
    """ "bf16-true" and "16-true": the engine casts the module."""

    def convert_module(self, module: Any) -> Any:
        """Nothing: it may have been born in shards."""
        return module

    def cast(self, module: Any) -> Any:
        """What a module without an engine computes in."""
        return super().convert_module(module)


class FabricMixedPrecision(_FabricMixed):  # type: ignore[misc]
    """ "bf16-mixed" and "16-mixed", without a scaler."""

    def __init__(self, precision: str, device: str) -> None:
        super().__init__(precision, device)
        self.scaler = None

    def cast(self, module: Any) -> Any:
        """What a module without an engine computes in."""
        return module


def adapted_of_fabric(plugin: Any) -> Any:
    """Fabric's `plugin` as one for an engine. Raises `ConfigError` for a kind that is not known."""
    own = FabricFullPrecision, FabricHalfPrecision, FabricMixedPrecision
    if plugin is None or isinstance(plugin, own):
        return plugin
    kind = type(plugin)
    if kind is _FabricFull:
        return FabricFullPrecision()
    if kind is _FabricHalf:
        return FabricHalfPrecision(plugin.precision)
    if kind is _FabricMixed:
        return FabricMixedPrecision(plugin.precision, plugin.device)
    raise _unsupported(plugin)


def _unsupported(plugin: Any) -> ConfigError:
    return ConfigError(
        f"the precision plugin {type(plugin).__qualname__} is not supported: give "
        'precision="32-true", "bf16-true", "16-true", "bf16-mixed" or "16-mixed"'
    )
