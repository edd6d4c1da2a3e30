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


def adapted_of_fabric(plugin: Any) -> Any:
    """Fabric's `plugin` without its scaler. Raises `ConfigError` for a kind that is not known."""
    kinds = (_fabric.Precision, _fabric.HalfPrecision, _fabric.MixedPrecision)
    if plugin is not None and type(plugin) not in kinds:
        raise _unsupported(plugin)
    if isinstance(plugin, _fabric.MixedPrecision):
        plugin.scaler = None
    return plugin


def _unsupported(plugin: Any) -> ConfigError:
    return ConfigError(
        f"the precision plugin {type(plugin).__qualname__} is not supported: give "
        'precision="32-true", "bf16-true", "16-true", "bf16-mixed" or "16-mixed"'
    )
