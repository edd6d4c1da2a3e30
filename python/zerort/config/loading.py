"""From a dict, a file or base64 text to a `Config`: read it, screen its keys, check its values.

Screening follows the table in `keys` and comes first, so that the models see only keys they have;
the problems of both are reported together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from zerort.config.keys import ALIASES, CHOSEN_HERE, KEYS, SECRETS, SIZES, Fate, Key
from zerort.config.model import Config
from zerort.config.problems import (
    Problem,
    expected,
    from_validation,
    printable,
    several,
    shown,
    unknown_key,
)
from zerort.config.reading import ConfigLike, Source, choose, read
from zerort.config.values import bad_numbers, unreadable, walk

__all__ = ["ConfigLike", "describe", "load", "load_part"]

_AUTO = (
    'is "auto", which an integration (the Trainer of transformers, Accelerate) replaces by a '
    "value before it comes here; give a value, or start from that integration"
)
_TO_BE_FILLED = "auto: an integration (the Trainer, Accelerate) gives it a value; else an error"
_ARGUMENTS = ("optimizer.params", "scheduler.params")
"""What no model knows the keys of."""
_DEEPEST = 4
"""Objects within each other in which an "auto" may stand alone."""
_GUESSED = 20
"""Problems with a guess at the name that was meant: each compares with all names."""
_SECTIONS = frozenset(path.rpartition(".")[0] for path in KEYS if "." in path)


def load(
    config: ConfigLike | None = None, args: Any = None, config_params: ConfigLike | None = None
) -> Config:
    """The configuration given in exactly one of `config`, `config_params` and
    `args.deepspeed_config`, or `args.deepscale_config` as it was called once.

    Raises `ConfigError` when none or several are given, when the file cannot be read, and for
    everything that is wrong in it, one line a key: unknown keys, refused features, wrong types and
    ranges, keys that contradict each other.
    """
    source = read(choose(config, args, config_params))
    loaded, problems = _check(source)
    if loaded is None:
        raise several(source.origin, problems)
    return loaded


def load_part(config: ConfigLike, sections: Collection[str]) -> Config:
    """Some `sections` of a configuration, for a use before the rest is known: what is "auto" is as
    if it were left out. Raises `ConfigError` for what is wrong in them.
    """
    data = read(config).data
    chosen = {k: v for k, v in data.items() if _canonical(k) in sections and v != "auto"}
    return load({k: _known(v) for k, v in chosen.items()})


def _known(value: Any, depth: int = _DEEPEST) -> Any:
    if not isinstance(value, Mapping) or not depth:
        return value
    return {key: _known(item, depth - 1) for key, item in value.items() if item != "auto"}


def _without(section: Mapping[str, Any], paths: Collection[str], prefix: str = "") -> Any:
    kept: dict[str, Any] = {}
    for name, value in section.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and any(left.startswith(f"{path}.") for left in paths):
            kept[name] = _without(value, paths, f"{path}.")
        elif path not in paths:
            kept[name] = value
    return kept


def describe(config: ConfigLike) -> list[tuple[str, str, str]]:
    """What each key of a configuration does here: rows of key path, value as JSON, and effect.

    Mistakes are rows too ("error: ..."), so that one reading shows all; an "auto" that is for an
    integration to fill in is none. Raises `ConfigError` when there is nothing to read.
    """
    source = read(config)
    left = [problem.path for problem in _screen(source.data).problems if problem.text == _AUTO]
    wrong = dict.fromkeys(left, _TO_BE_FILLED)
    _, problems = _check(replace(source, data=_without(source.data, left)))
    for problem in problems:
        if problem.path not in left:
            wrong[problem.path] = f"{wrong.get(problem.path, 'error:')} {problem.text}"
    rows = [
        (
            printable(path),
            "(not shown)" if path in SECRETS else shown(value),
            wrong.pop(path, "") or _effect(path, value),
        )
        for path, value in _leaves(source.data)
    ]
    return rows + [
        (printable(path), '"auto"' if path in left else "", text) for path, text in wrong.items()
    ]


def _effect(path: str, value: Any) -> str:
    key = KEYS[_canonical(path)]
    if value == "auto" and key.path in SIZES:
        return "auto: as if it were left out"
    if key.fate is Fate.REFUSED:
        return "off, as it is here anyway"
    return f"ignored: {key.effect}" if key.fate is Fate.IGNORED else key.effect


def _check(source: Source) -> tuple[Config | None, list[Problem]]:
    screened = _screen(source.data)
    problems = source.twice + screened.problems
    try:
        config = Config.model_validate(screened.kept)
    except ValidationError as error:
        known = {problem.path for problem in problems}
        found = from_validation(error, screened.kept)
        return None, problems + [problem for problem in found if problem.path not in known]
    if problems:
        return None, problems
    idle = [f"zero_optimization.{name}" for name in config.zero_optimization.idle]
    config._ignored = (*screened.ignored, *idle)
    config.keep(source.data)
    return config, problems


@dataclass
class _Screened:
    kept: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


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
        key = None if "." in str(name) else KEYS.get(canonical)
        if key is None:
            guess = len(screened.problems) < _GUESSED and "." not in str(name)
            screened.problems.append(unknown_key(path, guess=guess))
        elif canonical in _SECTIONS and key.fate is Fate.SAME and key.harmless(value):
            continue
        elif canonical not in _SECTIONS or key.fate is not Fate.SAME:
            _screen_value(path, value, key, screened, kept)
        elif isinstance(value, Mapping):
            kept[canonical.rpartition(".")[2]] = _screen_section(f"{path}.", value, screened)
        else:
            screened.problems.append(expected(path, "an object", value))
    return kept


def _screen_value(
    path: str, value: Any, key: Key, screened: _Screened, kept: dict[str, Any]
) -> None:
    """Keeps a value for the models, or says what becomes of it."""
    bad = list(unreadable(path, value))
    if not bad and key.fate is not Fate.SAME and key.harmless(value):
        return
    if value == "auto" and key.path in SIZES:
        if key.fate is Fate.IGNORED:
            screened.ignored.append(path)
        return
    if key.path not in CHOSEN_HERE:
        bad = bad or [Problem(where, _AUTO) for where, leaf in walk(path, value) if leaf == "auto"]
    if key.path in _ARGUMENTS:
        bad += bad_numbers(path, value)
    screened.problems += bad
    if key.fate is Fate.SAME:
        kept[key.path.rpartition(".")[2]] = value
    elif key.fate is Fate.IGNORED and not bad:
        screened.ignored.append(path)
    elif not bad:
        screened.problems.append(Problem(path, f"refused: {key.effect} (got {shown(value)})"))


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        path = f"{prefix}{name}"
        if _canonical(path) in _SECTIONS and isinstance(value, Mapping):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value
