"""Prints what pyproject.toml asks for, with extras' own, a line each as pip reads them: so that it
can be installed while the wheel is being built.

    python packaging/requirements.py dev >requirements.txt
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib


def requirements(project: dict[str, object], extras: list[str]) -> Iterator[str]:
    """The project's own, and those of its `extras`, which may name one another."""
    name, optional = project["name"], project["optional-dependencies"]
    for line in [*project["dependencies"], *(line for extra in extras for line in optional[extra])]:
        own = re.fullmatch(rf"{name}\[(.*)\]", line)
        if own:
            yield from requirements({**project, "dependencies": []}, own[1].split(","))
        else:
            yield line


if __name__ == "__main__":
    file = Path(__file__).parents[1] / "pyproject.toml"
    found = requirements(tomllib.loads(file.read_text("utf-8"))["project"], sys.argv[1:])
    print(*dict.fromkeys(found), sep="\n")
