"""What is wrong with a configuration, in one line each: key path, what was expected, what was found.

Problems are collected, not raised one by one: whoever wrote five mistakes into a file reads of all five.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from zerort.config.keys import KEYS
from zerort.errors import ConfigError

__all__ = ["Problem", "expected", "from_validation", "several", "shown", "unknown_key"]

_LONGEST_VALUE = 60


@dataclass(frozen=True)
class Problem:
    """One mistake; `path` is empty where it is the whole file's."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}" if self.path else self.text


def several(origin: str, problems: Sequence[Problem]) -> ConfigError:
    """One error with a line for each of `problems`."""
    if len(problems) == 1:
        return ConfigError(f"{origin}: {problems[0]}")
    return ConfigError("\n  ".join([f"{origin} has {len(problems)} errors:", *map(str, problems)]))


def expected(path: str, what: str, value: Any) -> Problem:
    """A value of the wrong type or range."""
    return Problem(path, f"expected {what}, got {shown(value)}")


def shown(value: Any) -> str:
    """`value` as it stands in a JSON file, cut to fit on a line."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def unknown_key(path: str) -> Problem:
    """A key that is not in the table, with the nearest that is: a sibling, else the same name in another section."""
    section, _, name = path.rpartition(".")
    known = [key.rpartition(".") for key in KEYS]
    nearest = _nearest(name, [leaf for parent, _, leaf in known if parent == section])
    if nearest is None:
        elsewhere = _nearest(name, [leaf for _, _, leaf in known])
        nearest = next((key for key in KEYS if key.rpartition(".")[2] == elsewhere), None)
    return Problem(path, "unknown key" + (f'; did you mean "{nearest}"?' if nearest else ""))


def _nearest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.7)), None)


def from_validation(error: ValidationError) -> list[Problem]:
    """The problems that pydantic found; a union's complaints about one key become one line."""
    details = error.errors(include_url=False)
    merged: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        merged.setdefault(_path(detail), []).append(detail)
    return [_problem(path, group) for path, group in merged.items()]


def _path(detail: ErrorDetails) -> str:
    # A union adds the name of its branch to the location: keep what the table knows, and the key a value lies under.
    path = ""
    for part in detail["loc"]:
        longer = f"{path}.{part}" if path else str(part)
        if longer not in KEYS:
            break
        path = longer
    return path


def _problem(path: str, details: list[ErrorDetails]) -> Problem:
    first = details[0]
    if first["type"] == "missing":
        name = str(first["loc"][-1])
        return Problem(f"{path}.{name}" if not path.endswith(name) else path, "required, but left out")
    if first["type"] == "value_error":
        return Problem(path, str(first["ctx"]["error"]))
    return expected(path, " or ".join(dict.fromkeys(map(_wanted, details))), first["input"])


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
    return template.format(**detail.get("ctx", {})) if template else detail["msg"]
