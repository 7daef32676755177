"""Draws the charts of a report's page: inline SVG, coloured by the page's style sheet, each mark with its value as a title.

A chart is a string. Its classes s0 .. s7 are the colours of series; text, grid and axes have classes of their own.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from trainer.reporting.drawing import short_bytes

COLOURS = 8  # series with a colour of their own; further ones begin anew
_DOT = 5  # radius of a point
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 40  # room for the axes


def scatter(
    points: Sequence[tuple[float, float, str, int]],
    size: tuple[int, int],
    labels: tuple[str, str],
    way: Sequence[tuple[float, float]] | None = None,
) -> str:
    """Draws named points over a logarithmic x axis of bytes.

    Args:
        points: (x, y, name, series) of each; x is positive, y a percentage.
        size: Width and height.
        labels: Of the x and the y axis.
        way: The (x, y) that a line joins; None for the points of each series in their order.
    """
    xs, ys = [x for x, *_ in points], [y for _, y, *_ in points]
    room = max(0.15 * (max(ys) - min(ys)), 0.2)
    plot = _Plot(size, (min(xs) / 2, max(xs) * 2), (min(ys) - room, max(ys) + room), log_x=True)
    marks = [plot.axes(*labels, x_text=short_bytes)]
    joined = [(COLOURS - 1, way)] if way is not None else [
        (number, [(x, y) for x, y, _, own in points if own == number])
        for number in sorted({own for *_, own in points})
    ]  # fmt: skip
    for series, corners in joined:
        line = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in corners)
        marks.append(f'<polyline class="line s{series % COLOURS} faint" points="{line}"/>')
    dots = [(plot.x(x), plot.y(y)) for x, y, *_ in points]
    for (x, y, name, series), at in zip(points, dots, strict=True):
        said = escape(f"{name}: {y:.2f} % in {x:,.0f} bytes")
        marks.append(
            f'<circle class="dot s{series % COLOURS}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{_DOT}"><title>{said}</title></circle>'
        )
    taken = [(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in dots]
    marks += [_beside(at, name, size, taken) for (_, _, name, _), at in zip(points, dots, strict=True)]
    return _svg(size, marks, f"{labels[1]} over {labels[0]}")


def _beside(
    at: tuple[float, float], name: str, size: tuple[int, int], taken: list[tuple[float, float, float, float]]
) -> str:
    """Writes a point's name where it covers no point and no other name; leaves it out if there is no such place."""
    width, height = 6.8 * len(name), 12
    places = [(9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 19, "middle")]
    places += [(9, -9, "start"), (9, 18, "start"), (-9, -9, "end"), (-9, 18, "end")]
    for across, down, anchor in places:
        left = at[0] + across - {"start": 0, "end": width, "middle": width / 2}[anchor]
        box = (left, at[1] + down - height, left + width, at[1] + down + 2)
        inside = box[0] > _LEFT and box[2] < size[0] - 4 and box[1] > 0 and box[3] < size[1] - _BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            x, y = at[0] + across, at[1] + down
            return f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
    return ""


def _overlap(box: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    size: tuple[int, int],
    labels: tuple[str, str],
    log: bool = False,
) -> str:
    """Draws curves; a strip over each x shows the values of all.

    Args:
        series: {name: points (x, y)}. Values that cannot be drawn (not finite; on a logarithmic axis not positive)
            are left out of the lines, and said in the strips.
        size: Width and height.
        labels: Of the x and the y axis.
        log: Whether the y axis is logarithmic.
    """
    good = {
        name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
        for name, points in series.items()
    }
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in good.values() for _, y in points] or [1.0, 2.0]
    plot = _Plot(size, (min(xs), max(xs)), _roomy(min(ys), max(ys), log), log_y=log)
    marks = [plot.axes(*labels)]
    for number, points in enumerate(good.values()):
        colour = f"s{number % COLOURS}"
        way = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in points)
        marks.append(f'<polyline class="line {colour}" points="{way}"/>')
        if len(points) == 1:
            x, y = points[0]
            marks.append(f'<circle class="dot {colour}" cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="3"/>')
    every = sorted(set(xs))
    values = {name: dict(points) for name, points in series.items()}
    for before, x, after in zip([every[0], *every], every, [*every[1:], every[-1]], strict=False):
        left, right = plot.x((before + x) / 2), plot.x((x + after) / 2)
        said = "; ".join(f"{name} {found[x]:.4g}" for name, found in values.items() if x in found)
        title = escape(f"{labels[0]} {x:g}: {said}")
        marks.append(
            f'<rect class="strip" x="{left:.1f}" y="{_TOP}" width="{max(right - left, 2):.1f}" '
            f'height="{size[1] - _TOP - _BOTTOM}"><title>{title}</title></rect>'
        )
    return _svg(size, marks, f"{labels[1]} over {labels[0]}")


def _roomy(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.2, high * 1.2
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def stacked(rows: Sequence[tuple[str, Mapping[str, float]]], parts: Sequence[str], width: int) -> str:
    """Draws a bar for each row, made of its parts side by side.

    Args:
        rows: (name, {part: bytes}) of each.
        parts: The parts in the order of their colours.
        width: Of the chart; its height follows from the number of rows.
    """
    tall, room = 20, 0.36 * width
    most = max((sum(found.values()) for _, found in rows), default=0) or 1
    marks = []
    for number, (name, found) in enumerate(rows):
        y, x = number * tall, room
        shown = name if len(name) <= 22 else f"…{name[-21:]}"
        marks.append(
            f'<text class="name" x="{room - 6:.1f}" y="{y + 14}" text-anchor="end">{escape(shown)}'
            f"<title>{escape(name)}</title></text>"
        )
        for colour, part in enumerate(parts):
            long = (width - room - 64) * found.get(part, 0.0) / most
            title = escape(f"{name}, {part}: {found.get(part, 0.0):,.1f} bytes")
            if long > 0:
                marks.append(
                    f'<rect class="bar s{colour % COLOURS}" x="{x:.1f}" y="{y + 3}" width="{long:.2f}" height="{tall - 6}">'
                    f"<title>{title}</title></rect>"
                )
            x += long
        whole = sum(found.values())
        marks.append(f'<text class="tick" x="{x + 5:.1f}" y="{y + 14}">{whole:,.0f}</text>')
    return _svg((width, tall * len(rows) + 4), marks, "bytes of each tensor")


def bars(heights: Sequence[float], titles: Sequence[str], size: tuple[int, int], colour: int) -> str:
    """Draws a small histogram without axes; each bar has its title."""
    wide, most = size[0] / max(1, len(heights)), max(heights, default=0) or 1
    marks = []
    for number, (height, title) in enumerate(zip(heights, titles, strict=True)):
        tall = (size[1] - 2) * height / most
        if height:
            marks.append(
                f'<rect class="bar s{colour}" x="{number * wide:.2f}" y="{size[1] - tall:.2f}" width="{wide + 0.2:.2f}" '
                f'height="{max(tall, 0.6):.2f}"><title>{escape(title)}</title></rect>'
            )
    marks.append(f'<line class="axis" x1="0" x2="{size[0]}" y1="{size[1]}" y2="{size[1]}"/>')
    return _svg(size, marks, "histogram of weights")


def heatmap(counts: Sequence[Sequence[int]], names: Sequence[str], width: int) -> str:
    """Draws a confusion matrix: a row for each true class, a column for each answer, shaded by the row's share."""
    num = len(names)
    room = min(0.3 * width, 7 * max(len(name) for name in names) + 8)
    cell = (width - room) / num
    marks = []
    for row, line in enumerate(counts):
        total = sum(line) or 1
        marks.append(
            f'<text class="name" x="{room - 5:.1f}" y="{row * cell + cell / 2 + 4:.1f}" text-anchor="end">'
            f"{escape(_cut(names[row], room))}</text>"
        )
        for column, count in enumerate(line):
            kind = "right" if row == column else "wrong"
            title = escape(f"{names[row]} answered as {names[column]}: {count:,} of {sum(line):,}")
            shade = (
                count / total if kind == "right" else min(1, 4 * count / total)
            )  # so that few mistakes are seen
            x, y = room + column * cell, row * cell
            marks.append(
                f'<g><title>{title}</title><rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{cell:.1f}"/>'
                f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{cell:.1f}" opacity="{shade:.3f}"/>'
            )
            if count and cell >= 22:
                strong = " strong" if shade > 0.55 else ""
                marks.append(
                    f'<text class="tick{strong}" x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}" text-anchor="middle">{count}</text>'
                )
            marks.append("</g>")
    return _svg((width, math.ceil(num * cell) + 1), marks, "confusion matrix")


def _cut(name: str, room: float) -> str:
    most = max(1, int(room / 7))
    return name if len(name) <= most else f"{name[: most - 1]}…"


class _Plot:
    """Two axes: maps values to places, and draws the grid with its numbers."""

    def __init__(
        self,
        size: tuple[int, int],
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        self._size, self._ranges, self._logs = size, (x_range, y_range), (log_x, log_y)

    def x(self, value: float) -> float:
        return _LEFT + self._fraction(0, value) * (self._size[0] - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self._size[1] - _BOTTOM - self._fraction(1, value) * (self._size[1] - _TOP - _BOTTOM)

    def _fraction(self, axis: int, value: float) -> float:
        low, high = self._ranges[axis]
        if self._logs[axis]:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low) if high > low else 0.5

    def axes(self, x_label: str, y_label: str, x_text=None) -> str:
        width, height = self._size
        parts = []
        for tick in _ticks(*self._ranges[1], self._logs[1]):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
            )
        for tick in _ticks(*self._ranges[0], self._logs[0]):
            x, said = self.x(tick), (x_text or _number)(tick)
            parts.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
            )
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{said}</text>'
            )
        middle = (_LEFT + width - _RIGHT) / 2
        parts.append(
            f'<text class="label" x="{middle:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
        )
        up = (_TOP + height - _BOTTOM) / 2
        parts.append(
            f'<text class="label" transform="translate(12 {up:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
        )
        return "".join(parts)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Returns a few round numbers within a range."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if log:
        octaves = math.log10(high / low)
        found = LogLocator(subs=(1,) if octaves > 2.5 else (1, 2, 5)).tick_values(low, high)
    else:
        found = MaxNLocator(5).tick_values(low, high)
    inside = [float(tick) for tick in found if low <= tick <= high]
    return inside[:: math.ceil(len(inside) / 8)] if inside else []


def _number(value: float) -> str:
    return f"{value:.4g}"


def _svg(size: tuple[int, int], marks: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(label)}">{"".join(marks)}</svg>'
