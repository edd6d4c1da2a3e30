"""One thread for torch in the parent as in every rank, so that the twin's kernels round as the
ranks' do. Drawn tests ask for results and not for speed: no example has a deadline.

A GPU is out of sight, so that tests find the same on every machine, unless it is asked for by
`-m gpu`, which puts all ranks on it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from turns import turn

torch.set_num_threads(1)
settings.register_profile("results", deadline=None)
settings.load_profile("results")


def pytest_configure(config: pytest.Config) -> None:
    """Before a test is imported, and before torch has looked for a device."""
    if config.option.markexpr == "gpu":
        os.environ["ZERORT_TEST_DEVICE"] = "cuda"
    if os.environ.get("ZERORT_TEST_DEVICE") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _one_of_each_name()


def _one_of_each_name() -> None:
    """The rooms are no packages: of two files of one name pytest would leave the second one out,
    and say so when all else is done.
    """
    files = sorted(Path(__file__).parent.rglob("test_*.py"))
    names = [file.name for file in files]
    twice = [str(file) for file in files if names.count(file.name) > 1]
    if twice:
        raise pytest.UsageError(f"files of tests have to differ in name: {', '.join(twice)}")


@pytest.fixture(autouse=True, scope="module")
def shared_ranks() -> Iterator[None]:
    """Ends, with a file's tests, the ranks that they shared."""
    yield
    import ranks  # which reads the environment

    ranks.end_shared()


@pytest.fixture
def own_ranks() -> Iterator[None]:
    """For a test that starts two ranks by other ways than ranks.py: it has their turn."""
    with turn():
        yield
