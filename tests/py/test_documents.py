"""The pages say what is there: every message in docs/errors.md is raised somewhere, and every one
raised is in it.

Messages are compared as templates: what is filled in at run time is `…`, in the page as in the
sources.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import zerort
import zerort.errors
from zerort.errors import ZerortError
from zerort.trace.reader import TraceError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MIGRATION = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
OWN = [getattr(zerort.errors, name) for name in zerort.errors.__all__]
CLASSES = [*(kind for kind in OWN if isinstance(kind, type)), TraceError]
LAST = "Not an error, but said"
RAISED = {kind.__name__ for kind in CLASSES} - {"CheckpointError"}
"""What has to be in the page message by message; those of checkpoints are many, and all begin with
their file.
"""


def sections() -> dict[str, list[str]]:
    """Heading -> the phrases of its list."""
    parts = re.split(r"^## (.*)$", PAGE, flags=re.MULTILINE)[1:]
    return {
        heading.strip("`"): re.findall(r"^- `([^`]+)` —", body, re.MULTILINE)
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


def template(node: ast.expr) -> str:
    """The text of a string expression, with `…` for what is filled in; empty for any other
    expression.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[dsrg]|\{\w*\}", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    return ""


def python_trees() -> Iterator[ast.AST]:
    for path in sorted((ROOT / "python").rglob("*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


def texts() -> list[str]:
    """Every string in the sources, as a template."""
    python = [
        template(node)
        for tree in python_trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.expr)
    ]
    rust = [path.read_text(encoding="utf-8") for path in (ROOT / "rust").rglob("*.rs")]
    literals = [
        re.sub(r"\{[^}]*\}", "…", re.sub(r"\\\n\s*", "", text))  # a line may go on in the next
        for source in rust
        for text in re.findall(r'"((?:[^"\\]|\\.)*)"', source, re.DOTALL)
    ]
    return [text for text in python + literals if text]


def raised() -> Iterator[tuple[str, str]]:
    """(class, message) of every error that is made with a text of its own."""
    for tree in python_trees():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in RAISED
                and node.args
            ):
                message = template(node.args[0])
                if re.search(r"\w", message):
                    yield node.func.id, message


def test_every_class_of_error_has_a_section() -> None:
    assert {*sections(), "ZerortError"} == {kind.__name__ for kind in CLASSES} | {LAST}
    assert all(issubclass(kind, ZerortError) for kind in CLASSES)


@pytest.mark.parametrize("section", sections())
def test_every_message_in_the_page_is_in_the_sources(section: str) -> None:
    known = texts()
    missing = [
        phrase for phrase in sections()[section] if not any(phrase in text for text in known)
    ]
    assert missing == []


def test_every_message_that_is_raised_is_in_the_page_under_its_class() -> None:
    told = sections()
    missing = [
        (kind, message)
        for kind, message in raised()
        if not any(phrase in message for phrase in told[kind])
    ]
    assert missing == []


def test_every_class_names_the_built_in_that_it_is() -> None:
    for kind in CLASSES:
        if kind is not ZerortError:
            body = PAGE.split(f"## `{kind.__name__}`")[1].split("\n## ")[0]
            parents = {base.__name__ for base in kind.__mro__[1:]} - {
                "ZerortError",
                "object",
                "Exception",
                "BaseException",
            }
            assert any(f"`{name}`" in body.split("- `")[0] for name in parents), kind


# ---- the table of calls in docs/migration.md

ROW = re.compile(r"^\| `(\w+)(\([^`]*\))?` \| (\w+) \| (.*) \|$")


def calls(section: str) -> dict[str, tuple[list[str] | None, str]]:
    """Name -> (parameters or None for an attribute, fate) of the table between the comments that
    name `section`.
    """
    table = MIGRATION.split(f"<!-- {section} -->\n")[1].split(f"<!-- end of {section} -->")[0]
    rows = [ROW.match(line) for line in table.strip().splitlines()[2:]]
    assert all(rows), "a row that has another form"
    found = {}
    for row in filter(None, rows):
        name, parameters, fate, _ = row.groups()
        found[name] = (None if parameters is None else re.findall(r"\w+", parameters), fate)
    assert len(found) == len(rows), "a name stands in the table twice"
    return found


@pytest.mark.parametrize(("section", "owner"), [("engine", zerort.Engine), ("module", zerort)])
def test_what_the_page_calls_the_same_is_there_with_its_parameters(
    section: str, owner: object
) -> None:
    same = {
        name: parameters for name, (parameters, fate) in calls(section).items() if fate == "same"
    }
    assert len(same) > 2
    for name, parameters in same.items():
        if parameters is not None:
            signature = inspect.signature(getattr(owner, name))
            assert [p for p in signature.parameters if p != "self"][
                : len(parameters)
            ] == parameters, name
        elif name not in ("module", "device"):
            assert isinstance(inspect.getattr_static(owner, name), property), name


@pytest.mark.parametrize("section", ["engine", "module"])
def test_a_call_is_the_same_or_differs_or_is_refused_and_what_is_refused_is_not_there(
    section: str,
) -> None:
    there = dir(zerort.Engine) if section == "engine" else zerort.__all__
    for name, (_, fate) in calls(section).items():
        assert fate in ("same", "differs", "absent"), name
        assert fate != "absent" or name not in there, f"{name} is there: say so"


# ---- docs/architecture.md


def layers() -> dict[str, int]:
    """Module -> the line of the picture it stands on."""
    text = ARCHITECTURE.split("<!-- import order -->")[1].split("<!-- end of import order -->")[0]
    lines = text.strip().strip("`").split("\n")
    return {name: number for number, line in enumerate(lines) for name in line.split()}


def imports() -> Iterator[tuple[str, str]]:
    """(module, what it imports) among zerort's own, packages as one."""
    package = ROOT / "python" / "zerort"
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "zerort":
                names = (node.module or "").split(".")[1:2] or [alias.name for alias in node.names]
                yield from ((module, name) for name in names if name != module)


def test_imports_go_one_way_as_the_picture_shows() -> None:
    line = layers()
    wrong = [
        (a, b) for a, b in imports() if a != "__init__" and not line.get(b, 99) < line.get(a, -1)
    ]
    assert wrong == []


def test_the_picture_of_imports_has_every_file() -> None:
    package = ROOT / "python" / "zerort"
    files = {path.stem for path in package.iterdir() if path.suffix in (".py", ".pyi")}
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    assert files | packages == layers().keys() | {"__init__"}


@pytest.mark.parametrize(
    "page", sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]), ids=lambda page: page.name
)
def test_files_that_a_page_links_to_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
