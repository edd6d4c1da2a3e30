"""The snippets of docs/features.md run, each with the page's model before it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[3] / "docs" / "features.md").read_text("utf-8")
SECTIONS = {
    title: re.findall(r"```python\n(.*?)```", text, re.S)
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)
}
MODEL = re.findall(r"```python\n(.*?)```", PAGE.split("\n## ")[0], re.S)[0]


if not torch.__version__ >= (2, 7):
    SECTIONS.pop("Compiled autograd")  # refused there, with the version


def test_every_section_has_a_snippet() -> None:
    assert len(SECTIONS) > 0 and all(SECTIONS.values())


@pytest.mark.timeout(120)
def test_the_snippets_run(tmp_path: Path) -> None:
    """All in one process, each section with names of its own."""
    program = "".join(
        f"exec({MODEL + chr(10).join(blocks)!r}, {{'__name__': {title!r}}})\n"
        for title, blocks in SECTIONS.items()
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
