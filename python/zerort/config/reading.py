"""From what the caller gave to plain data: a dict as it is, a file, or JSON in base64.

Files are JSON; what is no JSON is read once more without comments and trailing commas, and then as
HJSON, which DeepSpeed's files may be. Whatever text is given, the outcome is data or a
`ConfigError`: numbers that Python cannot hold become infinite, and are refused where their key is
known.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zerort.config import hjson
from zerort.config.comments import blanked
from zerort.config.problems import Problem, shown
from zerort.errors import ConfigError

__all__ = ["ConfigLike", "Source", "choose", "read"]

ConfigLike = Mapping[str, Any] | str | os.PathLike[str]
"""A dict, the path of a JSON or HJSON file, or such text in base64."""

_LARGEST = 16 * 2**20
"""Characters of a file; a configuration has some thousands."""
_DEEPEST = 8
"""Objects within each other, counted for keys given twice; sections end at three."""
_LONGEST_INTEGER = 400
"""Digits; a double ends at 309, and Python refuses to convert thousands."""


@dataclass
class Source:
    """A configuration as it was given."""

    origin: str
    """What messages call it."""
    data: dict[str, Any]
    twice: list[Problem] = field(default_factory=list)
    """Keys given twice, which a dict cannot hold."""


def choose(config: ConfigLike | None, args: Any, config_params: ConfigLike | None) -> ConfigLike:
    """The one that is given. Raises `ConfigError` for none and for several."""
    given = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
        "args.deepscale_config": getattr(args, "deepscale_config", None),
    }
    named = {name: value for name, value in given.items() if value is not None}
    if not named:
        raise ConfigError(
            "no configuration: give one of config, config_params and args.deepspeed_config"
        )
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} are both given; give one configuration")
    return next(iter(named.values()))


def read(config: ConfigLike) -> Source:
    """The data of `config`. Raises `ConfigError` for what cannot be read or is no JSON object."""
    if isinstance(config, Mapping):
        return Source("configuration", dict(config))
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(
            f"configuration: expected a dict, a path or base64 text, got {type(config).__name__}"
        )
    path = Path(config)
    try:
        text = _text_of(path)
    except (OSError, ValueError) as error:
        decoded = _from_base64(config) if isinstance(config, str) else None
        if decoded is None:
            raise ConfigError(
                f"configuration file {shown(str(path))} cannot be read: "
                f"{_reason(error)}{_sought(path)}"
            ) from error
        return _parse("configuration in base64", decoded)
    return _parse(str(path), text)


def _text_of(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise ValueError(f"it is longer than {_LARGEST} characters")
    return text


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _sought(path: Path) -> str:
    """Where a relative path was looked for: jobs seldom start in the folder one thinks of."""
    if path.is_absolute():
        return ""
    try:
        return f" (looked for in {Path.cwd()})"
    except OSError:
        return " (and the working directory is gone)"


def _from_base64(text: str) -> str | None:
    try:
        standard = text.replace("-", "+").replace("_", "/")
        decoded = base64.b64decode(standard, validate=True).decode("utf-8-sig")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys were given more than once."""

    twice: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    made = _Object(pairs)
    if len(made) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        made.twice = tuple(name for name, count in counts.items() if count > 1)
    return made


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)


def _load(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_int=_integer)


def _load_any(origin: str, text: str) -> Any:
    """The value of `text`, in the first notation that it is written in."""
    with suppress(json.JSONDecodeError):
        return _load(text)
    try:
        return _load(blanked(text))
    except json.JSONDecodeError as error:
        strict = error
    try:
        return hjson.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{origin}: not JSON: {_placed(strict)}; nor HJSON: {_placed(error)}"
        ) from error


def _placed(error: json.JSONDecodeError) -> str:
    return f"{error.msg} at line {error.lineno}, column {error.colno}"


def _parse(origin: str, text: str) -> Source:
    try:
        data = _load_any(origin, text)
    except RecursionError:
        raise ConfigError(f"{origin}: nested too deeply for a configuration") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: expected an object, got {shown(data)}")
    return Source(origin, data, list(_given_twice("", data)))


def _given_twice(prefix: str, section: Any) -> Iterator[Problem]:
    for name in getattr(section, "twice", ()):
        yield Problem(f"{prefix}{name}", "given twice")
    if isinstance(section, Mapping) and prefix.count(".") < _DEEPEST:
        for name, inner in section.items():
            yield from _given_twice(f"{prefix}{name}.", inner)
