"""Files as they lie in public repositories and as integrations write them: comments, trailing
commas, numbers in the spellings of others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zerort.config import describe, load
from zerort.config.comments import blanked
from zerort.errors import ConfigError

FILE = """\
// what is computed
{
  "train_batch_size": 8, # over all ranks
  /* two lines
     of it */ "bf16": {"enabled": true,},
  "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95,], "lr": 1e-4,}}, // the rate
}
"""


def read(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    return load(path)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    return str(caught.value)


def test_comments_and_trailing_commas_are_read_over(tmp_path: Path) -> None:
    config = read(tmp_path, FILE)
    assert (config.train_batch_size, config.bf16.enabled) == (8, True)
    assert config.optimizer.params == {"betas": [0.9, 0.95], "lr": 1e-4}


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    assert read(tmp_path, '\ufeff{"train_batch_size": 8}').train_batch_size == 8
    assert read(tmp_path, "\ufeff" + FILE).train_batch_size == 8


@pytest.mark.parametrize(
    "text", ['{"a": "x // y"}', '{"a": "# /* */ ,]"}', '{"a": "\\"//,}"}', '{"a": "\\\\"}']
)
def test_nothing_inside_a_string_is_blanked(text: str) -> None:
    assert blanked(text) == text
    assert json.loads(blanked(f"{text[:-1]},}} // {text}")) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ('{\n// one\n"a": tru}', 3, 6),
        ('{ /* a */ "a": tru}', 1, 16),
        ('{"a": 1,\n/* never closed }', 2, 1),
        ('{"a": [,]}', 1, 8),
        ('{"a": [1,,]}', 1, 10),
        ("{,}", 1, 2),
        ('{"a": 1 /, }', 1, 9),
        ("{'a: 1}", 1, 2),
        ("{a 1}", 1, 2),
        ("// only this", 1, 13),
    ],
)
def test_what_is_left_is_strict_and_errors_keep_the_lines_of_the_file(
    tmp_path: Path, text: str, line: int, column: int
) -> None:
    message = refusal(tmp_path, text)
    assert f"at line {line}, column {column}; nor HJSON: " in message.partition("not JSON: ")[2]


@pytest.mark.parametrize(
    "text",
    ["/*" * 10**6, '"' * 10**6, '"\\"' * 10**6, "," * 10**6, ", " * 10**6 + "]", "[" * 10**6],
)
@pytest.mark.timeout(20)
def test_hostile_text_takes_no_more_time_than_its_length(tmp_path: Path, text: str) -> None:
    assert "ds.json: " in refusal(tmp_path, text)


# Numbers


@pytest.mark.parametrize("text", ["Infinity", "1e400", "9" * 5000, "null"])
def test_progress_every_infinity_steps_is_none(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f'{{"steps_per_print": {text}}}').steps_per_print is None
    assert load({"steps_per_print": float("inf")}).steps_per_print is None


@pytest.mark.parametrize(
    ("section", "key", "given", "read_as"),
    [
        (None, "steps_per_print", 1e12, 10**12),
        (None, "train_batch_size", 1e5, 100_000),
        (None, "gradient_accumulation_steps", 4.0, 4),
        ("zero_optimization", "reduce_bucket_size", 5e8, 500_000_000),
        ("zero_optimization", "reduce_bucket_size", "5e8", 500_000_000),
        ("zero_optimization", "stage", "2", 2),
        ("fp16", "initial_scale_power", "12", 12),
        ("fp16", "loss_scale", "128", 128.0),
        ("fp16", "hysteresis", 2.0, 2),
        ("zerort", "window", 2.0, 2),
    ],
)
def test_whole_floats_are_integers_and_deepspeeds_own_models_read_text_as_numbers(
    section: str | None, key: str, given: Any, read_as: Any
) -> None:
    config = load({section: {key: given}} if section else {key: given})
    value = getattr(getattr(config, section) if section else config, key)
    assert value == read_as
    assert type(value) is type(read_as)


@pytest.mark.parametrize(
    ("section", "key", "given"),
    [
        (None, "steps_per_print", -float("inf")),
        (None, "steps_per_print", "10"),
        (None, "train_batch_size", "8"),
        (None, "train_batch_size", float("inf")),
        (None, "gradient_clipping", "1.0"),
        (None, "gradient_clipping", float("inf")),
        ("zero_optimization", "stage", "two"),
        ("zero_optimization", "stage", "1.5"),
        ("zero_optimization", "reduce_bucket_size", "1e999"),
        ("fp16", "enabled", "true"),
        ("zerort", "timeout", "300"),
    ],
)
def test_elsewhere_types_are_strict(section: str | None, key: str, given: Any) -> None:
    path = f"{section}.{key}" if section else key
    with pytest.raises(ConfigError, match=f"configuration: {path}: expected "):
        load({section: {key: given}} if section else {key: given})


# Keys


def test_a_key_with_a_dot_is_no_path() -> None:
    assert describe({"fp16.enabled": True}) == [("fp16.enabled", "true", "error: unknown key")]
    with pytest.raises(ConfigError, match=r"configuration: fp16\.enabled: unknown key$"):
        load({"fp16.enabled": True})


def test_a_key_given_twice_is_named_with_its_section(tmp_path: Path) -> None:
    text = '{"optimizer": {"type": "SGD", "params": {"lr": 1, "lr": 2}}}'
    assert refusal(tmp_path, text).endswith("ds.json: optimizer.params.lr: given twice")


def test_a_key_that_no_terminal_can_show_is_escaped(tmp_path: Path) -> None:
    message = refusal(tmp_path, '{"a\\nb\\ud800": 1}')
    assert message.endswith(r"ds.json: a\nb\ud800: unknown key")
    message.encode()
