"""Weights in safetensors files, read in slices.

What it guarantees: no more of a tensor is read than the rows that an asked range touches. What it
does not do: it trusts the files; they come from outside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zerort.errors import ConfigError, PlanError

__all__ = ["Weights"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Weights:
    """What `zerort.load_from` names: a file, an index of several, or the folder of either.

    Raises `ConfigError` naming a file that cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path = _found(Path(path))
        self._open: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        if self._path.name.endswith(".json"):
            self._files = {
                name: self._path.parent / file for name, file in _index(self._path).items()
            }
        else:
            self._files = dict.fromkeys(self._file(self._path).keys(), self._path)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def flat(self, name: str, like: Tensor, lo: int, hi: int) -> Tensor:
        """Elements lo..hi (hi - lo,) of a tensor in the order of its indices, in the file's dtype.

        Raises `PlanError` where it has another shape than `like`.
        """
        found = self._slice(name)
        shape = tuple(found.get_shape())
        if shape != tuple(like.shape):
            raise PlanError(
                f"{name} has shape {tuple(like.shape)} in the model and {shape} in "
                f"{self._files[name]}: load weights of this very model"
            )
        if not shape:
            return self.whole(name).reshape(1).narrow(0, lo, hi - lo)
        if lo == hi:
            return torch.empty(0, dtype=like.dtype)
        row = like.numel() // shape[0]
        first, last = lo // row, -(-hi // row)
        rows: Tensor = found[first:last]
        return rows.reshape(-1).narrow(0, lo - first * row, hi - lo)

    def whole(self, name: str) -> Tensor:
        """All of a tensor."""
        tensor: Tensor = self._file(self._files[name]).get_tensor(name)
        return tensor

    def _slice(self, name: str) -> Any:
        try:
            return self._file(self._files[name]).get_slice(name)
        except SafetensorError as error:
            raise _unreadable(self._files[name], error) from error

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(str(path), framework="pt")
            except (OSError, SafetensorError) as error:
                raise _unreadable(path, error) from error
        return self._open[path]


def _found(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (_INDEX, _SINGLE):
        if (path / name).exists():
            return path / name
    raise ConfigError(
        f"zerort.load_from: the folder {path} has neither {_INDEX} nor {_SINGLE}: name the file"
    )


def _index(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"zerort.load_from: {path} cannot be read: {type(error).__name__}: {error}. It has to be a "
        ".safetensors file, its .index.json, or the folder of one"
    )
