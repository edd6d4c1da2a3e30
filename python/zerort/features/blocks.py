"""The blocks of a module: the entries of a list in it, such as a transformer's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from zerort.config.quantize import Eigenvalue
from zerort.errors import ConfigError

__all__ = ["Block", "blocks_of"]


@dataclass(frozen=True)
class Block:
    """Its parameters, each once, and what the module calls them."""

    names: Sequence[str]
    params: Sequence[nn.Parameter]


def blocks_of(module: nn.Module, settings: Eigenvalue, path: str) -> Sequence[Block]:
    """The first `layer_num` blocks that `layer_name` leads to. Raises `ConfigError` naming the key
    under `path`, and the first part of the name that does not resolve.
    """
    found = _at(module, settings.layer_name, f"{path}.layer_name")
    called = {id(parameter): name for name, parameter in module.named_parameters()}
    blocks = []
    for index in range(settings.layer_num):
        try:
            entry = found[index]
        except (IndexError, KeyError, TypeError, NotImplementedError):
            entry = None
        if not isinstance(entry, nn.Module):
            raise ConfigError(
                f"{path}.layer_num: expected no more than the modules in {settings.layer_name}, a "
                f"{type(found).__name__}; it has no module {index}, got {settings.layer_num}"
            )
        params = list(entry.parameters())
        blocks.append(Block([called[id(parameter)] for parameter in params], params))
    return blocks


def _at(module: nn.Module, name: str, path: str) -> Any:
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ConfigError(
                f"{path}: {name!r} does not resolve: {type(found).__name__} has no {part!r}; give "
                "the dotted path from the module to the list of its blocks"
            ) from None
    return found
