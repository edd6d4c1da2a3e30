"""What a forward returns is looked into for tensors, whatever it is made of; and backwards on
several threads know of one another.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from zerort.grads.hooks import when_backward_reaches
from zerort.grads.tasks import LossScaling, announce

pytestmark = pytest.mark.timeout(60)


class _Refuses(Mapping[str, Any]):
    """Raises when it is looked into; has a tensor as an attribute."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, key: str) -> Any:
        raise LookupError("not now")

    def __iter__(self) -> Iterator[str]:
        yield "first"

    def __len__(self) -> int:
        return 1


def _itself(tensor: Tensor) -> list[Any]:
    found: list[Any] = [tensor]
    found.append(found)
    return found


@pytest.mark.parametrize(
    "hide",
    [_Refuses, _itself, lambda tensor: (range(10**12), tensor), lambda tensor: {"x": {tensor}}],
    ids=["raises", "within itself", "beside a long range", "in a set"],
)
def test_a_tensor_is_found_in_an_output_of_any_kind(hide: Any) -> None:
    tensor = torch.ones(2, requires_grad=True) * 2.0
    reached: list[bool] = []
    when_backward_reaches(hide(tensor), lambda: reached.append(True))
    tensor.sum().backward()
    assert reached == [True]


def test_backwards_on_several_threads_do_not_trip_over_one_another() -> None:
    errors: list[BaseException] = []

    def train() -> None:
        try:
            for _ in range(3000):
                loss = torch.ones(1, requires_grad=True).sum()
                announce(loss, object(), LossScaling(1, 1.0), by_call=True)
                loss.backward()  # type: ignore[no-untyped-call]
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=train) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
