"""`python -m zerort.compat.run SCRIPT ARGS...`, or `-m MODULE ARGS...`: the program, in a process
in which `import deepspeed` finds zerort.

So `torchrun ... -m zerort.compat.run train.py` and `accelerate launch -m zerort.compat.run
train.py`. What the program starts inherits the variable ZERORT_AS_DEEPSPEED, so a launcher may be
the program: `python -m zerort.compat.run -m accelerate.commands.launch ... train.py`.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from zerort.compat import deepspeed
from zerort.errors import ZerortError
from zerort_as_deepspeed import VARIABLE, wanted

__all__ = ["main"]

_USAGE = "usage: python -m zerort.compat.run [-m MODULE | SCRIPT] [ARGS...]"


def main(argv: Sequence[str]) -> int | None:
    """Runs the program that `argv` names; returns the status of a command line that names none."""
    by_name = bool(argv) and argv[0] == "-m"
    program = argv[1 if by_name else 0 :]
    if not program or program[0].startswith("-"):
        print(_USAGE, file=sys.stderr)
        return 2
    try:
        deepspeed.install()
    except ZerortError as error:
        print(f"zerort: {error}", file=sys.stderr)
        return 1
    if not wanted():
        os.environ[VARIABLE] = "1"
    sys.argv[:] = program
    if by_name:
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program[0]).resolve().parent)  # as Python does for a script
        runpy.run_path(program[0], run_name="__main__")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
