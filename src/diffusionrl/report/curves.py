"""Curves as inline SVG: where things go is worked out here, and drawn by the macro ``chart`` of parts.html.jinja.

Colours are classes ``c0`` ... of the style sheet, so that a curve follows the page into the dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 380, 224
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
MAX_POINTS = 300
COLOURS = 8

Values = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: in the legend; one without is not in it.
        x, y: of equal length; where either is None there is a gap.
        spread: half the height of an error bar (dots) or of a band (lines) at each point.
        dots: single points with error bars, joined by a faint line.
        faint: drawn lightly, as ground for another one.
        shift: to the right by so many units, where points of several lines would hide each other.
    """

    name: str
    x: Values
    y: Values
    spread: Values = ()
    colour: int = 0
    dots: bool = False
    faint: bool = False
    shift: float = 0.0


@dataclass(frozen=True)
class Chart:
    """A chart as the template draws it; all coordinates are in the SVG's units."""

    title: str
    x_label: str
    note: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[dict[str, Any]]
    marks: list[float] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM

    @property
    def hover(self) -> list[list[Any]]:
        """For the script: each line's name and its points [place, x, y]."""
        return [[line["name"], line["points"]] for line in self.lines if line["name"]]


def draw(
    title: str, x_label: str, lines: Sequence[Line], note: str = "", marks: Sequence[float] = (), from_zero: bool = False
) -> Chart | None:
    """A chart of the lines that have a point; None where none has. ``marks`` are the x of the scrubber's stops."""
    drawn = [(line, _thinned(line)) for line in lines]
    drawn = [(line, points) for line, points in drawn if any(point is not None for point in points)]
    if not drawn:
        return None
    points = [point for _, thinned in drawn for point in thinned if point is not None]
    x_axis = _Axis([p.x for p in points] + list(marks), LEFT, WIDTH - RIGHT, 5)
    y_axis = _Axis([each for p in points for each in (p.low, p.high)] + [0.0] * from_zero, HEIGHT - BOTTOM, TOP, 4, margin=0.06)
    return Chart(
        title,
        x_label,
        note,
        x_axis.ticks(),
        y_axis.ticks(),
        [_placed(line, thinned, x_axis, y_axis) for line, thinned in drawn],
        [x_axis.place(mark) for mark in marks],
    )


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    low: float
    high: float


def _thinned(line: Line) -> list[_Point | None]:
    """At most MAX_POINTS points, each the mean of its neighbours, with their extremes as its spread; None is a gap."""
    spreads = line.spread or [None] * len(line.y)
    points = [
        None if x is None or y is None else _Point(x, y, y - (spread or 0.0), y + (spread or 0.0))
        for x, y, spread in zip(line.x, line.y, spreads, strict=True)
    ]
    size = math.ceil(len(points) / MAX_POINTS)
    return points if size <= 1 else [_mean_point(points[start : start + size]) for start in range(0, len(points), size)]


def _mean_point(points: list[_Point | None]) -> _Point | None:
    there = [point for point in points if point is not None]
    if not there:
        return None
    x, y = (sum(values) / len(there) for values in zip(*((point.x, point.y) for point in there), strict=True))
    return _Point(x, y, min(point.low for point in there), max(point.high for point in there))


class _Axis:
    """From values to places."""

    def __init__(self, values: Sequence[float], start: float, end: float, num_ticks: int, margin: float = 0.0) -> None:
        low, high = min(values), max(values)
        if low == high:
            low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
        self.low, self.high = low - margin * (high - low), high + margin * (high - low)
        self.start, self.end, self._num_ticks = start, end, num_ticks

    def place(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        found = MaxNLocator(self._num_ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        kept = [float(tick) for tick in found if self.low - slack <= tick <= self.high + slack]
        return [(self.place(tick), tick_label(tick)) for tick in kept]


def tick_label(value: float) -> str:
    """12000 -> 12k, -0.5 -> −0.5, with a true minus."""
    if abs(value) >= 10_000:
        scale, unit = next((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s)
        text = f"{value / scale:.4g}{unit}"
    else:
        text = f"{value:.4g}".replace("e-0", "e-")
    return "0" if abs(value) < 1e-12 else text.replace("-", "−")


def _placed(line: Line, points: list[_Point | None], x_axis: _Axis, y_axis: _Axis) -> dict[str, Any]:
    there = [(x_axis.place(p.x) + line.shift, y_axis.place(p.y), p) for p in points if p is not None]
    bars = [(px, y_axis.place(p.low), y_axis.place(p.high)) for px, _, p in there]
    spread = any(p.low < p.high for _, _, p in there)
    return {
        "name": line.name,
        "colour": f"c{line.colour % COLOURS}",
        "faint": line.faint,
        "path": _path(points, x_axis, y_axis, line.shift),
        "band": _band(bars) if spread and not line.dots else "",
        "bars": bars if spread and line.dots else [],
        "dots": [(px, py) for px, py, _ in there] if line.dots or len(there) == 1 else [],
        "points": [[px, _rounded(p.x), _rounded(p.y)] for px, _, p in there],
    }


def _path(points: list[_Point | None], x_axis: _Axis, y_axis: _Axis, shift: float) -> str:
    parts, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x_axis.place(point.x) + shift:g} {y_axis.place(point.y):g}")
        pen = "L"
    return "".join(parts)


def _band(bars: list[tuple[float, float, float]]) -> str:
    above = "L".join(f"{x:g} {high:g}" for x, _, high in bars)
    below = "L".join(f"{x:g} {low:g}" for x, low, _ in reversed(bars))
    return f"M{above}L{below}Z"


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
