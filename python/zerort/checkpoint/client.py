"""`client_state`: what a caller keeps in a checkpoint, and gets back.

JSON, tuples, integer keys and tensors are kept as everything in a manifest is. What has no such
form stands as torch's bytes in a tensor of its own, behind one of two tags:

    {"$torch": "client_state.0"}    `torch.load(weights_only=True)` reads it, which runs no code;
                                    an `argparse.Namespace` too
    {"$pickle": "client_state.1"}   an object: reading it runs what the bytes say

What it guarantees: a value is read back once before it is kept, and a pickled object is written
only with `allow_pickle` and read only with `allow_pickle`. No other part of a checkpoint knows
these tags.
"""

from __future__ import annotations

import argparse
import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from zerort.checkpoint.encoding import Json, decode, encode
from zerort.errors import CheckpointError

__all__ = ["SavedClientState", "check_permission", "encode_client_state"]

_NAME = "client_state"
_SAFE, _PICKLED = "$torch", "$pickle"
_DEPTH = 64
_WAY_OUT = (
    "convert it, or pass allow_pickle=True to save_checkpoint, which then pickles it, and to "
    "load_checkpoint"
)


def encode_client_state(
    value: dict[str, Any], tensors: dict[str, Tensor], *, allow_pickle: bool
) -> Json:
    """The manifest's form; tensors and bytes are put into `tensors`. Raises `CheckpointError` with
    the path to what cannot be kept.
    """

    def otherwise(value: Any, path: str) -> tuple[str, Tensor]:
        try:
            return _kept(value, allow_pickle=allow_pickle)
        except Exception as error:
            where, inner = _innermost(value, path, allow_pickle=allow_pickle)
            kind, way_out = type(inner), "convert it" if allow_pickle else _WAY_OUT
            raise CheckpointError(
                f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot "
                f"hold ({_short(error)}): {way_out}"
            ) from error

    return encode(value, _NAME, tensors, otherwise)


def check_permission(encoded: Json, *, allow_pickle: bool) -> None:
    """Raises `CheckpointError` for a pickled object without `allow_pickle`."""
    for path, tag, _ in _packed(encoded, _NAME):
        if tag == _PICKLED and not allow_pickle:
            raise CheckpointError(
                f"{path} was saved as a pickled object, and reading it runs whatever its bytes "
                "say: if you trust who wrote this checkpoint, pass allow_pickle=True to "
                "load_checkpoint"
            )


class SavedClientState:
    """What a checkpoint holds. Its tensors are asked for at once, by `want`, and nothing is opened
    before they are there.
    """

    def __init__(self, encoded: Json, want: Callable[[str], Tensor]) -> None:
        self._encoded = encoded
        self._tensors: dict[str, Tensor] = {}

        def wanted(name: str) -> Tensor:
            return self._tensors.setdefault(name, want(name))

        decode(encoded, wanted, lambda tag, name: wanted(_known(tag, name)))

    def open(self) -> Any:
        """The value. Raises `CheckpointError` with the path to what does not read back."""
        paths = {name: path for path, _, name in _packed(self._encoded, _NAME)}

        def opened(tag: str, name: str) -> Any:
            try:
                return _read(bytes(self._tensors[name].numpy()), tag)
            except Exception as error:
                raise CheckpointError(
                    f"{paths.get(name, _NAME)} does not read back: {_short(error)}"
                ) from error

        return decode(self._encoded, self._tensors.__getitem__, opened)


def _known(tag: str, name: str) -> str:
    if tag not in (_SAFE, _PICKLED):
        raise ValueError(f"unknown tag {tag}")
    return name


def _kept(value: Any, *, allow_pickle: bool) -> tuple[str, Tensor]:
    """The tag and the bytes, once they have been read back. Raises whatever writing or reading
    raises.
    """
    data, tag = _written(value), _SAFE
    try:
        _read(data, tag)
    except Exception:
        if not allow_pickle:
            raise
        tag = _PICKLED
        _read(data, tag)
    return tag, torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _written(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(_apart(value, 0), stream)
    return stream.getvalue()


def _read(data: bytes, tag: str) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Validating sparse tensor", UserWarning)
        with torch.serialization.safe_globals([argparse.Namespace]):  # which is one of names alone
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=tag == _SAFE)


def _apart(value: Any, depth: int) -> Any:
    """The value with tensors of their own: of a view torch writes all that it is a view of."""
    if isinstance(value, Tensor):
        whole = value.layout != torch.strided or (value.untyped_storage().nbytes() <= value.nbytes)
        return value.detach() if whole else value.detach().clone()
    if depth < _DEPTH and type(value) in (list, tuple):
        return type(value)(_apart(item, depth + 1) for item in value)
    if depth < _DEPTH and type(value) is argparse.Namespace:
        return argparse.Namespace(**_apart(vars(value), depth + 1))
    if depth < _DEPTH and type(value) is dict:
        return {key: _apart(item, depth + 1) for key, item in value.items()}
    return value


def _innermost(value: Any, path: str, *, allow_pickle: bool) -> tuple[str, Any]:
    """The innermost value that cannot be kept, with its path."""
    inner: Iterator[tuple[str, Any]] = iter(())
    if isinstance(value, dict):
        inner = ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif type(value) is argparse.Namespace:
        inner = ((f"{path}.{key}", item) for key, item in vars(value).items())
    elif isinstance(value, (list, tuple)):
        inner = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        inner = ((f"an element of {path}", item) for item in value)
    for where, item in inner:
        try:
            _kept(item, allow_pickle=allow_pickle)
        except RecursionError:
            return where, item
        except Exception:
            return _innermost(item, where, allow_pickle=allow_pickle)
    return path, value


def _packed(encoded: Json, path: str) -> Iterator[tuple[str, str, str]]:
    """Path, tag and tensor of everything that stands as bytes."""
    if isinstance(encoded, list):
        for index, item in enumerate(encoded):
            yield from _packed(item, f"{path}[{index}]")
    elif isinstance(encoded, dict):
        for key, item in encoded.items():
            if key in (_SAFE, _PICKLED):
                yield path, key, str(item)
            elif key == "$tuple":
                yield from _packed(item, path)
            elif key in ("$dict", "$counter"):
                for pair in item if isinstance(item, list) else ():
                    if isinstance(pair, list) and len(pair) == 2:
                        yield from _packed(pair[1], f"{path}[{pair[0]!r}]")
            else:
                yield from _packed(item, f"{path}[{key!r}]")


def _short(error: BaseException) -> str:
    """The reason without the advice that torch adds to it."""
    text = str(error)
    found = re.search("Unsupported [^\n]*?(?= was not an allowed|\n|$)", text)
    line = text.strip().partition("\n")[0] if found is None else found[0]
    return f"{type(error).__name__}: {line[:200]}"
