"""Plots as SVG in the page itself: no script, no picture to fetch. Colours are classes, so they follow light and dark.

A plot is 380 units wide and is shown at about that width in pixels, on a telephone as on a desk.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 380, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 14, 40
COLOURS = 8
MOST_POINTS = 120
LETTER = 13  # height of a label
FAR_APART = 50  # times the least: such costs are drawn by powers of ten

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot; `series` chooses its colour, `half` is half the height of its error bar."""

    x: float
    y: float
    letter: str
    series: int
    half: float | None = None
    front: bool = False


@dataclass(frozen=True)
class Scale:
    """Numbers to places between `start` and `end`, with round ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    powers: bool = False  # places go by the logarithm

    def at(self, value: float) -> float:
        """The place of a value."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.powers else (self.low, self.high)
        return self.start + ((math.log10(value) if self.powers else value) - low) / (high - low) * (
            self.end - self.start
        )


def scale(values: Sequence[float], start: float, end: float, count: int = 4) -> Scale:
    """A scale over all values with about `count` ticks at 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(high), 1e-12):
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [step * number for number in range(first, last + 1)]
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def powers(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale by powers of ten over positive values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = [10.0**power for power in range(low, max(high, low + 1) + 1)]
    return Scale(ticks[0], ticks[-1], start, end, ticks, True)


def scatter(title: str, across: str, up: str, points: Sequence[Point]) -> str:
    """Points with letters; those of the front are filled and joined."""
    places_of = [p.x for p in points]
    wide = min(places_of) > 0 and max(places_of) > FAR_APART * min(places_of)
    xs = (powers if wide else scale)(places_of, LEFT, WIDTH - RIGHT)
    heights = [p.y + sign * (p.half or 0) for p in points for sign in (-1, 1)]
    ys = scale(heights, HEIGHT - BOTTOM, TOP)
    parts = [_axes(xs, ys, across, up)]
    ahead = sorted((p for p in points if p.front), key=lambda p: (p.x, p.y))
    if len(ahead) > 1:
        path = " ".join(f"{xs.at(p.x):.1f},{ys.at(p.y):.1f}" for p in ahead)
        parts.append(f'<polyline class="front" points="{path}"/>')
    places = [(xs.at(p.x), ys.at(p.y)) for p in points]
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for point, (x, y) in zip(points, places, strict=True):
        colour = f"c{point.series % COLOURS}"
        if point.half is not None:
            top, low = ys.at(point.y + point.half), ys.at(point.y - point.half)
            parts.append(f'<path class="bar {colour}" d="M{x:.1f},{top:.1f} V{low:.1f}"/>')
        shape = "dot full" if point.front else "dot"
        told = f"{point.letter}: {across} {point.x:.4g}, {up} {point.y:.4g}"
        parts.append(
            f'<circle class="{shape} {colour}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">'
            f"<title>{html.escape(told)}</title></circle>"
        )
        lx, ly = _free(x, y, point.letter, taken)
        parts.append(f'<text class="letter" x="{lx:.1f}" y="{ly:.1f}">{html.escape(point.letter)}</text>')
    return _svg(title, parts)


def curves(title: str, up: str, series: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> str:
    """A line for each (letter, points), its letter at its end; many points are averaged in groups."""
    drawn = [(letter, thinned(points)) for letter, points in series if len(points) > 1]
    if not drawn:
        return ""
    xs = scale([x for _, points in drawn for x, _ in points], LEFT, WIDTH - RIGHT - 14)
    ys = scale([y for _, points in drawn for _, y in points], HEIGHT - BOTTOM, TOP)
    parts = [_axes(xs, ys, "step", up)]
    ends = []
    for number, (letter, points) in enumerate(drawn):
        path = " ".join(f"{xs.at(x):.1f},{ys.at(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line c{number % COLOURS}" points="{path}"/>')
        ends.append((ys.at(points[-1][1]), xs.at(points[-1][0]), letter))
    for y, (_, x, letter) in zip(spread([end[0] for end in sorted(ends)]), sorted(ends), strict=True):
        parts.append(f'<text class="letter" x="{x + 4:.1f}" y="{y + 4:.1f}">{html.escape(letter)}</text>')
    return _svg(title, parts)


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: the means of groups of neighbours."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), math.fsum(y for _, y in group) / len(group)) for group in groups]


def spread(
    places: Sequence[float], gap: float = LETTER, low: float = TOP, high: float = HEIGHT - BOTTOM
) -> list[float]:
    """Rising places pushed at least `gap` apart, as long as there is room."""
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap) if found else max(place, low))
    limit = high
    for number in reversed(range(len(found))):
        found[number] = min(found[number], limit)
        limit = found[number] - gap
    return found


def _free(x: float, y: float, letter: str, taken: list[Box]) -> tuple[float, float]:
    """Where a letter beside a point covers the least of what is there; left end and base line."""
    wide = 8.0 * len(letter)
    offers: list[tuple[float, int, float, float, Box]] = []
    for dx, dy in (
        (7, -5),
        (7, 13),
        (-7 - wide, -5),
        (-7 - wide, 13),
        (-wide / 2, -9),
        (-wide / 2, 18),
        (11, 4),
        (-11 - wide, 4),
    ):
        left, base = x + dx, y + dy
        box = (left, base - LETTER + 2, left + wide, base + 2)
        outside = box[0] < LEFT - 4 or box[2] > WIDTH or box[1] < 0 or box[3] > HEIGHT - BOTTOM + 12
        offers.append((sum(_overlap(box, other) for other in taken) + 1000 * outside, len(offers), left, base, box))
    _, _, left, base, box = min(offers)
    taken.append(box)
    return left, base


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _axes(xs: Scale, ys: Scale, across: str, up: str) -> str:
    bottom = HEIGHT - BOTTOM
    parts = []
    for value in xs.ticks:
        x = xs.at(value)
        parts.append(f'<path class="grid" d="M{x:.1f},{TOP} V{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick(value, xs)}</text>')
    for value in ys.ticks:
        y = ys.at(value)
        parts.append(f'<path class="grid" d="M{LEFT},{y:.1f} H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick(value, ys)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{html.escape(across)}</text>"
    )
    parts.append(
        f'<text class="name" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{html.escape(up)}</text>"
    )
    return "".join(parts)


def tick(value: float, scale: Scale) -> str:
    """A tick's number, in as many digits as its step needs."""
    if scale.powers:
        return next((f"{value / unit:g}{name}" for unit, name in _UNITS if value >= unit), f"{value:g}")
    step = scale.ticks[1] - scale.ticks[0]
    if abs(value) >= 1e4 and step >= 100:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{min(digits, 6)}f}"


_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def _svg(title: str, parts: Sequence[str]) -> str:
    inside = "".join(parts)
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{html.escape(title)}</title>{inside}</svg></figure>"
    )
