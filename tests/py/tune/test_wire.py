"""Alpha and beta: the fit on samples that are known, the measuring on two ranks."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch

import ranks
from zerort.mesh import Mesh, Work, connect
from zerort.mesh.local import LocalComm, LocalControl
from zerort.tune.findings import wire_line
from zerort.tune.fit import Line, Sample, fit
from zerort.tune.wire import Meter, Wire, measure_wire

SIZES = [16 << 10 << 2 * power for power in range(6)]


def samples(alpha, beta, rounds=5, disturbed=lambda index, seconds: seconds):
    exact = [Sample(nbytes, alpha + beta * nbytes) for nbytes in SIZES for _ in range(rounds)]
    return [Sample(n, disturbed(index, seconds)) for index, (n, seconds) in enumerate(exact)]


@pytest.mark.parametrize(("alpha", "beta"), [(2e-3, 4e-8), (5e-5, 1e-9), (0.0, 1e-8), (1e-4, 0.0)])
def test_a_line_without_noise_is_found(alpha, beta):
    found = fit(samples(alpha, beta))
    assert found.alpha == pytest.approx(alpha, rel=1e-6, abs=1e-9)
    assert found.beta == pytest.approx(beta, rel=1e-6, abs=1e-15)


def test_noise_moves_the_figures_by_as_little(alpha=3e-4, beta=8e-9):
    noise = random.Random(7)
    found = fit(samples(alpha, beta, disturbed=lambda _, s: s * noise.uniform(0.95, 1.05)))
    assert found.alpha == pytest.approx(alpha, rel=0.05)
    assert found.beta == pytest.approx(beta, rel=0.05)


def test_samples_that_were_held_up_are_outvoted(alpha=3e-4, beta=8e-9):
    def held_up(index, seconds):
        return seconds + 0.5 if index % 5 in (0, 3) else seconds  # two of the five of each size

    found = fit(samples(alpha, beta, disturbed=held_up))
    assert found.alpha == pytest.approx(alpha, rel=1e-6)
    assert found.beta == pytest.approx(beta, rel=1e-6)


def test_the_fastest_samples_are_not_the_wire_that_a_step_has(alpha=3e-4, beta=8e-9):
    def alone(index, seconds):
        return seconds / 2 if index % 5 in (0, 3) else seconds  # two of the five of each size

    found = fit(samples(alpha, beta, disturbed=alone))
    assert found.alpha == pytest.approx(alpha, rel=1e-6)
    assert found.beta == pytest.approx(beta, rel=1e-6)


def test_one_whole_size_that_was_held_up_is_outvoted(alpha=3e-4, beta=8e-9):
    def held_up(index, seconds):
        return 3 * seconds if index // 5 == 2 else seconds

    found = fit(samples(alpha, beta, disturbed=held_up))
    assert found.seconds(SIZES[-1]) == pytest.approx(alpha + beta * SIZES[-1], rel=0.1)


def test_figures_are_never_negative():
    falling = [Sample(n, 1e-3 - 1e-12 * n) for n in SIZES]
    assert fit(falling).beta == 0.0
    steep = [Sample(n, 1e-8 * (n - SIZES[0] / 2)) for n in SIZES]
    assert fit(steep).alpha == 0.0


def test_one_size_is_no_line():
    with pytest.raises(ValueError, match="two sizes at least, got 1"):
        fit([Sample(1024, 0.1), Sample(1024, 0.2)])


def test_a_line_says_what_a_size_takes_and_its_rate():
    assert Line(1e-3, 1e-8).seconds(10**6) == pytest.approx(0.011)
    assert Line(1e-3, 1e-8).rate == pytest.approx(1e8)
    assert Line(1e-3, 0.0).rate == float("inf")


class SteadyControl(LocalControl):
    """Two ranks, of which the other takes as long."""

    world = 2


Sampled = Callable[..., tuple[list[int], list[Sample]]]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Sampled:
    """Sizes that are asked for and samples of them, on a wire on which a message of so many bytes
    takes `alpha + beta * nbytes` seconds.
    """
    now = [0.0]
    monkeypatch.setattr("zerort.tune.wire.time.perf_counter", lambda: now[0])

    def measure(alpha: float, beta: float, *large: int) -> tuple[list[int], list[Sample]]:
        asked = []

        def start(nbytes: int) -> Callable[[], list[Work]]:
            asked.append(nbytes)

            def run() -> list[Work]:
                now[0] += alpha + beta * nbytes
                return [Work()]

            return run

        meter = Meter(SteadyControl(), LocalComm(torch.device("cpu")))
        return asked, meter.samples(start, *large)

    return measure


def test_sizes_grow_until_one_takes_long_and_no_further(sampled: Sampled) -> None:
    asked, found = sampled(1e-4, 1e-7)
    assert asked == [16384, 65536, 262144, 1048576]  # the last is the first beyond 50 ms
    line = fit(found)
    assert (line.alpha, line.beta) == pytest.approx((1e-4, 1e-7))


@pytest.mark.parametrize(
    ("beta", "large", "last"),
    [
        (5e-8, 0, 1 << 20),  # 52 ms
        (5e-8, 1 << 20, 1 << 20),
        (5e-8, 2 << 20, 4 << 20),
        (5e-8, 64 << 20, 16 << 20),  # 0.2 s, and then 0.8
        (5e-7, 64 << 20, 1 << 20),
    ],
)
def test_sizes_grow_until_messages_are_large_unless_they_take_too_long(
    beta: float, large: int, last: int, sampled: Sampled
) -> None:
    asked, _ = sampled(0.0, beta, large)
    assert asked[-1] == last


def test_sizes_stop_growing_where_a_message_only_says_that_it_is_there(sampled: Sampled) -> None:
    asked, found = sampled(2e-5, 0.0, 2 << 20)
    assert asked[-1] == 4 << 20
    wire = Wire(2, fit(found), Line(1e-3, 1e-9), 1e-3)
    assert wire_line(wire) == (
        "2 ranks: reduce 0.02 ms of any size, gather 1.00 ms + 1000 MB/s, vote 1.00 ms"
    )


def test_three_sizes_are_timed_where_the_first_takes_long(sampled: Sampled) -> None:
    _, found = sampled(0.05, 1e-8)
    line = fit(found)
    assert (line.alpha, line.beta) == pytest.approx((0.05, 1e-8))


def test_a_rank_alone_has_no_wire():
    mesh = Mesh(LocalControl(), torch.device("cpu"), timedelta(seconds=10))
    assert measure_wire(mesh) == Wire(1, Line(0.0, 0.0), Line(0.0, 0.0), 0.0)


def measured(rank, world):
    mesh = connect(timedelta(seconds=30), torch.device("cpu"))
    try:
        wire = measure_wire(mesh)
        left = torch.full((8,), float(rank))
        mesh.shard.all_gather(left).start().wait()  # the groups can be used on
        return wire, left.tolist()
    finally:
        mesh.close()


def test_two_ranks_measure_the_same_figures():
    (first, left), (second, _) = ranks.shared(2, measured)
    assert first == second
    assert first.ranks == 2
    for line in (first.reduce, first.gather):
        assert line.rate > 1e6  # infinite where more bytes took no longer on a busy machine
        assert line.alpha < 1
    assert 0 < first.vote < 1
    assert 0 < first.start_reduce < 1 and 0 < first.start_gather < 1
    assert left == [0.0] * 4 + [1.0] * 4
