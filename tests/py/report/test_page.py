"""The page as a browser shows it, and what may be in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from traced import Scene, many
from zerort.cli import main
from zerort.report.curves import Series, scaling
from zerort.report.figures import figures
from zerort.report.page import document
from zerort.report.report import page_of, write_report
from zerort.report.run import load

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

WIDTHS = """<script>addEventListener('load',function(){
var wide=[],w=document.documentElement.clientWidth;
document.querySelectorAll('body *').forEach(function(e){var b=e.getBoundingClientRect();
if(b.width&&(b.right>w+1||b.left<-1)&&getComputedStyle(e).display!='none')
wide.push(e.tagName+' '+(e.textContent||'').slice(0,40)+' '+Math.round(b.right))});
document.body.setAttribute('data-wide',JSON.stringify([w,document.documentElement.scrollWidth,wide]))})
</script>"""


def browse(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    profile = f"--user-data-dir={folder / 'profile'}"
    return subprocess.run(
        [BROWSER, *flags, "--enable-logging=stderr", "--v=0", profile, *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(folder)},
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of eight ranks over fifty steps, one of which is slow."""
    folder = tmp_path_factory.mktemp("page")
    scene = Scene(
        ranks=8,
        steps=50,
        loads=many(24, 4_000_000),
        rate=2e6,
        micro_batches=2,
        forward=lambda rank, step: (34.0 if rank == 3 else 30.0) * (2.5 if step == 23 else 1),
        facts={
            f"bucket {i}": f"model.decoder.layers.{i}.attention.qkv.weight .. b" for i in range(24)
        },
    )
    return write_report(load(scene.write(folder)), folder / "report.html")


class Tags(HTMLParser):
    """Every tag must be closed, and what a page may load is collected."""

    VOID = frozenset({"meta", "link", "br", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_loads_nothing_and_is_small(page: Path) -> None:
    assert page.stat().st_size < 3_000_000
    text = page.read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.loads == ["data:,"]
    assert "@import" not in text and "url(" not in text
    assert "nan" not in re.findall(r'(?:x|y|width|cx)="([^"]*)"', text)


def test_the_page_names_straggler_outlier_and_the_dearest_bucket(page: Path) -> None:
    text = page.read_text()
    assert "Rank 3 is the straggler: it is 13 % slower in forward" in text
    assert "rank 3, the straggler" in text
    assert "step 23" in text
    assert "wait for one another" in text
    assert text.count("<details") == 8
    assert "Sampled" not in text


def test_a_hover_tells_bytes_first_and_last_parameter_and_what_was_waited_for(
    tmp_path: Path,
) -> None:
    found = figures(load(Scene(loads=many(6, 4_000_000), rate=2e5, window=1).write(tmp_path)))
    text = page_of(found)
    assert "bucket 1: layers.1.a .. layers.1.b\nfull, waits for its turn" in text
    assert ", for room</title>" in text
    assert "fills for 5.0 ms: 4 gradients, layers.1.weight last, alone for 5.0 ms" in text
    assert "in flight for 20.1 ms: 4 MB f32" in text
    assert "exposed communication: 20.1 ms\nstands still for reduce_scatter of bucket" in text


def test_names_of_parameters_are_no_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    scene = Scene(facts={"bucket 0": evil, "name": evil, "device": evil})
    text = page_of(figures(load(scene.write(tmp_path))))
    assert evil not in text
    assert text.count("<script>") == 1


def test_what_the_step_before_has_sent_begins_at_the_edge_of_the_picture(tmp_path: Path) -> None:
    text = page_of(figures(load(Scene(arrives=20.0, outside=1.0).write(tmp_path))))
    assert 'class="publish" x="0%"' in text
    assert not re.findall(r'<rect[^>]* x="-', text)


def test_long_names_break_behind_their_dots(tmp_path: Path) -> None:
    text = page_of(figures(load(Scene().write(tmp_path))))
    assert "layers.<wbr>1.<wbr>a .. layers.<wbr>1.<wbr>b" in text


def test_a_larger_run_is_sampled_and_says_so(tmp_path: Path) -> None:
    scene = Scene(ranks=34, steps=4, loads=many(90))
    out = write_report(load(scene.write(tmp_path / "run")), tmp_path / "report.html")
    text = out.read_text()
    assert out.stat().st_size < 3_000_000
    assert "8 of 34 ranks are drawn" in text
    assert re.search(r"\d+ of 90 buckets are drawn, those that cost most", text)
    assert "50 cheaper buckets are left out" in text
    assert "32 of 34 ranks are shown" in text or "31 of 34 ranks are shown" in text


@in_a_browser
@pytest.mark.parametrize("width", [360, pytest.param(1280, marks=pytest.mark.slow)])
def test_nothing_is_cut_off_and_nothing_is_complained_of(
    page: Path, tmp_path: Path, width: int
) -> None:
    """A desktop browser makes no window narrower than 500 pixels, so the page is in a frame."""
    (tmp_path / "inner.html").write_text(page.read_text().replace("</body>", f"{WIDTHS}</body>"))
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<body><iframe src="inner.html" width="{width}" height="4000"></iframe><script>'
        "addEventListener('load',function(){var d=document.querySelector('iframe').contentDocument;"
        "document.body.setAttribute('data-said',d.body.getAttribute('data-wide'))})</script></body>"
    )
    shown = browse(
        outer,
        tmp_path,
        "--dump-dom",
        "--allow-file-access-from-files",
        "--virtual-time-budget=3000",
    )
    said = re.search(r'data-said="([^"]*)"', shown.stdout)
    assert said, shown.stderr
    inner, scrolls, wide = json.loads(said[1].replace("&quot;", '"'))
    assert (scrolls, wide) == (inner, []), wide
    assert inner == width
    assert "CONSOLE" not in shown.stderr, shown.stderr


@in_a_browser
def test_dark_is_not_light_and_both_are_drawn(page: Path, tmp_path: Path) -> None:
    pictures = []
    for scheme in (0, 1):
        out = tmp_path / f"{scheme}.png"
        chosen = f"--blink-settings=preferredColorScheme={scheme}"
        browse(page, tmp_path, "--window-size=700,900", chosen, f"--screenshot={out}")
        pictures.append(out.read_bytes())
    dark, light = pictures
    assert dark != light
    assert min(len(dark), len(light)) > 20_000, "an empty page"


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG counts it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def schemes() -> Iterator[dict[str, str]]:
    from zerort.report.style import STYLE

    for block in re.findall(r":root\{(.*?)\}", STYLE, re.DOTALL):
        found = dict(re.findall(r"--([\w-]+):\s*(#\w+)", block))
        yield {
            name: value if len(value) == 7 else "#" + "".join(c * 2 for c in value[1:])
            for name, value in found.items()
        }


def test_text_is_readable_and_waiting_is_told_from_compute_in_both_schemes() -> None:
    both = list(schemes())
    assert len(both) == 2
    for colours in both:
        for name in ("ink", "soft"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
        for name in ("forward", "backward"):
            assert contrast(colours["on-compute"], colours[name]) >= 4.5, name
        for name in ("exposed", "vote", "optimizer", "publish", "sums"):
            assert contrast(colours[name], colours["paper"]) >= 3, name


def test_a_section_of_curves_names_its_lines_and_hides_no_value() -> None:
    series = [
        Series("25 MiB buckets", [(2, 10.0), (1024, 80.0), (64, 20.0)]),
        Series("chosen", [(2, 10.0), (1024, 40.0)], note="12 MB"),
        Series("seen", [(2, 11.0)], measured=True),
        Series("measured", [(2, 12.0)], measured=True),
        Series("empty", []),
    ]
    section = scaling("Step time, by ranks", "Predicted.", series)
    assert section.anchor == "step-time-by-ranks"
    text = document("Planned", [section])
    for phrase in ("25 MiB buckets", "1024 ranks: 80 ms", "chosen", "12 MB", "seen (measured)"):
        assert phrase in text
    assert "measured (measured)" not in text, "it would be cut off on a phone"
    numbers = re.findall(r'class="tick" x="([\d.]+)%"[^>]*text-anchor="start"', section.body)
    curves = re.findall(r'<circle[^>]*cx="([\d.]+)%"', section.body)
    assert set(numbers) == {"0"} and min(map(float, curves)) > 10, "no curve crosses the axis"
    assert section.body.count("<line") - section.body.count('class="grid"') == 3
    assert scaling("Nothing", "", [Series("empty", [])]).body == ""


def test_the_command_names_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Scene(ranks=2).write(tmp_path / "run")
    out = tmp_path / "report.html"
    line = ["trace", "report", str(tmp_path / "run"), "-o", str(out)]
    assert main(line) == 0
    assert str(out) in capsys.readouterr().out
    assert main([*line, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["written"] == [str(out)]
    assert {one["key"] for one in told["findings"]} == {"hidden"}
    assert sum(told["parts_ms"].values()) == pytest.approx(told["step_ms"])
    assert main([*line[:-1], str(tmp_path / "nowhere" / "report.html")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_without_matplotlib_a_png_is_refused_with_a_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Scene(ranks=2).write(tmp_path / "run")
    out = tmp_path / "report.html"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["trace", "report", str(tmp_path / "run"), "-o", str(out), "--png"]) == 2
    assert 'pip install "zerort[report]"' in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow  # which has the extra
def test_a_png_is_a_picture_of_the_first_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, the extra `report`, is not installed")
    Scene(ranks=2, loads=many(6)).write(tmp_path / "run")
    out = tmp_path / "report.html"
    assert main(["trace", "report", str(tmp_path / "run"), "-o", str(out), "--png"]) == 0
    png = (tmp_path / "report.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000


def differences(capsys: pytest.CaptureFixture[str], before: Path, after: Path) -> Any:
    assert main(["trace", "diff", str(before), str(after), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_diff_says_what_changed_in_the_step_its_parts_and_buckets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    Scene(loads=many(4, 10_000_000), rate=5e5).write(slow)
    Scene(loads=many(5, 4_000_000), rate=5e5, stage=1, publish=3.0).write(fast)
    told = differences(capsys, slow, fast)
    parts = {part["name"]: part for part in told["parts"]}
    assert parts["publish"]["after"] - parts["publish"]["before"] == pytest.approx(2.0, abs=0.01)
    assert parts["forward"]["before"] == parts["forward"]["after"] == pytest.approx(20.0, abs=0.01)
    assert told["step"]["before"] > told["step"]["after"]
    assert told["facts"] == [["stage", "2", "1"]]
    added = next(each for each in told["buckets"] if each["bucket"] == 4)
    assert (added["cost_before"], added["bytes_after"]) == (None, 4_000_000)
    assert main(["trace", "diff", str(slow / "trace-*.json"), str(fast)]) == 0
    shown = capsys.readouterr().out
    assert "shorter" in shown and "10 MB > 4 MB" in shown


def test_two_recordings_of_one_thing_do_not_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def uneven(rank: int, step: int) -> float:
        return 60.0 + step % 5

    for name in ("a", "b"):
        Scene(backward=uneven, name=name).write(tmp_path / name)
    assert main(["trace", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "no change beyond the spread of the steps" in capsys.readouterr().out


def test_runs_that_are_not_complete_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Scene(ranks=2).write(tmp_path / "whole")
    assert main(["trace", "diff", str(whole[0]), str(tmp_path / "whole")]) == 2
    assert "1 are missing (1)" in capsys.readouterr().err
