"""`zerort simulate`: a recorded or a planned step on other ranks and wires."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from fake_device import FakeDevice, FakeEvent
from zerort.cli import main
from zerort.errors import ConfigError
from zerort.simulate import Cluster, Point, Subject, at, of_model, of_trace
from zerort.simulate.quantities import Wire, bandwidth, flops, nanoseconds, scales, wire
from zerort.trace import BucketLife, ChromeSink
from zerort.trace.reader import TraceError

SLOW = Wire(alpha=20_000.0, beta=125e6)


def record(
    path: Path, *, facts: dict[str, str | int], backward: bool = True, dtype: str = "f32"
) -> Path:
    """Three steps of 20 ms of forward and 40 of backward, into which falls a wait of 5; two
    buckets, of 4 and 2 parameters, are full behind 10 and 40 ms of computing.
    """
    sink, device = ChromeSink(path, 0, 1000), FakeDevice()
    sink.about(facts)
    sink.on_device(device.record)
    for number in range(3):
        began = device.at_ms
        with sink.range("forward"):
            device.at_ms += 20
        if backward:
            with sink.range("backward"):
                device.at_ms += 20
                start = sink.mark()
                device.at_ms += 5
                sink.wait(start, sink.mark())
                device.at_ms += 20
        for bucket, first, full, landed, params in ((0, 22, 30, 60, 4), (1, 35, 65, 80, 2)):
            offsets = (first, full, full, landed, landed + 2)
            moments = BucketLife(*(FakeEvent(device, began + offset) for offset in offsets))
            sink.life(bucket, moments, bytes=4096 * params, dtype=dtype, params=params)
        with sink.range("optimizer"):
            device.at_ms += 10
        device.at_ms = began + 100
        sink.step(number + 1)
    sink.close()
    return path


CPU = {"world": 2, "stage": 1, "device": "cpu", "micro_batches": 1}


def test_a_trace_says_what_was_computed_without_what_was_waited_for(tmp_path: Path) -> None:
    subject = of_trace(record(tmp_path / "trace.json", facts=dict(CPU)))
    assert (subject.forward_ns, subject.backward_ns) == pytest.approx((20e6, 40e6), rel=1e-4)
    assert subject.stage == 1 and subject.blocks
    assert subject.measured == (2, pytest.approx(100, rel=1e-4))
    # the second bucket is registered first; its last gradient comes at the backward's end
    assert subject.numels == [1024] * 6
    assert subject.arrivals[0] == pytest.approx(40e6, rel=1e-4)
    assert subject.arrivals[2:] == pytest.approx([10e6, 8e6, 6e6, 4e6], rel=1e-3)
    assert subject.update_element_ns * subject.numel / 2 == pytest.approx(10e6, rel=1e-4)
    assert subject.sum_byte_ns * subject.nbytes == pytest.approx(4e6, rel=1e-3)


def test_on_a_device_a_gradient_is_there_when_its_bucket_leaves(tmp_path: Path) -> None:
    path = record(tmp_path / "trace.json", facts={**CPU, "device": "cuda"})
    subject = of_trace(path)
    assert not subject.blocks and subject.sum_byte_ns == 0
    assert max(subject.arrivals) == pytest.approx(40e6, rel=1e-4)


def test_what_was_recorded_is_predicted_on_the_wire_that_it_ran_on(tmp_path: Path) -> None:
    subject = of_trace(record(tmp_path / "trace.json", facts=dict(CPU)))
    nothing = Cluster(Wire(alpha=0.0, beta=1e18))
    step = at(subject, nothing, 2, 1).step_ms
    # all but the 5 ms of waiting
    assert step == pytest.approx(95, rel=0.01)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: record(path, facts={}, backward=False), "holds no backward"),
        (lambda path: path.write_text("{}") and path, "not a trace"),
        (lambda path: path.write_text("no JSON") and path, "not a trace"),
        (lambda path: path, "cannot be read"),
    ],
)
def test_what_is_no_trace_of_a_training_is_refused_by_name(
    make: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / "trace.json")  # type: ignore[operator]
    with pytest.raises(TraceError, match=words):
        of_trace(path)
    line = ["simulate", "--trace", str(path), "--ranks", "2", "--wire", "alpha=1us,beta=1GB/s"]
    assert main(line) == 2
    out, err = capsys.readouterr()
    assert not out and words in err and len(err.splitlines()) == 1


def subject(numels: list[int] | None = None, **given: object) -> Subject:
    numels = numels or [1 << 20] * 32
    arrivals = [40_000_000 * (len(numels) - i) // len(numels) for i in range(len(numels))]
    about: dict[str, object] = {"forward_ns": 20_000_000, "backward_ns": 40_000_000, **given}
    return Subject("it", numels, ["bf16"] * len(numels), arrivals, **about)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", range(4))
def test_no_fixed_size_is_faster_than_the_chosen_one(stage: int) -> None:
    for ranks in (1, 2, 8, 48):
        point = at(subject(), Cluster(SLOW), ranks, stage)
        assert min(point.lost_ms.values()) >= 0, point
        assert point.step_ms >= 60


def test_one_bucket_for_all_loses_what_could_have_been_hidden() -> None:
    point = at(subject(), Cluster(Wire(alpha=20_000.0, beta=2e9)), 8, 2)
    # 64 MiB at 2 GB/s, of which nothing is sent before the backward's end
    assert point.lost_ms["5e8 elements"] == pytest.approx(29, abs=3)
    assert point.lost_ms["25 MiB"] < point.lost_ms["5e8 elements"]
    assert point.bucket_nbytes < 25 << 20


def test_memory_and_bytes_follow_the_stage() -> None:
    points = [at(subject(), Cluster(SLOW), 8, stage) for stage in range(4)]
    memory = [point.memory_nbytes for point in points]
    assert memory[0] > 2 * memory[1] >= 2 * memory[2]
    assert memory[0] > 18 * 32 * (1 << 20)  # replicated: parameter, master, sum, Adam's two
    model = 2 * 32 * (1 << 20)
    # the algorithm that is cheapest here sends no byte twice: 7/8 to reduce, and as much to publish
    assert [point.sent_nbytes / model for point in points] == pytest.approx([7 / 4] * 4, rel=0.01)


def test_within_hosts_what_is_reduced_is_less_between_them() -> None:
    inner = Wire(alpha=1000.0, beta=100e9)
    flat = at(subject(), Cluster(SLOW), 16, 2)
    nested = at(subject(), Cluster(SLOW, inner, hosts=2), 16, 2)
    assert nested.step_ms < flat.step_ms / 4
    with pytest.raises(ConfigError, match="spread evenly over 3 hosts"):
        at(subject(), Cluster(SLOW, inner, hosts=3), 16, 2)


def test_a_narrower_wire_format_sends_half() -> None:
    wide = at(subject(), Cluster(SLOW, wire_format="fp32"), 8, 0)
    narrow = at(subject(), Cluster(SLOW, wire_format="bf16"), 8, 0)
    assert wide.sent_nbytes == pytest.approx(2 * narrow.sent_nbytes)
    assert wide.step_ms > narrow.step_ms


def test_updated_parameters_are_waited_for_where_the_engine_would(stage: int = 1) -> None:
    host = subject(blocks=True)

    def step(wish: str, of: Subject = host, stage: int = stage, wire: Wire = SLOW) -> Point:
        return at(of, Cluster(wire, publish=wish), 2, stage)  # type: ignore[arg-type]

    within, beside, auto = (step(wish) for wish in ("step", "overlapped", "auto"))
    assert (within.overlapped, beside.overlapped, auto.overlapped) == (False, True, True)
    assert beside.step_ms == auto.step_ms
    # 64 MiB at 125 MB/s: the next forward hides as much as it is long
    assert within.step_ms - beside.step_ms == pytest.approx(20, rel=0.15)
    assert within.publish_ms - beside.publish_ms == pytest.approx(20, rel=0.15)
    # little to win, an accelerator whose host does not see what waiting costs, nothing published
    assert not step("auto", wire=Wire(alpha=1000.0, beta=1e11)).overlapped
    assert step("overlapped", wire=Wire(alpha=1000.0, beta=1e11)).overlapped
    assert not step("auto", subject()).overlapped and step("overlapped", subject()).overlapped
    assert not step("overlapped", stage=0).overlapped
    assert not step("overlapped", stage=3).overlapped


def test_a_trace_says_who_waited_for_updated_parameters_and_the_line_may_say_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record(tmp_path / "trace.json", facts={**CPU, "publish": "step"})
    assert (
        of_trace(record(tmp_path / "old.json", facts={**CPU, "publish": "odd"})).publish == "auto"
    )
    slow = ["--wire", "alpha=1ms,beta=1MB/s"]
    given = ["simulate", "--trace", str(path), "--ranks", "2", *slow, "--json"]
    found = {}
    for more in ([], ["--publish", "auto"]):
        assert main([*given, *more]) == 0
        document = json.loads(capsys.readouterr().out)
        found[document["publish"]] = document["points"][0]["overlapped"]
        said = [note for note in document["notes"] if note.startswith("publish: ")]
        assert len(said) == 1 and f'"{document["publish"]}"' in said[0]
    assert found == {"step": False, "auto": True}


def test_a_model_computes_as_its_parameters_and_tokens_say() -> None:
    made = of_model("models:mlp", "bf16", tokens=1000, flops=1e12, stage=2, micro_batches=1)
    assert made.forward_ns == round(2 * made.numel * 1000 / 1e12 * 1e9)
    assert made.backward_ns == round(4 * made.numel * 1000 / 1e12 * 1e9)
    assert max(made.arrivals) == made.arrivals[0] == made.backward_ns


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (nanoseconds, "20us", 20e3),
        (nanoseconds, "20 µs", 20e3),
        (nanoseconds, "1.5ms", 1.5e6),
        (nanoseconds, "0ns", 0.0),
        (nanoseconds, "2s", 2e9),
        (bandwidth, "25GB/s", 25e9),
        (bandwidth, "200Mbit/s", 25e6),
        (bandwidth, "1GiB/s", 2.0**30),
        (bandwidth, "100Gb/s", 12.5e9),
        (flops, "400TFLOP/s", 4e14),
        (flops, "1.2PFLOPS", 1.2e15),
        (scales, "2..16", [2, 4, 8, 16]),
        (scales, "3..20", [3, 6, 12, 20]),
        (scales, "64", [64]),
        (scales, "8,2..4", [2, 4, 8]),
        (wire, "alpha=20us,beta=25GB/s", Wire(20e3, 25e9)),
        (wire, "beta=1GB/s, alpha=0us, algorithm=ring", Wire(0.0, 1e9, "ring")),
    ],
)
def test_quantities_are_read(read: object, text: str, value: object) -> None:
    assert read(text) == value  # type: ignore[operator]


@pytest.mark.parametrize(
    ("read", "text"),
    [
        *(
            (nanoseconds, text)
            for text in ("20", "-1us", "us", "1h", "nanus", "infs", "1e999s", "")
        ),
        *((bandwidth, text) for text in ("25GB", "25 gb/s", "0GB/s", "-1GB/s", "25", "1e400GB/s")),
        *((flops, text) for text in ("400T", "0TFLOP/s", "many")),
        *((scales, text) for text in ("0", "-2", "4..2", "2..", "..4", "a", "", "2,,4", "1e3")),
        *((scales, text) for text in ("9999999999", "²", "2..0")),
        *((wire, text) for text in ("alpha=1us", "beta=1GB/s", "", "20us,25GB/s")),
        (wire, "alpha=1us,beta=1GB/s,alpha=2us"),
        (wire, "alpha=1us,beta=1GB/s,gamma=1"),
        (wire, "alpha=1us,beta=1GB/s,algorithm=carrier-pigeon"),
        (wire, "alpha=-1us,beta=1GB/s"),
    ],
)
def test_quantities_that_could_mean_anything_else_are_refused(read: object, text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="expected"):
        read(text)  # type: ignore[operator]


LINK = ["--wire", "alpha=20us,beta=1GB/s"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--ranks", "2", *LINK], "--trace --model"),
        (["--trace", "a.json", "--ranks", "0", *LINK], "from 1 to"),
        (["--trace", "a.json", "--ranks", "2", "--wire", "alpha=-1us,beta=1GB/s"], "alpha"),
        (["--trace", "a.json", "--ranks", "2", "--flops", "1TFLOP/s", *LINK], "--flops is for"),
        (["--model", "models:mlp", "--ranks", "2", *LINK], "--flops"),
        (["--model", "nowhere:mlp", "--ranks", "2", "--flops", "1TFLOP/s", *LINK], "imported"),
        (
            [
                *("--model", "models:mlp", "--ranks", "2", "--flops", "1TFLOP/s", *LINK),
                *("--inner", "alpha=1us,beta=1GB/s"),
            ],
            "--hosts",
        ),
    ],
)
def test_a_line_with_a_mistake_ends_with_2_and_one_line(
    line: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["simulate", *line])
    except SystemExit as end:
        status = end.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert status == 2 and not out
    assert words in err and len(err.splitlines()) == 1


def test_the_document_has_every_scale_and_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record(tmp_path / "trace.json", facts=dict(CPU))
    assert main(["simulate", "--trace", str(path), "--ranks", "2..8", *LINK, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [point["ranks"] for point in document["points"]] == [2, 4, 8]
    assert document["measured"] == {"ranks": 2, "step_ms": pytest.approx(100, rel=1e-3)}
    assert document["stage"] == 1
    assert document["points"][0]["fixed"].keys() == {"25 MiB", "5e8 elements"}
    line = ["simulate", "--trace", str(path), "--ranks", "2", *LINK, "--json", "--stage", "2"]
    assert main(line) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["measured"] is None, "it was measured at another stage"


@pytest.mark.parametrize("of", ["a trace", "a model"])
def test_the_page_has_a_curve_for_each_size_and_asks_no_server(
    of: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    given = ["--model", "models:mlp", "--flops", "1TFLOP/s"]
    if of == "a trace":
        given = ["--trace", str(record(tmp_path / "trace.json", facts=dict(CPU)))]
    assert main(["simulate", *given, "--ranks", "2..8", *LINK, "-o", str(out)]) == 0
    assert str(out) in " ".join(capsys.readouterr().out.split())
    page = out.read_text(encoding="utf-8")
    for name in ("chosen", "25 MiB", "5e8 elements", "Memory of a rank"):
        assert name in page
    assert ("measured: 100" in page) == (of == "a trace")
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_trace_of_bytes_knows_how_many_elements_they_were(tmp_path: Path) -> None:
    wide = of_trace(record(tmp_path / "wide.json", facts=dict(CPU)))
    narrow = of_trace(record(tmp_path / "narrow.json", facts=dict(CPU), dtype="u8"))
    assert sum(wide.numels) == 6 * 1024
    assert sum(narrow.numels) == pytest.approx(6 * 4096 * 256 / 260, abs=2)
    assert set(narrow.dtypes) == {"f32"}


def test_int8_sends_a_byte_an_element_and_keeps_two_residuals_where_it_has_feedback(
    tmp_path: Path,
) -> None:
    subject = of_trace(record(tmp_path / "trace.json", facts=dict(CPU)))
    found = {
        (name, stage): at(subject, Cluster(SLOW, wire_format=name), 2, stage)
        for name in ("fp32", "int8")
        for stage in (1, 2)
    }
    gathered = 6 * 1024 * 4 / 2
    saved = found["fp32", 1].sent_nbytes - found["int8", 1].sent_nbytes
    assert saved == pytest.approx(gathered * (1 - 260 / 256 / 4), rel=0.05)
    more = found["int8", 1].memory_nbytes - found["int8", 2].memory_nbytes
    less = found["fp32", 1].memory_nbytes - found["fp32", 2].memory_nbytes
    assert more - less == pytest.approx(6 * 1024 * (4 + 2 * 4 / 256), rel=0.05)
