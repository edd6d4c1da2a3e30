"""Communication runs under the backward: shown by the order in which things happen, never by how
long they take.

The layers differ in width and each fills a bucket of its own, so that a collective's size tells
whose it is. A hook registered before the engine's own notes when a gradient arrives.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ranks
import zerort
from tap import tapped

LAYERS = 4
UNIT = 512  # elements; a multiple of what a bucket is padded to, for up to four ranks

Event = tuple[str, int]
"""("gradient" or "launch", layer)."""


class Widths(nn.Module):
    """`LAYERS` vectors, the i-th of (i + 1) x UNIT elements; `order` is the order of their use in
    the forward.

    Autograd works backwards, so their gradients arrive in the opposite order, each of them all
    ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList(
            nn.Parameter(torch.zeros((i + 1) * UNIT)) for i in range(LAYERS)
        )

    def forward(self, order: Sequence[int], x: Tensor | None = None) -> Tensor:
        total = torch.zeros(()) if x is None else x
        for index in order:
            total = total * 1.0 + self.layers[index].sum()
        return total


class Scene:
    """An engine over `Widths`, and what was seen of it."""

    def __init__(
        self,
        window: int | str = "all",
        stage: int = 2,
        then: Callable[[int], object] = lambda layer: None,
    ) -> None:
        model = Widths()
        self.events: list[Event] = []
        for index, parameter in enumerate(model.layers):
            parameter.register_post_accumulate_grad_hook(partial(self._note, index, then))
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 1},
            "zerort": {"window": window, "transport": "gloo"},
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        self.engine, *_ = zerort.initialize(model=model, optimizer=optimizer, config=config)

    def _note(self, layer: int, then: Callable[[int], object], _: Tensor) -> None:
        self.events.append(("gradient", layer))
        then(layer)

    def step(self, order: Sequence[int], x: Tensor | None = None) -> list[Event]:
        """Everything in one step, in the order in which it happened on this rank."""
        self.events.clear()
        reduce_scatter = dist.all_to_all_single

        def launch(recv: Tensor, send: Tensor, **options: Any) -> Any:
            self.events.append(("launch", send.numel() // UNIT - 1))
            return reduce_scatter(recv, send, **options)

        dist.all_to_all_single = launch
        try:
            self.engine.backward(self.engine(order, x))
            self.engine.step()
        finally:
            dist.all_to_all_single = reduce_scatter
        return list(self.events)


def launches(events: list[Event]) -> list[int]:
    return [layer for kind, layer in events if kind == "launch"]


def two_steps(
    rank: int, world: int, orders: list[list[int]], window: int | str
) -> list[list[Event]]:
    scene = Scene(window)
    return [scene.step(orders[rank]) for _ in range(2)]


FORWARD = [0, 1, 2, 3]


def test_red_2_a_bucket_leaves_right_behind_its_last_gradient() -> None:
    for _, events in ranks.shared(2, two_steps, [FORWARD] * 2, "all"):
        assert events == [
            (kind, layer) for layer in (3, 2, 1, 0) for kind in ("gradient", "launch")
        ]


def test_all_buckets_but_the_last_leave_before_the_last_gradient() -> None:
    order = [2, 0, 3, 1]
    for _, events in ranks.shared(3, two_steps, [order] * 3, "all"):
        last = events.index(("gradient", order[0]))
        assert launches(events[:last]) == [1, 3, 0]


def test_the_second_step_launches_in_the_order_that_rank_0_saw_in_the_first() -> None:
    orders = [[2, 0, 3, 1], [0, 1, 2, 3], [3, 2, 1, 0]]
    for first, second in ranks.shared(3, two_steps, orders, "all"):
        assert launches(first) == [3, 2, 1, 0]  # as planned: from the last parameter to the first
        assert launches(second) == [1, 3, 0, 2]


def test_a_gradient_that_comes_out_of_turn_waits_for_the_lists_head() -> None:
    _, ((_, events)) = ranks.shared(2, two_steps, [[0, 1, 2, 3], [3, 2, 1, 0]], "all")
    gradients = [("gradient", layer) for layer in (0, 1, 2, 3)]
    assert events == [*gradients, *(("launch", layer) for layer in (3, 2, 1, 0))]


# ---- SCH-4: at stage 0 a bucket's second collective follows its first


def gathers_of_a_backward(rank: int, world: int) -> list[list[Event]]:
    """What happens in two steps. Rank 0 waits at each gradient until the launches so far are
    complete, rank 1 at the last one only, so that it follows up later.
    """
    launched: list[Any] = []
    starts = {"launch": dist.all_to_all_single, "gather": dist.broadcast}

    def noted(kind: str, *tensors: Tensor, **options: Any) -> Any:
        work = starts[kind](*tensors, **options)
        if kind == "launch":
            launched.append(work)
        elif work is not None and tensors[1] == 0:
            scene.events.append((kind, tensors[0].numel() * world // UNIT - 1))
        return work

    def until_complete(layer: int) -> None:
        end = time.monotonic() + 60
        while (rank == 0 or layer == 0) and not all(work.is_completed() for work in launched):
            assert time.monotonic() < end, "collectives do not end"
            time.sleep(0.001)

    scene = Scene("all", 0, until_complete)
    with (
        mock.patch.object(dist, "all_to_all_single", partial(noted, "launch")),
        mock.patch.object(dist, "broadcast", partial(noted, "gather")),
    ):
        return [scene.step(FORWARD) for _ in range(2)]


def test_sch_4_second_collectives_leave_in_the_backward_in_the_order_of_the_launches() -> None:
    for steps in ranks.run(2, gathers_of_a_backward):
        for events in steps:
            assert [layer for kind, layer in events if kind == "gather"] == [3, 2, 1, 0]
        # from the second step on buckets leave as they fill
        assert steps[1].index(("gather", 2)) < steps[1].index(("launch", 0))


# ---- RED-5: no hook blocks


class Meeting(torch.autograd.Function):
    """The identity. Its backward is the last of all; rank 0's tells rank 1, which has been waiting
    for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, at_the_end: Any) -> Tensor:
        ctx.at_the_end = at_the_end
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.at_the_end()
        return gradient, None


def step_while_the_peer_waits(
    rank: int, world: int, window: int | str, stage: int
) -> tuple[int, list[bool], float]:
    """(launches, completions) of rank 0 at the end of its backward, and a weight afterwards.

    Rank 1 starts no collective before rank 0 has come through all of its hooks.
    """
    scene = Scene(window, stage)
    scene.step(FORWARD)
    seen: list[bool] = []
    with tapped() as calls:

        def tell() -> None:
            if rank == 0:
                seen.extend(
                    call.work.is_completed() for call in calls if call.op == "all_to_all_single"
                )
                dist.send(torch.ones(1), 1)

        if rank == 1:
            dist.recv(torch.zeros(1), 0)
        x = Meeting.apply(torch.zeros((), requires_grad=True), tell)
        scene.step(FORWARD, x)
    return len(seen), seen, float(scene.engine.module.layers[0][0])


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(("window", "launched"), [(1, 1), (2, 2), ("all", LAYERS)])
def test_red_5_no_hook_blocks_when_a_peer_is_late(
    window: int | str, launched: int, stage: int
) -> None:
    (count, completed, weight), (_, _, other) = ranks.shared(
        2, step_while_the_peer_waits, window, stage, timeout=20
    )
    assert (count, completed) == (launched, [False] * launched)
    assert weight == other == -2.0


# ---- what a backward costs beside itself


class Operations(TorchDispatchMode):
    """Counts what reaches torch's dispatcher, whoever asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


LINEARS = 12


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(LINEARS)))


def backward_with_engine(rank: int, world: int, stage: int) -> Counter[str]:
    """Operations of the third backward beyond those of a backward without an engine."""
    x = torch.randn(2, 16)
    model = deep()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 2 * (16 * 16 + 16)},
        "zerort": {"transport": "gloo"},
    }
    engine, *_ = zerort.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config
    )
    for _ in range(2):
        engine.backward(engine(x).sum())
        engine.step()
    loss = engine(x).sum()
    with Operations() as seen:
        engine.backward(loss)
    engine.step()
    loss = deep()(x).sum()
    with Operations() as plain:
        loss.backward()
    return seen.counts - plain.counts


# At stage 0 a sum that has arrived by the end of the backward is sent on; whether one has is a
# matter of time.
SENT_ON = {"c10d.broadcast_.default", "aten.split.Tensor", "aten.slice.Tensor"}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_bucket_costs_the_backward_one_batched_copy_and_one_collective(stage: int) -> None:
    buckets = LINEARS // 2 + 1  # of two layers each, and of one at either end
    for beyond in ranks.shared(2, backward_with_engine, stage):
        steady = {name: count for name, count in beyond.items() if stage > 0 or name not in SENT_ON}
        assert steady.pop("aten.detach.default") <= 2, (
            "the loss that is returned; torch 2.6 counts it twice"
        )
        # No aten._local_scalar_dense among them, which is what .item() is: the host asks no tensor
        # for its value.
        assert steady == {
            "aten._foreach_copy_.default": buckets,
            "c10d.alltoall_base_.default": buckets,
            "aten.div.Tensor": 1,  # the loss that is returned
        }
