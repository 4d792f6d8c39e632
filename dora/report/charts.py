"""Draws the small charts: the Pareto front, times against bounds, the use of a medium."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dora.report.markup import Markup, drawing, line, tag, text
from dora.report.quantities import log_ticks, percent, tick_labels, ticks
from dora.report.traffic import Use

_WIDTH, _WIDE, _HEIGHT = 500.0, 760.0, 280.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 20.0, 24.0, 44.0


class Mark(NamedTuple):
    """A value on an axis with a line through the chart: a bound or a prediction."""

    value: float
    label: str
    class_: str


class Point(NamedTuple):
    """A plan, or a measurement, in the chart of time against energy."""

    time_s: float
    energy_j: float
    label: str
    title: str
    class_: str


class _Axis(NamedTuple):
    """Values from `low` to `high`, drawn from pixel `start` to pixel `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        """Returns an axis on which the values have some room, logarithmic if they are far apart."""
        low, high = min(values), max(values)
        if low > 0 and high > 8 * low:
            room = (high / low) ** 0.1
            return cls(low / room, high * room, start, end, is_log=True)
        room = 0.12 * (max(values) - min(values)) or 0.12 * max(values) or 1.0
        return cls(max(0.0, min(values) - room), max(values) + room, start, end)

    @classmethod
    def across(cls, high: float) -> _Axis:
        """Returns a horizontal axis from zero."""
        return cls(0.0, high, _LEFT, _WIDTH - _RIGHT)

    @classmethod
    def up(cls, high: float) -> _Axis:
        """Returns a vertical axis from zero."""
        return cls(0.0, high, _HEIGHT - _BOTTOM, _TOP)

    def at(self, value: float) -> float:
        """Returns the pixel of a value."""
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
            return self.start + share * (self.end - self.start)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def pareto_chart(points: Sequence[Point], bounds: Sequence[Mark]) -> Markup:
    """Returns time against energy; the axes begin near the least values, not at zero.

    Args:
        points: The front, the plan that ran, what was measured.
        bounds: Of time; those far from all points are left out.
    """
    times, energy = [p.time_s for p in points], [p.energy_j for p in points]
    shown = near(bounds, times)
    values = [*times, *(bound.value for bound in shown)]
    x_axis = _Axis.around(values, _LEFT, _WIDE - _RIGHT)
    y_axis = _Axis.around(energy, _HEIGHT - _BOTTOM, _TOP)
    parts = [*_axes(x_axis, y_axis, "time", "energy", "s", "J"), *_vertical(shown, x_axis)]
    places = [(x_axis.at(p.time_s), y_axis.at(p.energy_j)) for p in points]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda pair: pair[1]):
        title = tag("title", point.title)
        if point.class_ == "measured":
            path = f"M{x:.2f} {y - 7:.2f}l7 7l-7 7l-7 -7z"
            parts.append(tag("path", title, d=path, class_="dot measured"))
        else:
            size = 6.0 if point.class_ == "ran" else 4.5
            parts.append(tag("circle", title, cx=x, cy=y, r=size, class_=f"dot {point.class_}"))
        box = _free_box(x, y, 7.0 * len(point.label), taken)
        taken.append(box)
        parts.append(text(box[0], box[3] - 2, point.label))
    return drawing(_WIDE, _HEIGHT, "Time against energy of the plans", *parts)


_Box = tuple[float, float, float, float]


def _free_box(x: float, y: float, width: float, taken: Sequence[_Box]) -> _Box:
    """Returns where a label beside a point covers least: right, left, above, below or aslant."""
    places = [
        (x + dx, y + dy - 6, x + dx + width, y + dy + 6)
        for dx, dy in (
            (9, 0), (-9 - width, 0), (-width / 2, -13), (-width / 2, 13), (7, -11), (7, 11),
            (-7 - width, -11), (-7 - width, 11), (9, -22), (9, 22), (-9 - width, 24),
        )
    ]  # fmt: skip

    def covered(box: _Box) -> float:
        outside = box[0] < _LEFT or box[2] > _WIDE or box[1] < 0 or box[3] > _HEIGHT - _BOTTOM
        return sum(_overlap(box, other) for other in taken) + 1000.0 * outside

    return min(places, key=covered)


def _overlap(a: _Box, b: _Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def distribution_chart(times: Sequence[float], marks: Sequence[Mark], percentile: float) -> Markup:
    """Returns the share of steps that took at most a given time."""
    ordered = sorted(times)
    x_axis = _Axis.across(1.06 * max([ordered[-1], *(mark.value for mark in marks)]))
    y_axis = _Axis.up(1.0)
    parts = [*_axes(x_axis, y_axis, "time", "share that took at most that", "s", "%")]
    level = y_axis.at(percentile / 100)
    parts.append(line(_LEFT, level, _WIDTH - _RIGHT, level, "level"))
    parts.append(text(_LEFT + 6, level - 4, f"{percent(percentile / 100)} judged", "muted"))
    path = f"M{_LEFT:.2f} {y_axis.at(0):.2f}"
    for i, value in enumerate(ordered):
        path += f"H{x_axis.at(value):.2f}V{y_axis.at((i + 1) / len(ordered)):.2f}"
    parts.append(tag("path", d=f"{path}H{_WIDTH - _RIGHT:.2f}", class_="curve measured"))
    parts += _vertical(marks, x_axis)
    return drawing(_WIDTH, _HEIGHT, "Distribution of the measured times", *parts)


def sequence_chart(times: Sequence[float], marks: Sequence[Mark], word: str) -> Markup:
    """Returns the time of every step, in the order in which they ran."""
    x_axis = _Axis.across(float(len(times)))
    y_axis = _Axis.up(1.1 * max([*times, *(mark.value for mark in marks)]))
    parts = [*_axes(x_axis, y_axis, f"{word} number", "time", "", "s")]
    for mark in marks:
        y = y_axis.at(mark.value)
        parts.append(line(_LEFT, y, _WIDTH - _RIGHT, y, mark.class_))
    size = 3.0 if len(times) <= 100 else 1.6
    for i, value in enumerate(times):
        place = {"cx": x_axis.at(i + 0.5), "cy": y_axis.at(value)}
        parts.append(tag("circle", r=size, class_="dot measured small", **place))
    return drawing(_WIDTH, _HEIGHT, f"Time of every {word}", *parts)


def near(marks: Sequence[Mark], times: Sequence[float]) -> list[Mark]:
    """Returns the marks that would not press the times into a corner."""
    return [mark for mark in marks if mark.value <= 2.5 * max(times)]


def use_chart(use: Use) -> Markup:
    """Returns the used share of a medium over time, as an area."""
    width, height, left, top, bottom = 320.0, 104.0, 38.0, 8.0, 24.0
    end_s = use.points[-1][1]
    most = max(1.0, *(share for _, _, share in use.points))

    def x(at_s: float) -> float:
        return left + at_s / end_s * (width - left - 14)

    def y(share: float) -> float:
        return height - bottom - share / most * (height - bottom - top)

    path = f"M{x(0):.2f} {y(0):.2f}"
    for start, end, share in use.points:
        path += f"L{x(start):.2f} {y(share):.2f}H{x(end):.2f}"
    marks = ticks(end_s, 4)
    labels = zip(marks, tick_labels(marks, "s"), strict=True)
    return drawing(
        width, height, f"Use of {use.medium} over time, {use.source}",
        (line(left, y(share), width - 14, y(share), "grid") for share in (0.0, 0.5, 1.0)),
        (text(left - 5, y(share) + 4, percent(share), "end-text") for share in (0.0, 0.5, 1.0)),
        tag("path", d=f"{path}V{y(0):.2f}z", class_=f"area {use.source}"),
        line(left, y(use.mean), width - 14, y(use.mean), "mean"),
        (text(x(mark), height - 8, label, "middle") for mark, label in labels),
    )  # fmt: skip


def _axes(
    x_axis: _Axis, y_axis: _Axis, name_x: str, name_y: str, unit_x: str, unit_y: str
) -> Iterator[Markup]:
    """Yields grid, numbers and names; the unit '' means counts, and '%' shares."""
    for value, label in _labelled(x_axis, 6, unit_x):
        x = x_axis.at(value)
        yield line(x, _TOP, x, _HEIGHT - _BOTTOM, "grid")
        yield text(x, _HEIGHT - _BOTTOM + 15, label, "middle")
    for value, label in _labelled(y_axis, 5, unit_y):
        y = y_axis.at(value)
        yield line(_LEFT, y, x_axis.end, y, "grid")
        yield text(_LEFT - 6, y + 4, label, "end-text")
    yield text((_LEFT + x_axis.end) / 2, _HEIGHT - 8, name_x, "middle muted")
    yield text(8, _TOP - 12, name_y, "muted")


def _labelled(axis: _Axis, most: int, unit: str) -> list[tuple[float, str]]:
    values = log_ticks(axis.high, axis.low) if axis.is_log else ticks(axis.high, most, axis.low)
    labels = map(percent, values) if unit == "%" else tick_labels(values, unit)
    return list(zip(values, labels, strict=True))


def _vertical(marks: Sequence[Mark], axis: _Axis) -> Iterator[Markup]:
    """Yields lines through the chart with their labels, each higher so that none overlap."""
    for i, mark in enumerate(sorted(marks, key=lambda m: m.value)):
        x = axis.at(mark.value)
        yield line(x, _TOP, x, _HEIGHT - _BOTTOM, mark.class_)
        is_late = x > axis.end * 0.6
        y = _HEIGHT - _BOTTOM - 8 - 14 * i
        yield text(x - 5 if is_late else x + 5, y, mark.label, "end-text" if is_late else "")
