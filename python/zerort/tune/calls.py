"""`engine.tune`, and the file that tuning writes."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zerort.config.comments import blanked
from zerort.config.reading import read
from zerort.errors import ConfigError
from zerort.optim import NoOptimizer
from zerort.step.readings import Components
from zerort.tune.feature import Tuning, unfit
from zerort.tune.findings import Findings
from zerort.tune.model import Setting

__all__ = ["TunedFile", "observing"]

_log = logging.getLogger("zerort")


class TunedFile:
    """The changed configuration beside the one at `source`: `train.tuned.json` beside `train.json`.

    Nothing is overwritten, unless it is said. Raises `ConfigError` for a configuration that cannot
    be read and a place that cannot be written, before anything is measured.
    """

    def __init__(self, source: str, path: str | None = None, *, overwrites: bool = False) -> None:
        self.data: Mapping[str, Any] = read(source).data
        given = Path(source)
        if not given.is_file():
            raise ConfigError(f"{source}: expected a file, beside which the tuned one is written")
        self.path = given.with_name(f"{given.stem}.tuned.json") if path is None else Path(path)
        text = given.read_text(encoding="utf-8")
        self.loses_comments = blanked(text) != text
        """Whether what is written lacks comments of the source's."""
        if self.path.exists() and not overwrites:
            raise ConfigError(
                f"{self.path} is there already and is not overwritten: move it away, or name "
                "another file"
            )
        try:
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}") from error

    def write(self, setting: Setting) -> None:
        """In one piece. Raises `OSError`."""
        data = {key: dict(v) if isinstance(v, Mapping) else v for key, v in self.data.items()}
        zero = data.get("zero_optimization")
        if isinstance(zero, dict):
            zero.pop("reduce_bucket_size", None)
        runtime = data.setdefault("zerort", {})
        runtime |= {"bucket_bytes": setting.bucket_bytes, "window": setting.window or "all"}
        if setting.wire is not None:
            runtime["wire"] = setting.wire
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        fresh.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        fresh.replace(self.path)


def observing(parts: Components, steps: int, config: str | None) -> Tuning:
    """What `engine.tune` adds. Raises `ConfigError`."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"engine.tune(steps=...): expected at least one step, got {steps!r}")
    reason = unfit(parts)
    if isinstance(parts.boundary.optimizer, NoOptimizer):
        reason = "the engine only runs forward"
    if reason is not None:
        raise ConfigError(f"engine.tune(): {reason}")
    first = parts.mesh.rank == 0
    file = TunedFile(config) if config is not None and first else None

    def found(findings: Findings) -> None:
        if not first:
            return
        for line in findings.lines():
            _log.info("tune: %s", line)
        if file is not None and findings.changes:
            file.write(findings.proposed)
            lost = "; its comments are not in it" if file.loses_comments else ""
            _log.info("tune: wrote %s%s", file.path, lost)

    return Tuning(parts, steps, found)
