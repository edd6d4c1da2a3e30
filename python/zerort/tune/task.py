"""What `zerort tune` asks of the processes that it starts: a variable of the environment, which the
engine reads when it is made.

The variable has JSON: where the findings go, how many steps are observed, and, in the second run,
the setting that is to be measured, which takes the place of what the program's own configuration
says of it. So the program's command line and files stay as they are, and a configuration that it
builds itself is tuned too.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zerort.config import Config
from zerort.errors import ConfigError
from zerort.tune.model import Setting

__all__ = ["VARIABLE", "Task", "overridden"]

VARIABLE = "ZERORT_TUNE"


@dataclass(frozen=True)
class Task:
    """Of one run of a program."""

    findings: str
    """File that rank 0 writes."""
    steps: int
    setting: Setting | None = None
    """What is measured; None measures what is configured."""

    @classmethod
    def given(cls) -> Task | None:
        """By the environment, if it is. Raises `ConfigError`."""
        text = os.environ.get(VARIABLE)
        if not text:
            return None
        try:
            read: dict[str, Any] = json.loads(text)
            setting = read.get("setting")
            return cls(
                str(read["findings"]), int(read["steps"]), Setting(**setting) if setting else None
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{VARIABLE}: expected what the command zerort tune writes into it, got {text!r}: "
                f"{type(error).__name__}: {error}; unset it"
            ) from error

    def environment(self) -> dict[str, str]:
        """Of a program that does it."""
        return {**os.environ, VARIABLE: json.dumps(asdict(self))}

    def write(self, state: str, **found: Any) -> None:
        """Says how far it has come, in one piece. Raises `OSError`."""
        path = Path(self.findings)
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_text(json.dumps({"state": state, **found}), encoding="utf-8")
        fresh.replace(path)


def overridden(config: Config) -> Config:
    """`config` with the setting that is to be measured, where the environment asks for one."""
    task = Task.given()
    if task is None or task.setting is None:
        return config
    return task.setting.applied(config)
