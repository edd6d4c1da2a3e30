"""HJSON, as DeepSpeed's files may be: what is read, what is text, and what is refused."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerort.config import hjson, load
from zerort.errors import ConfigError

# What a writer of HJSON makes of a dict: no quotes, no commas, text in the rest of the line.
WRITTEN = """\
{
  train_batch_size: 8   # over all ranks
  optimizer:
  {
    type: AdamW
    params:
    {
      lr: 0.00015
      betas:
      [
        0.9
        0.95
      ]
    }
  }
  bf16: {enabled: true}
  'zero_optimization': {"stage": 2, // gradients too
    "reduce_bucket_size": 5e8,},
  steps_per_print: Infinity
  csv_monitor: {
    job_name: a run of
    output_path:
      '''
      logs
        of it
      '''
  }
}
"""


def loads(text: str) -> Any:
    return hjson.loads(text, object_pairs_hook=dict)


def read(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    return load(path)


def test_a_file_as_writers_of_hjson_make_them_is_read(tmp_path: Path) -> None:
    config = read(tmp_path, WRITTEN)
    assert (config.train_batch_size, config.bf16.enabled) == (8, True)
    assert config.optimizer.type == "AdamW"
    assert config.optimizer.params == {"lr": 0.00015, "betas": [0.9, 0.95]}
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert config.csv_monitor.job_name == "a run of"
    assert config.csv_monitor.output_path == "logs\n  of it"
    assert config.steps_per_print is None


def test_the_same_file_is_read_from_base64_and_without_its_braces(tmp_path: Path) -> None:
    encoded = base64.urlsafe_b64encode(WRITTEN.encode()).decode()
    assert load(encoded) == read(tmp_path, WRITTEN)
    assert read(tmp_path, WRITTEN.strip()[1:-1]) == read(tmp_path, WRITTEN)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)  # fmt: skip


@given(value=st.dictionaries(st.text(max_size=9), values), indent=st.sampled_from([None, 1]))
def test_whatever_is_json_means_the_same_in_hjson(
    value: dict[str, Any], indent: int | None
) -> None:
    assert loads(json.dumps(value, indent=indent)) == value
    assert loads(json.dumps(value, indent=indent, ensure_ascii=False)) == value


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1", 1),
        ("-0.5e-3 // rate", -0.0005),
        ("5e8,", 5e8),
        ("true # so", True),
        ("null", None),
        ("tru", "tru"),
        ("true story", "true story"),
        ("1 000", "1 000"),
        ("01", "01"),
        ("1e", "1e"),
        ("./logs, // all", "./logs, // all"),
        ("'single \"and\" it\\'s'", 'single "and" it\'s'),
        ('"a\\u0041\\n" # c', "aA\n"),
        ("''''", ""),
        ("'''one line'''", "one line"),
        ("'''\n         two\n           lines\n         '''", "two\n  lines"),
        ("[\n a\n b\n 1, 2]", ["a", "b", 1, 2]),
        ("[]", []),
        ("{}", {}),
    ],
)
def test_what_stands_without_quotes_is_text_unless_it_is_a_literal(
    written: str, meant: Any
) -> None:
    if written == "''''":
        written = "''"
    found = loads(f"{{\n    key: {written}\n    after: 1}}")
    assert found == {"key": meant, "after": 1}
    assert type(found["key"]) is type(meant)


def test_not_a_number_and_infinity_are_what_json_calls_them() -> None:
    found = loads("a: NaN\nb: -Infinity\nc: Infinity")
    assert math.isnan(found["a"])
    assert (found["b"], found["c"]) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{train_batch_size: 8", "Expecting property name at line 1, column 21"),
        ("train_batch_size 8", "Expecting ':' delimiter at line 1, column 18"),
        ("{a: [1, 2}", "Expecting value at line 1, column 10"),
        ("{a: ,}", "Expecting value at line 1, column 5"),
        ("{a: 1}\n}", "Extra data at line 2, column 1"),
        ("a: 1\nb: 'never closed\nc: 1", "Unterminated string starting at at line 2, column 4"),
        ("a: '''never\nclosed", "Unterminated string starting at at line 1, column 4"),
        ('a: "\\x"', "Invalid \\escape at line 1, column 4"),
        ("[a: 1}", "Expecting value at line 1, column 7"),
        ("", "Expecting value at line 1, column 1"),
    ],
)
def test_what_is_neither_says_where_it_is_no_hjson(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert str(caught.value).endswith(f"; nor HJSON: {message}")


def test_text_where_a_switch_is_expected_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'fp16\.enabled: expected true or false, got "tru"'):
        read(tmp_path, "fp16: {\n enabled: tru\n}")


def test_a_key_given_twice_is_an_error_in_hjson_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.type: given twice"):
        read(tmp_path, "optimizer: {\n type: Adam\n type: SGD\n}")


@pytest.mark.parametrize(
    "text",
    [
        "a:" * 10**6,
        "a: '" * 10**5,
        "'''" * 10**6,
        "{a:\n" * 10**5,
        "1 " * 10**6,
        "a: 1" + " " * 10**6,
    ],
)
@pytest.mark.timeout(20)
def test_hostile_hjson_takes_no_more_time_than_its_length(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        read(tmp_path, text + "\n]")
