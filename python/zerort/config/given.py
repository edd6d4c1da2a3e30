"""A configuration as it was given, beside what it means.

Programs written for DeepSpeed read `engine.config` as the dict that they gave. So by keys it
answers what was given, in the file's own words and nothing else; by attributes what holds, defaults
included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import PrivateAttr

from zerort.config.section import Section

__all__ = ["Given"]


class Given(Section, Mapping[str, Any]):
    """A section that is also the mapping it was made from, of plain dicts and lists."""

    _given: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    def keep(self, given: Mapping[str, Any]) -> None:
        """What it was made from; a copy is kept, so that what becomes of the caller's is his own
        affair.
        """
        self._given = _plain(given)

    def __getitem__(self, key: str) -> Any:
        return self._given[key]

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
