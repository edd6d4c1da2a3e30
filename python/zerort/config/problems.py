"""What is wrong with a configuration, in one line each: key path, what was expected, what was
found.

Problems are collected, not raised one by one: a file with five mistakes is answered with all five.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from zerort.config.keys import KEYS, Fate
from zerort.errors import LONGEST_NAME, ConfigError, did_you_mean, nearest

__all__ = [
    "Problem",
    "expected",
    "from_validation",
    "printable",
    "several",
    "shown",
    "unknown_key",
]

_LONGEST_VALUE = 60
_MOST_LINES = 40


@dataclass(frozen=True)
class Problem:
    """One mistake; `path` is empty where it is the whole file's."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.text}" if self.path else self.text


def several(origin: str, problems: Sequence[Problem]) -> ConfigError:
    """One error with a line for each of `problems`, up to a page."""
    if len(problems) == 1:
        return ConfigError(f"{origin}: {problems[0]}")
    lines = [f"{origin} has {len(problems)} errors:", *map(str, problems[:_MOST_LINES])]
    if len(problems) > _MOST_LINES:
        lines.append(f"and {len(problems) - _MOST_LINES} more")
    return ConfigError("\n  ".join(lines))


def expected(path: str, what: str, value: Any) -> Problem:
    """A value of the wrong type or range."""
    return Problem(path, f"expected {what}, got {shown(value)}")


def shown(value: Any) -> str:
    """`value` as it stands in a JSON file, cut to fit on a line."""
    try:
        text = json.dumps(value, default=repr)
    except (ValueError, TypeError, RecursionError):  # it holds itself, or thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def printable(name: str) -> str:
    """A name on one line that any log takes: what is no printable character is escaped."""
    short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in short)


def unknown_key(path: str, *, guess: bool = True) -> Problem:
    """A key that is not in the table, with the nearest that is: a sibling, else the same name in
    another section. Where that is refused itself, nothing is suggested.
    """
    if not guess:
        return Problem(path, "unknown key")
    section, _, name = path.rpartition(".")
    known = [key.rpartition(".") for key in KEYS]
    near = nearest(name, [leaf for parent, _, leaf in known if parent == section])
    found = f"{section}.{near}" if section and near else near
    if near is None:
        elsewhere = nearest(name, [leaf for _, _, leaf in known])
        near = found = next((key for key in KEYS if key.rpartition(".")[2] == elsewhere), None)
    refused = found is not None and KEYS[found].fate is Fate.REFUSED
    return Problem(path, f"unknown key{did_you_mean(None if refused else near)}")


def from_validation(error: ValidationError, data: Mapping[str, Any]) -> list[Problem]:
    """The problems that pydantic found in `data`; a union's complaints about one key become one
    line.
    """
    details = error.errors(include_url=False)
    merged: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        merged.setdefault(_path(detail), []).append(detail)
    return [_problem(path, group, data) for path, group in merged.items()]


def _path(detail: ErrorDetails) -> str:
    # A union adds the name of its branch to the location: keep what the table knows, and the key a
    # value lies under.
    path = ""
    for part in detail["loc"]:
        longer = f"{path}.{part}" if path else str(part)
        if longer not in KEYS:
            break
        path = longer
    return path


def _problem(path: str, details: list[ErrorDetails], data: Mapping[str, Any]) -> Problem:
    first = details[0]
    if first["type"] == "missing":
        return Problem(path, "required, but left out")
    if first["type"] == "value_error":
        return Problem(path, str(first["ctx"]["error"]))
    # Not the error's own input: that has been through the validators that unify spellings.
    value = functools.reduce(lambda section, name: section[name], path.split("."), data)
    return expected(path, " or ".join(dict.fromkeys(map(_wanted, details))), value)


_WANTED: Mapping[str, str] = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "dict_type": "an object",
    "model_type": "an object",
    "tuple_type": "a list",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than_equal": "a number of at most {le}",
}


def _wanted(detail: ErrorDetails) -> str:
    template = _WANTED.get(detail["type"])
    bounds = {name: _plain(value) for name, value in detail.get("ctx", {}).items()}
    return template.format(**bounds) if template else detail["msg"]


def _plain(bound: Any) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
