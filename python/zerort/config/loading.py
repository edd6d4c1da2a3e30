"""From a dict, a file or base64 text to a `Config`: find the source, read it, screen its keys,
check its values.

Screening follows the table in `keys` and comes first, so that the models see only keys they have;
the problems of both are reported together.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zerort.config.keys import ALIASES, KEYS, Fate, Key
from zerort.config.model import Config
from zerort.config.problems import Problem, expected, from_validation, several, shown, unknown_key
from zerort.errors import ConfigError

__all__ = ["ConfigLike", "describe", "load"]

ConfigLike = Mapping[str, Any] | str | os.PathLike[str]
"""A dict, the path of a JSON file, or a JSON object in base64."""

_AUTO = (
    'is "auto", which an integration (the Trainer of transformers, Accelerate) replaces by a '
    "value before it comes here; give a value, or start from that integration"
)
_SECTIONS = frozenset(path.rpartition(".")[0] for path in KEYS if "." in path)


def load(
    config: ConfigLike | None = None, args: Any = None, config_params: ConfigLike | None = None
) -> Config:
    """The configuration given in exactly one of `config`, `config_params` and
    `args.deepspeed_config`.

    Raises `ConfigError` when none or several are given, when the file cannot be read, and for
    everything that is wrong in it, one line a key: unknown keys, refused features, wrong types and
    ranges, keys that contradict each other.
    """
    source = _read(_choose(config, args, config_params))
    loaded, problems = _check(source)
    if loaded is None:
        raise several(source.origin, problems)
    return loaded


def describe(config: ConfigLike) -> list[tuple[str, str, str]]:
    """What each key of a configuration does here: rows of key path, value as JSON, and effect.

    Mistakes are rows too ("error: ..."), so that one reading shows all. Raises `ConfigError` when
    there is nothing to read.
    """
    source = _read(config)
    _, problems = _check(source)
    wrong: dict[str, str] = {}
    for problem in problems:
        wrong[problem.path] = f"{wrong.get(problem.path, 'error:')} {problem.text}"
    rows = [
        (path, shown(value), wrong.pop(path, "") or _effect(path, value))
        for path, value in _leaves(source.data)
    ]
    return rows + [(path, "", text) for path, text in wrong.items()]


def _effect(path: str, value: Any) -> str:
    key = KEYS[_canonical(path)]
    if key.fate is Fate.REFUSED:
        return "off, as it is here anyway"
    return f"ignored: {key.effect}" if key.fate is Fate.IGNORED else key.effect


def _check(source: _Source) -> tuple[Config | None, list[Problem]]:
    screened = _screen(source.data)
    problems = source.duplicates + screened.problems
    try:
        config = Config.model_validate(screened.kept)
    except ValidationError as error:
        known = {problem.path for problem in problems}
        found = from_validation(error, screened.kept)
        return None, problems + [problem for problem in found if problem.path not in known]
    config._ignored = tuple(screened.ignored)
    return (None if problems else config), problems


@dataclass
class _Source:
    origin: str
    data: dict[str, Any]
    duplicates: list[Problem] = field(default_factory=list)


@dataclass
class _Screened:
    kept: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def _choose(config: ConfigLike | None, args: Any, config_params: ConfigLike | None) -> ConfigLike:
    given = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    named = {name: value for name, value in given.items() if value is not None}
    if not named:
        raise ConfigError(
            "no configuration: give one of config, config_params and args.deepspeed_config"
        )
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} are both given; give one configuration")
    return next(iter(named.values()))


def _read(config: ConfigLike) -> _Source:
    if isinstance(config, Mapping):
        return _Source("configuration", dict(config))
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(
            f"configuration: expected a dict, a path or base64 text, got {type(config).__name__}"
        )
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        decoded = _from_base64(config) if isinstance(config, str) else None
        if decoded is None:
            raise ConfigError(
                f"configuration file {shown(str(path))} cannot be read: "
                f"{_reason(error)}{_sought(path)}"
            ) from error
        return _parse("configuration in base64", decoded)
    return _parse(str(path), text)


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _sought(path: Path) -> str:
    """Where a relative path was looked for: jobs seldom start in the folder one thinks of."""
    return "" if path.is_absolute() else f" (looked for in {Path.cwd()})"


def _from_base64(text: str) -> str | None:
    try:
        decoded = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True).decode(
            "utf-8"
        )
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _parse(origin: str, text: str) -> _Source:
    duplicates: list[Problem] = []

    def closed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        section = dict(pairs)
        if len(section) < len(pairs):
            names = [name for name, _ in pairs]
            duplicates.extend(
                Problem(name, "given twice") for name in section if names.count(name) > 1
            )
        return section

    try:
        data = json.loads(text, object_pairs_hook=closed)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{origin}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: expected an object, got {shown(data)}")
    return _Source(origin, data, duplicates)


def _canonical(path: str) -> str:
    section, dot, rest = path.partition(".")
    return ALIASES.get(section, section) + dot + rest


def _screen(data: Mapping[str, Any]) -> _Screened:
    screened = _Screened()
    for name, canonical in ALIASES.items():
        if name in data and canonical in data:
            screened.problems.append(
                Problem(name, f'an old spelling of "{canonical}", which is given too')
            )
    screened.kept = _screen_section("", data, screened)
    return screened


def _screen_section(prefix: str, section: Mapping[str, Any], screened: _Screened) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in section.items():
        path = f"{prefix}{name}"
        canonical = _canonical(path)
        key = KEYS.get(canonical)
        if key is None:
            screened.problems.append(unknown_key(path))
        elif key.fate is not Fate.SAME:
            _screen_foreign(path, value, key, screened)
        elif canonical not in _SECTIONS:
            _report_auto(path, value, screened)
            kept[canonical.rpartition(".")[2]] = value
        elif isinstance(value, Mapping):
            kept[canonical.rpartition(".")[2]] = _screen_section(f"{path}.", value, screened)
        else:
            screened.problems.append(expected(path, "an object", value))
    return kept


def _screen_foreign(path: str, value: Any, key: Key, screened: _Screened) -> None:
    if key.harmless(value) or _report_auto(path, value, screened):
        return
    if key.fate is Fate.IGNORED:
        screened.ignored.append(path)
    else:
        screened.problems.append(Problem(path, f"refused: {key.effect} (got {shown(value)})"))


def _report_auto(path: str, value: Any, screened: _Screened) -> bool:
    found = [where for where, leaf in _walk(path, value) if leaf == "auto"]
    screened.problems.extend(Problem(where, _AUTO) for where in found)
    return bool(found)


def _walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _walk(f"{path}.{name}", inner)
    else:
        yield path, value


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        path = f"{prefix}{name}"
        if _canonical(path) in _SECTIONS and isinstance(value, Mapping):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value
