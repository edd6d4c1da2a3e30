"""HJSON, in which DeepSpeed's files may be written: JSON with comments, without commas, quotes and
outer braces.

What stands without quotes is text to the end of its line, unless it is a number, `true`, `false` or
`null` before a comma, a bracket or a comment. So `tru` is text, which the types of keys refuse.
Each character is looked at a bounded number of times, whatever the text is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

__all__ = ["loads"]

# Both end at what closes them, or at the end of the text: a second look would take a time that
# grows with the square of the length.
_BLANK = re.compile(r"(?:\s|#[^\n]*|//[^\n]*|/\*.*?(?:\*/|\Z))*", re.DOTALL)
_QUOTED = re.compile(
    r""""(?:[^"\\\n]|\\.)*(?P<closed>")?|'(?:[^'\\\n]|\\.)*(?P<closed2>')?""", re.DOTALL
)
_LITERAL = re.compile(
    r"(?:(?P<float>-?(?:0|[1-9]\d*)(?:\.\d+(?:[eE][+-]?\d+)?|[eE][+-]?\d+))"
    r"|(?P<int>-?(?:0|[1-9]\d*))"
    r"|(?P<word>true|false|null|Infinity|-Infinity|NaN))"
    r"(?=[^\S\n]*(?:[,\]}\n#]|//|/\*|\Z))"
)
_KEY = re.compile(r"[^\s,:\[\]{}]+")
_LINE = re.compile(r"[^\n]*")
_WORDS = {
    "true": True,
    "false": False,
    "null": None,
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
    "NaN": float("nan"),
}
_MULTILINE = "'''"

Pairs = list[tuple[str, Any]]


def loads(
    text: str,
    *,
    object_pairs_hook: Callable[[Pairs], Any],
    parse_int: Callable[[str], Any] = int,
) -> Any:
    """The value of `text`. As `json.loads`: the hooks make objects and integers; raises
    `json.JSONDecodeError`, and `RecursionError` for what is nested too deeply.
    """
    return _Reader(text, object_pairs_hook, parse_int).whole()


class _Reader:
    """A place in a text, and what is read from there on."""

    def __init__(
        self, text: str, make: Callable[[Pairs], Any], integer: Callable[[str], Any]
    ) -> None:
        self._text, self._make, self._integer = text, make, integer
        self._at = 0

    def whole(self) -> Any:
        opener = self._next()
        if not opener:
            raise self._error("Expecting value")
        value = self._value() if opener in ("{", "[") else self._members("")
        if self._next():
            raise self._error("Extra data")
        return value

    def _error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._text, self._at)

    def _next(self) -> str:
        """Goes over blanks and comments; the character there, empty at the end."""
        blank = _BLANK.match(self._text, self._at)
        assert blank is not None
        self._at = blank.end()
        return self._text[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def _value(self) -> Any:
        first = self._next()
        if first == "{":
            self._at += 1
            return self._members("}")
        if first == "[":
            self._at += 1
            return self._items()
        if first in ("", ",", ":", "]", "}"):
            raise self._error("Expecting value")
        if self._text.startswith(_MULTILINE, self._at):
            return self._lines()
        if first in "\"'":
            return self._quoted()
        return self._plain()

    def _members(self, end: str) -> Any:
        """An object up to `end`, which is empty where it has no braces."""
        pairs: Pairs = []
        while (first := self._next()) != end:
            if first in "\"'" and first:
                key = self._quoted()
            elif found := self._take(_KEY):
                key = found[0]
            else:
                raise self._error("Expecting property name")
            if self._next() != ":":
                raise self._error("Expecting ':' delimiter")
            self._at += 1
            pairs.append((key, self._value()))
            self._separate()
        self._at += len(end)
        return self._make(pairs)

    def _items(self) -> list[Any]:
        items: list[Any] = []
        while self._next() != "]":
            items.append(self._value())
            self._separate()
        self._at += 1
        return items

    def _separate(self) -> None:
        if self._next() == ",":
            self._at += 1

    def _quoted(self) -> str:
        found = self._take(_QUOTED)
        assert found is not None
        if not (found["closed"] or found["closed2"]):
            self._at = found.start()
            raise self._error("Unterminated string starting at")
        inner = found[0][1:-1]
        if found["closed2"]:  # JSON knows one kind of quote, and no escape of the other
            inner = re.sub(r"\\.|\"", _requoted, inner, flags=re.DOTALL)
        try:
            text = json.loads(f'"{inner}"', strict=False)
        except json.JSONDecodeError as error:
            self._at = found.start()
            raise self._error(error.msg) from None
        assert isinstance(text, str)
        return text

    def _lines(self) -> str:
        """Text in three quotes, without the indentation of the first."""
        start = self._at
        end = self._text.find(_MULTILINE, start + 3)
        if end < 0:
            raise self._error("Unterminated string starting at")
        self._at = end + 3
        indent = start - (self._text.rfind("\n", 0, start) + 1)
        first, *rest = self._text[start + 3 : end].split("\n")
        lines = [*([first] if first.strip() else []), *(_outdented(line, indent) for line in rest)]
        if rest and not lines[-1].strip():
            lines.pop()
        return "\n".join(lines)

    def _plain(self) -> Any:
        found = self._take(_LITERAL)
        if found is None:
            line = self._take(_LINE)
            assert line is not None
            return line[0].rstrip()
        if found["int"]:
            return self._integer(found["int"])
        return float(found["float"]) if found["float"] else _WORDS[found["word"]]


def _requoted(found: re.Match[str]) -> str:
    return {'"': '\\"', "\\'": "'"}.get(found[0], found[0])


def _outdented(line: str, indent: int) -> str:
    margin = len(line) - len(line.lstrip())
    return line[min(indent, margin) :]
