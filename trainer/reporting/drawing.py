"""Tools for the plots of reports, scans and ladders: figures, a byte axis, labels."""

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, GRID, BLUE, GREY = "#33383d", "#e3e6e8", "#2f6f9f", "#b4babf"


def png(figure: "Figure") -> bytes:
    """Returns a figure as PNG bytes."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def grid(
    num_rows: int, num_columns: int, size: tuple[float, float], gaps: tuple[float, float], top: float
) -> Any:
    """Makes a figure; returns its axes, an array [num_rows, num_columns].

    It uses neither pyplot, which has global state, nor matplotlib's layout, which takes longer than all the rest.

    Args:
        num_rows: Rows of axes.
        num_columns: Columns of axes.
        size: Width and height of each, in inches.
        gaps: Between two columns and two rows, in inches.
        top: Room above, in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    left, right, bottom = 0.85, 0.2, 0.55
    width = left + num_columns * (size[0] + gaps[0]) - gaps[0] + right
    height = top + num_rows * (size[1] + gaps[1]) - gaps[1] + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left / width,
        bottom / height,
        1 - right / width,
        1 - top / height,
        gaps[0] / size[0],
        gaps[1] / size[1],
    )
    return figure.subplots(num_rows, num_columns, squeeze=False)


def title(figure: "Figure", text: str) -> None:
    """Writes a title at the upper left of a figure."""
    figure.text(
        0.1 / figure.get_figwidth(), 1 - 0.1 / figure.get_figheight(), text, fontsize=11, color=INK, va="top"
    )


def calm(axes: "Axes") -> None:
    """Removes the upper and right spines and greys the others."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, which="both", labelsize=8, length=3, color=GREY)
    axes.set_axisbelow(True)


def byte_axis(axes: "Axes", values: Sequence[float]) -> None:
    """Makes the x axis a logarithmic axis of bytes."""
    log_axis(axes, values, short_bytes, "size of the file")


def log_axis(axes: "Axes", values: Sequence[float], text: Callable[[float], str], label: str) -> None:
    """Makes the x axis logarithmic.

    values: those that are drawn. text: how a value is written. label: of the axis.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values), max(values)
    room = max(1.7, 4 / math.sqrt(high / low))  # so that points of one size do not fill the plot
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    decades = math.log10(high / low * room**2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 3 else (1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axes.set_xlabel(label, fontsize=9, color=INK)


def label(
    axes: "Axes",
    points: Sequence[tuple[tuple[float, float], str, str]],
    way: Sequence[Any],
    others: Sequence[tuple[float, float]] = (),
) -> None:
    """Writes labels beside points, each where it hides least. Points in one spot have one label.

    Args:
        axes: The axes.
        points: (position, name, colour) of each point.
        way: Positions of the line that is drawn through the points.
        others: Positions of points without a label.
    """
    spots: list[tuple[np.ndarray, tuple[float, float], str, list[str], list[float]]] = []
    for position, name, colour in points:
        pixels = axes.transData.transform(position)
        spot = next((spot for spot in spots if spot[2] == colour and math.dist(spot[0], pixels) < 8), None)
        if spot is None:
            spot = (pixels, position, colour, [], [])
            spots.append(spot)
        spot[3].append(name)
        spot[4].append(position[1])

    from matplotlib.patheffects import withStroke

    corners = [axes.transData.transform(position) for position in way]
    line = [start + (end - start) * part for start, end in zip(corners[:-1], corners[1:], strict=True)
            for part in np.linspace(0, 1, 40)]  # fmt: skip
    marks = [spot[0] for spot in spots] + [axes.transData.transform(position) for position in others]
    inside = axes.get_window_extent().extents
    pixels_a_point = axes.figure.dpi / 72
    taken: list[tuple[float, float, float, float]] = []
    for pixels, position, colour, names, accuracies in spots:
        note = axes.annotate(
            f"{', '.join(names)}  {_span(accuracies)} %", position, (0, 0), textcoords="offset points",
            fontsize=8, color=colour, va="center", zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
        size = note.get_window_extent()
        best = None
        for x, y, side in _offsets():
            far = math.hypot(x, y)
            left = pixels[0] + x * pixels_a_point - {"left": 0, "center": 0.5, "right": 1}[side] * size.width
            middle = pixels[1] + y * pixels_a_point
            box = (
                left - 3,
                middle - size.height / 2 - 2,
                left + size.width + 3,
                middle + size.height / 2 + 2,
            )
            outside = box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]
            hides = (
                500 * sum(_overlap(box, other) for other in taken)
                + 60 * _within(box, marks)
                + 3 * _within(box, line)
            )
            if best is None or 1000 * outside + hides + far < best[0]:
                best = (1000 * outside + hides + far, x, y, side, box)
        assert best is not None
        _, x, y, side, box = best
        note.set_position((x, y))
        note.set_horizontalalignment(side)
        taken.append(box)
        if math.hypot(x, y) > 20:
            arrow = {
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "linestyle": ":",
                "shrinkA": 2,
                "shrinkB": 4,
            }
            axes.annotate("", position, (x, y), textcoords="offset points", arrowprops=arrow)


def _offsets() -> list[tuple[float, float, Literal["left", "center", "right"]]]:
    """Returns offsets of a label from its point (in points, 1/72 inch), and the end of the text that faces the point."""
    found: list[tuple[float, float, Literal["left", "center", "right"]]] = []
    for far in (9, 18, 30, 45, 60):
        for height in (0, far, -far, far / 2, -far / 2):
            found += [(far, height, "left"), (-far, height, "right")]
        found += [(0, far, "center"), (0, -far, "center")]
    return found


def _overlap(box: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _within(box: tuple[float, float, float, float], pixels: Sequence[np.ndarray]) -> int:
    """Returns how many of the pixels lie in the box (left, bottom, right, top)."""
    return sum(box[0] < x < box[2] and box[1] < y < box[3] for x, y in pixels)


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def short_bytes(value: float) -> str:
    """Returns a number of bytes in at most three digits, as '9.01 kB'."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} B"
