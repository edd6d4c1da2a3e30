"""Names of DeepSpeed's stage 3 that have nothing, or little, to do here."""

from __future__ import annotations

from torch import nn

__all__ = ["register_external_parameter", "unregister_external_parameter"]


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Nothing: a parameter that is used outside its own module is found when that happens."""


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Nothing, as nothing was registered."""
