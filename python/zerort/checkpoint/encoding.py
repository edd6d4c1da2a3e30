"""Python values as JSON, with typed tags for what JSON lacks: tuples, integer keys, infinities,
counters, tensors.

`decode(encode(value)) == value`, type for type; what cannot be kept so is refused with its path,
never approximated. Nothing is pickled, so reading a checkpoint runs no code. A tag is an object
with one key that begins with `$`:

    {"$tuple": [...]}   {"$dict": [[key, value], ...]}   {"$counter": [[key, count], ...]}
    {"$float": "inf"}
    {"$scalar": ["F32", [], 5.0]}   a tensor of one element: dtype, shape, value
    {"$tensor": "client_state.0"}   a tensor in rank 0's file, or its owner's

`client_state` alone has two tags more, see `client`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from zerort.checkpoint.tensors import CODES, DTYPES
from zerort.errors import CheckpointError

__all__ = ["Json", "NoForm", "decode", "encode"]

Json = Any
"""None, a bool, an integer, a finite float, a string, a list of these, or a dict of these with
strings as keys.
"""

_DEPTH = 64
_LONGEST = 10**4300
"""Integers from here on are written by Python and read by no JSON reader in its defaults."""


Otherwise = Callable[[Any, str], tuple[str, Tensor]]
"""Keeps a value that has no form here, given its path: a tag and the bytes. Raises where it cannot.
"""


class NoForm(CheckpointError):
    """A value has no form in JSON, and none among the tensors."""


def encode(
    value: Any, where: str, tensors: dict[str, Tensor], otherwise: Otherwise | None = None
) -> Json:
    """`value` as JSON. Tensors of more than one element are put into `tensors`, under names that
    begin with `where`, and so is what `otherwise` makes of a value that has no form here.

    Raises `CheckpointError` with the path to what cannot be kept.
    """
    return _Encoder(where, tensors, otherwise).encode(value, where, 0)


class _Encoder:
    def __init__(
        self, prefix: str, tensors: dict[str, Tensor], otherwise: Otherwise | None
    ) -> None:
        self.prefix, self.tensors, self.otherwise = prefix, tensors, otherwise

    def encode(self, value: Any, path: str, depth: int) -> Json:
        try:
            return self._encode(value, path, depth)
        except NoForm:
            if self.otherwise is None:
                raise
            tag, data = self.otherwise(value, path)
            return {tag: self._put(data)}

    def _put(self, tensor: Tensor) -> str:
        name = f"{self.prefix}.{len(self.tensors)}"
        self.tensors[name] = tensor
        return name

    def _encode(self, value: Any, path: str, depth: int) -> Json:
        if depth > _DEPTH:
            raise CheckpointError(f"{path} is nested more than {_DEPTH} deep")
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind in (int, str):
            return self._plain(value, path)
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if kind in (list, tuple):
            items = [self.encode(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
            return items if kind is list else {"$tuple": items}
        if isinstance(value, dict):
            return self._mapping(value, path, depth)
        raise NoForm(
            f"{path} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: "
            "JSON values, tuples, dicts with string or integer keys, and tensors can be kept; "
            "convert it"
        )

    def _plain(self, value: int | str, path: str) -> Json:
        """An integer or a string that readers of JSON take."""
        if isinstance(value, int):
            if abs(value) >= _LONGEST:
                raise CheckpointError(
                    f"{path} is an integer of more than 4300 digits, which JSON readers refuse: "
                    "keep it as a string"
                )
        elif not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise CheckpointError(
                    f"{path} is a string with half of a surrogate pair, which UTF-8 has not: "
                    f"{value[:40]!a}"
                ) from error
        return value

    def _mapping(self, value: dict[Any, Any], path: str, depth: int) -> Json:
        if isinstance(value, Counter):
            return {"$counter": self._pairs(value, path, depth)}
        if all(type(key) is str and not key.startswith("$") for key in value):
            return dict(self._items(value, path, depth))
        return {"$dict": self._pairs(value, path, depth)}

    def _pairs(self, value: dict[Any, Any], path: str, depth: int) -> list[Json]:
        for key in value:
            if type(key) not in (str, int):
                raise NoForm(
                    f"{path} has the key {key!r}: keys that can be kept are strings and integers"
                )
        return [[key, item] for key, item in self._items(value, path, depth)]

    def _items(
        self, value: dict[Any, Any], path: str, depth: int
    ) -> Iterator[tuple[int | str, Json]]:
        for key, item in value.items():
            self._plain(key, f"a key of {path}")
            yield key, self.encode(item, f"{path}[{key!r}]", depth + 1)

    def _tensor(self, value: Tensor, path: str) -> Json:
        if value.layout != torch.strided or value.dtype not in CODES:
            raise NoForm(
                f"{path} is a {value.layout} tensor of {value.dtype}, which a checkpoint cannot "
                "hold"
            )
        if value.numel() == 1 and not value.is_complex():
            return {
                "$scalar": [
                    CODES[value.dtype],
                    list(value.shape),
                    self.encode(value.item(), path, _DEPTH),
                ]
            }
        return {"$tensor": self._put(value.detach())}


Opened = Callable[[str, str], Any]
"""The value of a tag and a name that `Otherwise` made; raises for any other tag."""


def decode(value: Json, tensor: Callable[[str], Tensor], opened: Opened | None = None) -> Any:
    """The value that was encoded; `tensor` finds one by its name. Raises `CheckpointError` for an
    unknown tag.
    """
    if isinstance(value, list):
        return [decode(item, tensor, opened) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next((key for key in value if key.startswith("$")), None)
    if tag is None:
        return {key: decode(item, tensor, opened) for key, item in value.items()}
    try:
        (content,) = value.values()
        return _untagged(tag, content, tensor, opened)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the manifest holds a value that does not read: {str(value)[:80]}"
        ) from error


def _untagged(
    tag: str, content: Json, tensor: Callable[[str], Tensor], opened: Opened | None
) -> Any:
    if tag == "$tuple":
        return tuple(decode(item, tensor, opened) for item in content)
    if tag in ("$dict", "$counter"):
        pairs = {key: decode(item, tensor, opened) for key, item in content}
        return pairs if tag == "$dict" else Counter(pairs)
    if tag == "$float":
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
    if tag == "$scalar":
        code, shape, item = content
        if math.prod(shape) != 1:
            raise ValueError("a scalar has one element")
        return torch.tensor(decode(item, tensor), dtype=DTYPES[code]).reshape(shape)
    if tag == "$tensor":
        return tensor(content)
    if opened is not None:
        return opened(tag, content)
    raise ValueError(f"unknown tag {tag}")
