"""`zerort doctor` says who answers to DeepSpeed's name, and how that comes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import zerort
import zerort_as_deepspeed
from zerort.cli import main
from zerort_as_deepspeed.version import VERSION

ALIAS = Path(__file__).parents[3] / "compat" / "alias"


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return {one["check"]: one["text"] for one in json.loads(capsys.readouterr().out)["findings"]}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable, and finders that are put back."""
    monkeypatch.delenv("ZERORT_AS_DEEPSPEED", raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))


def test_without_any_it_says_how_zerort_would_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--json"]) == 0
    found = rows(capsys)
    assert found["zerort"].startswith(zerort.__version__)
    assert found["package deepspeed"] == "not installed"
    assert found["ZERORT_AS_DEEPSPEED"] == "not set"
    assert "python -m zerort.compat.run" in found["import deepspeed"]


def test_after_the_variable_zerort_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZERORT_AS_DEEPSPEED", "1")
    zerort_as_deepspeed.start()
    assert main(["doctor", "--quick", "--json"]) == 0
    assert rows(capsys)["import deepspeed"] == f"zerort, as {VERSION}"


def test_the_distribution_that_stands_for_zerort_is_known_as_that(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ALIAS))
    assert main(["doctor", "--quick", "--json"]) == 0
    assert rows(capsys)["package deepspeed"].startswith("stands for zerort")


def test_a_deepspeed_that_may_not_be_hidden_is_named_with_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["doctor", "--quick", "--json"]) == 0
    found = rows(capsys)
    assert found["package deepspeed"].startswith("DeepSpeed, without metadata")
    assert found["import deepspeed"].startswith("DeepSpeed")
    monkeypatch.setenv("ZERORT_AS_DEEPSPEED", "1")
    zerort_as_deepspeed.start()
    assert main(["doctor", "--quick", "--json"]) == 1
    found = rows(capsys)
    assert found["import deepspeed"].startswith("ImportError: a DeepSpeed is installed")
