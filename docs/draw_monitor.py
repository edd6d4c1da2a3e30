"""Draws what a monitor wrote of a run, read back from its CSV files, as an SVG.

    make demo MONITORS=1
    python docs/draw_monitor.py runs/train_text/monitor --out docs/monitor.svg

The loss of each step is pale, its running mean strong, over the samples that training has seen.
Where a run went on from a checkpoint, the later of two rows of a step counts.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

WIDTH, HEIGHT = 960, 300
LEFT, RIGHT, TOP, FOOT = 60, 16, 16, 40
LOSS, RATE = "Train_Samples_train_loss", "Train_Samples_lr"
PALE, STRONG, RATES = "#b9cfe6", "#2f6fb0", "#e08a1e"
SPAN = 25
"""Steps in the running mean."""

Curve = list[tuple[int, float]]


def read(path: Path) -> Curve:
    """The finite values of a file by their steps. Raises `ValueError` for one without any."""
    kept: Curve = []
    with path.open(newline="") as file:
        for row in csv.reader(file):
            if row[0].isdigit() and len(row) == 2 and math.isfinite(float(row[1])):
                while kept and kept[-1][0] >= int(row[0]):
                    kept.pop()
                kept.append((int(row[0]), float(row[1])))
    if not kept:
        raise ValueError(f"{path} has no row of a step")
    return kept


def running_mean(curve: Curve) -> Curve:
    """Of `SPAN` steps around each."""
    found = []
    for i, (step, _) in enumerate(curve):
        near = [value for _, value in curve[max(0, i - SPAN // 2) : i + SPAN // 2 + 1]]
        found.append((step, sum(near) / len(near)))
    return found


class Axes:
    """Where a value is on the picture."""

    def __init__(self, curve: Curve) -> None:
        self.end = curve[-1][0]
        values = [value for _, value in curve]
        self.low, self.high = min(values), max(values)

    def x(self, step: float) -> float:
        """From the first sample to the last."""
        return LEFT + step / self.end * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """From the smallest value to the largest."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return HEIGHT - FOOT - share * (HEIGHT - FOOT - TOP)

    def line(self, curve: Curve, colour: str, width: float, dash: str = "") -> str:
        """The curve."""
        points = " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in curve)
        return (
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" '
            f'stroke-linejoin="round"{dash}/>'
        )


def distance(extent: float) -> float:
    """A round distance of about five marks in `extent`."""
    size = 10.0 ** math.floor(math.log10(extent / 5))
    return next(size * factor for factor in (1, 2, 5, 10) if extent <= size * factor * 6)


def grid(axes: Axes) -> list[str]:
    """Lines at round numbers, with their names."""
    lines = []
    step = distance(axes.high - axes.low)
    for i in range(math.ceil(axes.low / step), math.floor(axes.high / step) + 1):
        y = axes.y(i * step)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" {RULED}/>')
        lines.append(text(LEFT - 8, y + 4, f"{i * step:g}", "end"))
    step = distance(axes.end)
    for i in range(math.floor(axes.end / step) + 1):
        lines.append(text(axes.x(i * step), HEIGHT - FOOT + 16, f"{i * step:g}", "middle"))
    return lines


RULED = 'stroke="#e8e8e8"'


def text(x: float, y: float, content: str, anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="#444">{content}</text>'


def svg(loss: Curve, rate: Curve) -> str:
    """The picture: the loss with its scale, the learning rate below it without one."""
    axes, rates = Axes(loss), Axes([(0, 0.0), *rate])
    rates.end = axes.end
    legend = [
        (PALE, "train_loss, nats a byte"),
        (STRONG, f"its mean over {SPAN} steps"),
        (RATES, f"lr, at most {rates.high:g}"),
    ]
    named, x = [], LEFT
    for colour, name in legend:
        named.append(f'<rect x="{x}" y="{HEIGHT - 16}" width="12" height="12" fill="{colour}"/>')
        named.append(text(x + 17, HEIGHT - 6, name))
        x += 60 + 6 * len(name)
    body = "\n".join(
        [
            *grid(axes),
            rates.line(rate, RATES, 1.2, ' stroke-dasharray="5 4"'),
            axes.line(loss, PALE, 1),
            axes.line(running_mean(loss), STRONG, 2),
            *named,
            text(WIDTH - RIGHT, HEIGHT - 6, "samples", "end"),
        ]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw a run's loss as an SVG.")
    parser.add_argument("folder", type=Path, help="of the CSV files: output_path/job_name")
    parser.add_argument("--out", type=Path, default=Path("monitor.svg"))
    args = parser.parse_args()
    loss, rate = read(args.folder / f"{LOSS}.csv"), read(args.folder / f"{RATE}.csv")
    args.out.write_text(svg(loss, rate))


if __name__ == "__main__":
    main()
