"""The example with a model and a validation so small that a step takes milliseconds.

    python small_example.py OPTIONS...     train_text.py's own

With STAND in the environment, rank 1 stands behind that step until it is killed, and rank 0 waits
for it in the next one: however fast the machine, a run that is to be stopped is not over before.
Ranks that torchrun has started anew stand nowhere.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_text.py"
sys.path.insert(0, str(EXAMPLE.parent))

import train_text  # noqa: E402


class Standing(train_text.Progress):
    def advance(self, engine: Any, *args: Any, **more: Any) -> None:
        super().advance(engine, *args, **more)
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        stand = int(os.environ.get("STAND", "-1"))
        if os.environ["RANK"] == "1" and not again and engine.global_steps == stand:
            time.sleep(600)


def main() -> None:
    train_text.VALIDATION_WINDOWS, train_text.SAMPLE_BYTES = 2, 2
    train_text.Shape = partial(train_text.Shape, context=32, width=32, depth=2)
    train_text.Progress = Standing
    train_text.main()


if __name__ == "__main__":
    main()
