"""Line charts as SVG, written by hand: small files that a diff can show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

COLOURS = ("#d1495b", "#e09f3e", "#00798c", "#30638e", "#8d6a9f", "#5b8c5a", "#6c757d", "#003d5b", "#9c6644")
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 40, 50
Points = Sequence[tuple[float, float]]


def lines(title: str, across: str, up: str, series: Mapping[str, Points], labels: Mapping[float, str]) -> str:
    """A chart with logarithmic axes; `labels` are the marks of the horizontal one."""
    points = [point for one in series.values() for point in one if point[1] > 0]
    if not points:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    bottom, top = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high * 1.001))
    marks = sorted(labels)

    def x_of(x: float) -> float:
        share = math.log(x / marks[0]) / (math.log(marks[-1] / marks[0]) or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        return HEIGHT - BOTTOM - math.log(y / bottom) / math.log(top / bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 22, title, "start", 'font-size="15"'),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, across, "middle"),
        f'<text transform="translate(16,{HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">{_safe(up)}</text>',
    ]
    for power in range(round(math.log10(bottom)), round(math.log10(top)) + 1):
        y = y_of(10**power)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{10**power:,g}", "end"))
    for mark in marks:
        parts.append(f'<path d="M{x_of(mark):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eee"/>')
        parts.append(_text(x_of(mark), HEIGHT - BOTTOM + 16, labels[mark], "middle"))
    for i, (name, one) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [(x_of(x), y_of(y)) for x, y in one if y > 0]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        width = 3 if name.startswith("ours") else 1.5
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        row = TOP + 10 + 18 * i
        parts.append(f'<path d="M{WIDTH - RIGHT + 12} {row}h18" stroke="{colour}" stroke-width="{width}"/>')
        parts.append(_text(WIDTH - RIGHT + 36, row + 4, name, "start"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{_safe(text)}</text>'


def _safe(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
