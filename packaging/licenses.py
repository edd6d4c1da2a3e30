"""THIRD-PARTY-LICENSES: the licence texts of all that is compiled into the wheel.

`python packaging/licenses.py` writes the file, `--check` compares it with what Cargo.lock says now.
It holds every crate that the library links, on any platform: no build script, no macro, no test.
Their sources are where cargo has put them for the build, so nothing is downloaded.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "THIRD-PARTY-LICENSES"
NAMES = re.compile(r"(licen[cs]e|copying|copyright|notice|unlicense)", re.IGNORECASE)
HEAD = """\
zerort is licensed under the Apache License 2.0, see LICENSE. Its library zerort._core contains the
crates below, each under the licence named, and Rust's standard library (MIT OR Apache-2.0, The Rust
Project Developers, https://github.com/rust-lang/rust). Made by packaging/licenses.py.
"""


def linked() -> list[dict[str, Any]]:
    """The packages whose code is in the library, by name and version."""
    text = subprocess.run(
        ["cargo", "metadata", "--format-version=1", "--locked"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    metadata = json.loads(text)
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    (top,) = (key for key, package in packages.items() if package["name"] == "zerort-py")
    found, stack = set(), [top]
    while stack:
        key = stack.pop()
        if key in found or _is_macro(packages[key]):
            continue
        found.add(key)
        for dependency in nodes[key]["deps"]:
            if any(kind["kind"] is None for kind in dependency["dep_kinds"]):
                stack.append(dependency["pkg"])
    foreign = [packages[key] for key in found if packages[key]["source"] is not None]
    return sorted(foreign, key=lambda package: (package["name"], package["version"]))


def _is_macro(package: dict[str, Any]) -> bool:
    return any("proc-macro" in target["kind"] for target in package["targets"])


def text_of_all() -> str:
    """What the file has to hold."""
    lists, texts = [], defaultdict(list)
    for package in linked():
        name = f"{package['name']} {package['version']}"
        lists.append(f"  {name}: {package['license']}")
        folder = Path(package["manifest_path"]).parent
        files = [path for path in folder.iterdir() if path.is_file() and NAMES.match(path.name)]
        if not files:
            raise SystemExit(f"{name} brings no licence text; look at {package['repository']}")
        for path in sorted(files):
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n").strip()
            if name not in texts[text]:
                texts[text].append(name)
    parts = [HEAD, "\n".join(lists) + "\n"]
    for text, names in texts.items():
        parts.append(f"{'-' * 100}\nOf {', '.join(names)}:\n\n{text}\n")
    return "\n".join(parts)


def main() -> int:
    """Writes or compares; returns the exit status."""
    wanted = text_of_all()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(wanted, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != wanted:
        print("THIRD-PARTY-LICENSES is not what Cargo.lock says: run packaging/licenses.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
