"""Draws the plots of a report: accuracy against bytes, and the layers' weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.reporting import drawing
from trainer.reporting.drawing import GRID, INK
from trainer.reporting.tables import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


STUDENT, TEACHER = drawing.BLUE, "#8a8f94"
MOMENTS = {
    "dense": "#8a8f94",
    "pruned": "#c8743a",
    "recovered": "#2f6f9f",
    "clustered": "#8d7bb0",
    "shared": "#3d8a62",
}
LAYERS_A_PAGE = 8
SPIKES = 256  # a layer with at most this many distinct weights is drawn value by value


def is_teacher(row: Mapping[str, Any]) -> bool:
    """Returns whether a row is the teacher's."""
    return "teacher" in str(row["stage"])


def position_of(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Returns the position of a row, (bytes, top-1 in percent); None if either is unknown."""
    if missing(row.get("top1")) or not row.get("file_bytes"):
        return None
    return float(row["file_bytes"]), float(row["top1"])


def accuracy_against_bytes(report: Mapping[str, Any]) -> "Figure":
    """Draws top-1 accuracy over the bytes of the file: the student after each stage, and the teacher."""
    [[axes]] = drawing.grid(1, 1, (6.8, 3.9), (0, 0), top=0.5)
    drawing.calm(axes)
    placed = [(row, position) for row in report["rows"] if (position := position_of(row))]
    way = [position for row, position in placed if not is_teacher(row)]
    axes.plot([x for x, _ in way], [y for _, y in way], color=STUDENT, linewidth=1, alpha=0.4, zorder=2)
    for row, position in placed:
        colour, marker = (TEACHER, "D") if is_teacher(row) else (STUDENT, "o")
        axes.plot(*position, marker, color=colour, markersize=7, markeredgecolor="white", zorder=3)
    drawing.byte_axis(axes, [x for _, (x, _) in placed])
    _accuracy_axis(axes, [y for _, (_, y) in placed])
    axes.grid(color=GRID, linewidth=0.7)
    drawing.title(axes.figure, f"{report['name']}: accuracy against size")
    drawing.label(
        axes,
        [(position, str(row["stage"]), TEACHER if is_teacher(row) else STUDENT) for row, position in placed],
        way,
    )
    return axes.figure


def accuracy_against_latency(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws top-1 accuracy over the latency of one image with one thread, for the rows of a bench that have an accuracy."""
    [[axes]] = drawing.grid(1, 1, (6.8, 3.9), (0, 0), top=0.5)
    drawing.calm(axes)
    placed = [
        ((1000 * row["latency_seconds"], row["top1"]), f"{row['name']} ({row['runtime']})")
        for row in rows
        if row["threads"] == 1 and not missing(row["top1"])
    ]
    for position, _ in placed:
        axes.plot(*position, "o", color=STUDENT, markersize=7, markeredgecolor="white", zorder=3)
    drawing.log_axis(axes, [x for (x, _), _ in placed], lambda ms: f"{ms:.3g}", "one image, one thread (ms)")
    _accuracy_axis(axes, [y for (_, y), _ in placed])
    axes.grid(color=GRID, linewidth=0.7)
    drawing.title(axes.figure, "accuracy against latency")
    drawing.label(axes, [(position, name, STUDENT) for position, name in placed], ())
    return axes.figure


def _accuracy_axis(axes: "Axes", values: Sequence[float]) -> None:
    """Makes the accuracy axis linear if the values are close, else logarithmic in the error.

    On a logarithmic axis both a fall to 60 % and a tenth of a percent at 98 % can be seen.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    label = "top-1 accuracy on the test split (%)"
    if high - low <= 8:
        room = max(0.25 * (high - low), 0.2)
        bottom, top = low - room, high + room
        ticks = MaxNLocator(6).tick_values(bottom, top)
    else:
        best = 100 + max(0.05, (100 - high) / 10)  # an error of 0 has no logarithm
        axes.set_yscale("function", functions=(lambda y: -np.log(best - y), lambda z: best - np.exp(-z)))
        room = ((best - low) / (best - high)) ** 0.12
        bottom, top = best - (best - low) * room, best - (best - high) / room
        ticks = [0, 20, 40, 50, 60, 70, 80, 85, 90, 93, 95, 96, 97, 98, 98.5, 99, 99.5, 99.9, 100]
        label += ", log scale of the error"
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(
        FixedLocator([tick for tick in ticks if max(0, bottom) <= tick <= min(100, top)])
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}"))
    axes.set_ylabel(label, fontsize=9, color=INK)


def histograms(name: str, weights: Mapping[str, Mapping[str, np.ndarray]]) -> Iterable[tuple[str, "Figure"]]:
    """Yields (file name, figure) of the layers' weights, a few layers a page: a row for each layer, a column for each moment.

    weights: {moment: {layer: weights}}. "clustered" is left out if there is "shared": it looks almost the same.
    """
    moments = [moment for moment in weights if moment != "clustered" or "shared" not in weights]
    layers = list(dict.fromkeys(layer for moment in moments for layer in weights[moment]))
    pages = [layers[start : start + LAYERS_A_PAGE] for start in range(0, len(layers), LAYERS_A_PAGE)]
    for number, page in enumerate(pages, start=1):
        grid = drawing.grid(len(page), len(moments), (2.1, 1.3), (0.42, 0.32), top=0.7)
        for row, layer in zip(grid, page, strict=True):
            edges = _edges([weights[moment][layer] for moment in moments if layer in weights[moment]])
            for axes, moment in zip(row, moments, strict=True):
                _histogram(axes, weights[moment].get(layer), edges, MOMENTS.get(moment, STUDENT))
            short = layer if len(layer) <= 20 else f"…{layer[-19:]}"
            row[0].set_ylabel(f"{short}\nweights", fontsize=9, color=INK)
            row[0].yaxis.set_label_coords(-0.24, 0.5)
        for axes, moment in zip(grid[0], moments, strict=True):
            axes.set_title(
                moment, loc="left", fontsize=10, color=MOMENTS.get(moment, STUDENT), fontweight="bold"
            )
        for axes in grid[-1]:
            axes.set_xlabel("value", fontsize=9, color=INK)
        drawing.title(grid[0][0].figure, f"{name}: weights of each layer")
        yield ("weights.png" if len(pages) == 1 else f"weights_{number}.png"), grid[0][0].figure


def _edges(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Returns bin edges [62] around all weights of a layer, at all moments."""
    low = min(float(np.min(array)) for array in arrays)
    high = max(float(np.max(array)) for array in arrays)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, 62)


def _histogram(axes: "Axes", weight: np.ndarray | None, edges: np.ndarray, colour: str) -> None:
    """Draws the non-zero weights; few distinct values as one spike each. Zeros are a percentage in the text."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    drawing.calm(axes)
    if weight is None:
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[])
        return
    room = 0.03 * (edges[-1] - edges[0])
    axes.set_xlim(edges[0] - room, edges[-1] + room)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    )
    alive = weight[weight != 0]
    values, counts = np.unique(alive, return_counts=True)
    said = [f"{100 * (1 - alive.size / weight.size):.1f} % zeros"]
    if len(values) <= SPIKES and len(values) < alive.size:
        axes.vlines(values, 0, counts, color=colour, linewidth=1.4)
        axes.plot(values, counts, ".", color=colour, markersize=4)
        axes.set_ylim(0, 1.35 * counts.max())
        said.append(f"{len(values)} values")
    else:
        heights, _ = np.histogram(alive, edges)
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.85)
        axes.set_ylim(0, 1.35 * max(1, heights.max()))
    axes.text(
        0.98, 0.97, "\n".join(said), transform=axes.transAxes, ha="right", va="top", fontsize=7.5, color=INK
    )
