"""int8 between hosts and full precision inside: what is trained is what a twin trains to the bit,
whatever carries it. Where ranks of different hosts cannot share memory, those of one still do.

Two hosts of two ranks, on one machine.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_int8 import kept, sent
from torch import Tensor

import ranks
import zerort.mesh.shared as shared_memory
from hills import RATE, Hills, Variant, take_step, weights_of
from training import keep
from zerort.errors import CommError
from zerort.mesh.segments import Unshared

WORLD, HOSTS, STEPS = 4, 2, 3
NUMEL = 1024
"""Of the bucket of the first matrix: 960 elements, in multiples of 4 x 128."""


def of(stage: int, transport: str = "gloo", wire: str = "int8") -> Variant:
    runtime = {
        "wire": wire,
        "wire_error_feedback": True if wire == "int8" else "auto",
        "transport": transport,
        "hierarchy": {"inner": 2},
    }
    return Variant(stage, 1, more={"zerort": runtime})


VARIANTS = [of(2), of(0), of(2, "shared"), of(2, "auto")]
PARTED = of(2, "auto")
"""Run where only ranks of one host can share memory."""


def train(rank: int, world: int) -> tuple[list[Tensor], tuple[int, int], str]:
    """The first matrix of each variant; bytes that are shared inside and between hosts where only
    ranks of one host can, and what is said where they must."""
    found = [_trained(variant, rank)[0] for variant in VARIANTS]
    share = shared_memory.share

    def within_a_host(control: Any, *args: Any, **more: Any) -> Any:
        if control.groups.members.ranks not in ((0, 1), (2, 3)):
            raise Unshared("they are on different machines")
        return share(control, *args, **more)

    shared_memory.share = within_a_host  # type: ignore[assignment]
    try:
        weights, engine = _trained(PARTED, rank)
        found.append(weights)
        mesh = engine._parts.mesh
        nbytes = (mesh["inner"].nbytes, mesh["outer"].nbytes)
        with pytest.raises(CommError) as caught:
            _trained(of(2, "shared"), rank)
    finally:
        shared_memory.share = share
    return found, nbytes, str(caught.value)


def _trained(variant: Variant, rank: int) -> tuple[Tensor, Any]:
    engine = variant.engine(rank)
    for step in range(STEPS):
        take_step(engine, step)
    found = weights_of(engine)[0]
    keep(engine)
    return found, engine


@ranks.once(None)
def trained() -> list[Any]:
    return ranks.run(WORLD, train, timeout=90)


def twin(*, gathers: bool) -> Tensor:
    """The first matrix: each place of a host sends its half of what the host has summed."""
    models = [Hills(rank) for rank in range(WORLD)]
    shape = Hills.SHAPES[0]
    residuals = [[torch.zeros(NUMEL // 2) for _ in range(2)] for _ in range(HOSTS)]
    of_sums = [torch.zeros(NUMEL // 2) for _ in range(2)]
    weights = torch.zeros(shape)
    for step in range(STEPS):
        flat = torch.zeros(WORLD, NUMEL)
        for rank, model in enumerate(models):
            model.params[0].data = weights
            model.zero_grad()
            model(step, 0).backward()
            flat[rank, : weights.numel()] = model.params[0].grad.flatten()  # type: ignore[union-attr]
        hosts = [flat[0] + flat[1], flat[2] + flat[3]]
        halves = []
        for place in range(2):
            arrived = []
            for host, summed in enumerate(hosts):
                wanted = summed.chunk(2)[place] + residuals[host][place]
                arrived.append(sent(wanted, HOSTS))
                residuals[host][place] = kept(wanted, arrived[-1], HOSTS)
            half = (arrived[0] + arrived[1]) * (1 / WORLD)
            if gathers:
                wanted = half + of_sums[place]
                half = sent(wanted, HOSTS)
                of_sums[place] = kept(wanted, half, HOSTS)
            halves.append(half)
        total = torch.cat(halves)[: weights.numel()].view(shape)
        weights = weights.sub(total, alpha=RATE)
    return weights


@pytest.mark.parametrize("number", range(len(VARIANTS) + 1))
def test_it_is_what_the_twin_trains_to_the_bit(number: int) -> None:
    variant = [*VARIANTS, PARTED][number]
    expected = twin(gathers=variant.stage == 0)
    for found, _, _ in trained():
        assert torch.equal(found[number], expected), variant


def test_ranks_of_one_host_share_memory_where_hosts_do_not() -> None:
    for _, (inside, between), _ in trained():
        assert inside > 0 and between == 0


def test_hosts_that_have_to_share_memory_and_cannot_are_named() -> None:
    for _, _, said in trained():
        assert "ranks cannot share memory" in said and "they are on different machines" in said
        assert '"auto" goes over gloo then' in said
