"""Draws what `zerort simulate --json` has said of a step over the number of ranks, as an SVG.

    zerort simulate --trace trace-rank0.json --ranks 2..4096 --json \\
        --wire "alpha=100us,beta=1Gbit/s,algorithm=ring" > planned.json
    python docs/draw_planning.py planned.json --out docs/planning.svg

A line for the bucket size that was chosen, one for each fixed size, one for what is computed; a dot
for the step that was recorded.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

WIDTH, HEIGHT = 960, 340
LEFT, RIGHT, TOP, FOOT = 70, 130, 20, 50
COLOURS = ("#2f6fb0", "#c2410c", "#2f8f4e", "#8a8a8a")

Points = list[tuple[float, float]]


def curves(document: dict) -> dict[str, Points]:
    """By name: (ranks, ms)."""
    points = document["points"]
    found = {"chosen": [(point["ranks"], point["step_ms"]) for point in points]}
    for name in points[0]["fixed"]:
        found[name] = [(point["ranks"], point["fixed"][name]) for point in points]
    compute = (document["forward_ms"] + document["backward_ms"]) * document["micro_batches"]
    found["compute"] = [(point["ranks"], compute) for point in points]
    return found


class Axes:
    """Where a value is on the picture: ranks by their logarithm, ms from 0."""

    def __init__(self, every: dict[str, Points], measured: Points) -> None:
        points = [point for curve in (*every.values(), measured) for point in curve]
        self.low = math.log2(min(ranks for ranks, _ in points))
        self.high = max(math.log2(max(ranks for ranks, _ in points)), self.low + 1)
        self.top = 1.05 * max(ms for _, ms in points)

    def x(self, ranks: float) -> float:
        """From the fewest ranks to the most."""
        share = (math.log2(ranks) - self.low) / (self.high - self.low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, ms: float) -> float:
        """From 0 at the foot."""
        return HEIGHT - FOOT - ms / self.top * (HEIGHT - TOP - FOOT)


def draw(document: dict) -> str:
    """The whole picture."""
    every = curves(document)
    measured = document.get("measured")
    dots = [(measured["ranks"], measured["step_ms"])] if measured else []
    axes = Axes(every, dots)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *grid(axes, [ranks for ranks, _ in every["chosen"]]),
    ]
    heights = sorted(every, key=lambda name: -axes.y(every[name][-1][1]))
    labels: dict[str, float] = {}
    low = float(HEIGHT)
    for name in heights:
        low = min(axes.y(every[name][-1][1]) + 4, low - 15)
        labels[name] = low
    for colour, (name, curve) in zip(COLOURS, every.items(), strict=False):
        line = " ".join(f"{axes.x(ranks):.1f},{axes.y(ms):.1f}" for ranks, ms in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x = axes.x(curve[-1][0]) + 8
        parts.append(f'<text x="{x:.1f}" y="{labels[name]:.1f}" fill="{colour}">{name}</text>')
    for ranks, ms in dots:
        x, y = axes.x(ranks), axes.y(ms)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#111"/>')
        parts.append(f'<text x="{x + 9:.1f}" y="{y + 4:.1f}">recorded, on loopback</text>')
    return "\n".join([*parts, "</svg>", ""])


def grid(axes: Axes, ranks: list[float]) -> list[str]:
    """Lines and their numbers."""
    parts = []
    step = 10 ** math.floor(math.log10(axes.top)) / 2
    for index in range(int(axes.top / step) + 1):
        y = axes.y(index * step)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        words = f"{index * step / 1000:g} s"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{words}</text>')
    for one in ranks:
        x = axes.x(one)
        y = HEIGHT - FOOT + 18
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{one}</text>')
    x = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{x:.0f}" y="{HEIGHT - 10}" text-anchor="middle">ranks</text>')
    return parts


def main() -> None:
    """Reads the document and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(draw(json.loads(args.document.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
