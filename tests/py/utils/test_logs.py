"""Logging by DeepSpeed's names: who logs what, once, at which level, and what memory is taken."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ranks
from logged import log_lines
from terms import engine_over_terms
from zerort import log
from zerort.config import load
from zerort.errors import ConfigError
from zerort.utils import (
    log_dist,
    log_dist_once,
    logger,
    see_memory_usage,
    set_log_level_from_string,
)

GIB = 2**30


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def test_without_a_process_group_everything_is_logged() -> None:
    lines = log_lines()
    log_dist("plain")
    log_dist("to nobody", ranks=[])
    log_dist("to another", ranks=[5])
    assert lines == ["plain", "to nobody", "to another"]


def _chosen(rank: int, world: int) -> list[str]:
    lines = log_lines()
    log_dist("nobody named")
    log_dist("no rank", ranks=[])
    log_dist("first", ranks=[0])
    log_dist("second", ranks=(1,))
    log_dist("every", ranks=[-1])
    log_dist("quiet", ranks=[-1], level=logging.DEBUG)
    for _ in range(3):
        log_dist_once("once", ranks=[0, 1])
        log_dist_once("once", ranks=[0])
    see_memory_usage("not asked for")
    see_memory_usage("memory", force=True)
    return lines


def test_ranks_log_what_names_them_and_memory_is_told_by_the_first() -> None:
    first, second = ranks.run(2, _chosen)
    *spoken, memory = first
    assert spoken == ["[Rank 0] first", "[Rank 0] every", "[Rank 0] once", "[Rank 0] once"]
    assert second == ["[Rank 1] second", "[Rank 1] every", "[Rank 1] once"]
    assert memory.startswith("memory: ")
    assert memory.endswith(" GiB at most")


def test_the_memory_that_is_told_is_this_process_s() -> None:
    lines = log_lines()
    see_memory_usage("before", force=True)
    held = torch.ones(GIB // 4)
    del held
    see_memory_usage("after", force=True)
    before, after = (float(line.split(" GiB")[0].rpartition(" ")[2]) for line in lines)
    assert after - before > 0.5


@pytest.mark.parametrize("name", ["debug", "INFO", "Warning", "error", "CRITICAL"])
def test_a_level_by_its_name_holds_for_a_logger_and_its_handlers(name: str) -> None:
    own = logging.getLogger(f"of a test {name}")
    handler = logging.NullHandler()
    own.addHandler(handler)
    set_log_level_from_string(name, own)
    assert own.level == handler.level == log.LEVELS[name.lower()]
    set_log_level_from_string(name)
    assert logger.level == log.LEVELS[name.lower()]


@pytest.mark.parametrize("name", ["loud", "", "NOTSET"])
def test_a_name_of_no_level_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="log level: expected one of debug, info, "):
        set_log_level_from_string(name)
    with pytest.raises(ConfigError, match="log_level: expected one of debug, info, "):
        load({"log_level": name, "train_batch_size": 1})


def _levels(rank: int, world: int) -> list[Any]:
    found: list[Any] = []
    for level in (None, "ERROR", None, "debug"):
        engine = engine_over_terms({} if level is None else {"log_level": level})
        found.append((engine.log_level(), logger.getEffectiveLevel()))
        engine.destroy()
    return found


def test_the_key_sets_the_level_on_every_rank_and_left_out_changes_nothing() -> None:
    first, second = ranks.run(2, _levels)
    given = [("ERROR", logging.ERROR), (None, logging.ERROR), ("debug", logging.DEBUG)]
    assert first == [(None, logging.INFO), *given]
    assert second == [(None, logging.WARNING), *given]
