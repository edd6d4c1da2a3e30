"""Models without memory: a user's own on the meta device, or one of a given size."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import nn

from zerort import _core
from zerort.config import Config
from zerort.errors import ConfigError
from zerort.start.caps import Cap

__all__ = ["made_by", "of_size"]

_KINDS: Mapping[str, tuple[int, _core._Dtype]] = {
    "fp32": (4, "f32"),
    "bf16": (2, "bf16"),
    "fp16": (2, "f16"),
}
"""Bytes of an element, and the core's name, by that of the configuration."""
_MOST = 200_000
"""Pieces of a model that is only known by its size: each is planned, which takes time and memory.
"""


def made_by(name: str) -> nn.Module:
    """What the callable MODULE:NAME makes, called without arguments on the meta device. The module
    is looked for in the working directory too.

    Raises `ConfigError` where there is no such callable, where it raises, and for anything but a
    module.
    """
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise ConfigError(f"--model {name}: expected MODULE:FACTORY, as in train:make_model")
    factory = _imported(name, module, path)
    try:
        with torch.device("meta"):
            model = factory() if not isinstance(factory, nn.Module) else factory
    except Exception as error:
        raise ConfigError(
            f"--model {name}: it raised {type(error).__name__}: {error}; it is called without "
            "arguments, on the meta device, where tensors have no values: give a factory that "
            "reads none, or --numel"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model {name}: expected a torch.nn.Module, got {type(model).__name__}")
    return model.to("meta")


def _imported(name: str, module: str, path: str) -> Any:
    sys.path.insert(0, "")
    try:
        return reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:  # of any kind: it is the user's file
        raise ConfigError(
            f"--model {name}: it cannot be imported ({type(error).__name__}: {error}); looked for "
            "in the working directory and where Python looks"
        ) from error
    finally:
        sys.path.remove("")


def of_size(
    numel: int, largest: int | None, settings: Config, *, world: int = 1, layers: int | None = None
) -> nn.Module:
    """A model of `numel` elements: `layers` alike, or with `largest` elements in one layer and the
    others in layers that fill a bucket of `world` ranks below stage 3. What is longer than a bucket
    is cut into parameters that fill one. Raises `ConfigError` where that makes more parameters than
    can be planned.
    """
    item, dtype = _KINDS[settings.compute_dtype]
    cap = Cap.of(settings, [(numel, dtype, 0, 0)], world, stage=0).numel(item)
    first = min(numel, largest or 0)
    rest = numel - first
    each = max(1, -(-rest // layers)) if layers else cap
    if max(rest // each, numel // cap) > _MOST:
        spread = f" and {layers:,} layers" if layers else ""
        raise ConfigError(
            f"{numel:,} parameters in buckets of {cap:,}{spread} are more than {_MOST:,} pieces to "
            "plan: give fewer layers, or larger buckets"
        )
    sizes = [first] * bool(first) + [each] * (rest // each) + [rest % each] * bool(rest % each)
    model = nn.Module()
    for index, size in enumerate(sizes):
        model.add_module(str(index), _layer(size, cap if layers else size))
    return model


def _layer(numel: int, longest: int) -> nn.Module:
    layer = nn.Module()
    for index, start in enumerate(range(0, numel, longest)):
        weight = torch.empty(min(longest, numel - start), device="meta")
        layer.register_parameter(f"weight{index}", nn.Parameter(weight))
    return layer
