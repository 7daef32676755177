"""What a run has to show: report.json for programs, report.md and plots for people.

A row is what is known after a stage: "stage", "index", "top1", "top1_validation" and "agreement" (percent),
"num_weights", "num_nonzero", "sparsity" (share of zeros, 0 to 1), "file_bytes", "ratio_student",
"ratio_teacher", "seconds" and what the stage adds. A layer is "layer", "shape", "num_weights",
"num_nonzero", "sparsity", "thresholds" (a number or several, on |weight| unless the method says otherwise),
"clusters", "bits", "ratio_sharing", "file_bytes", "csr_bytes", "csc_bytes". What is not known is None or
left out.
"""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer import drawing, files
from trainer.drawing import GRID, INK
from trainer.mistakes import Mistake

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "numpy", "scipy", "scikit-learn", "safetensors", "pydantic",
    "matplotlib", "torch-pruning", "wandb",
)  # fmt: skip
NOTHING = "–"
# Of an account's rows: what is counted, and the bytes that mask and values would take by other means.
COUNTED = {"numel": "weights", "nonzero": "non-zero", "clusters": "clusters"}
OTHERWISE = {
    "iid_bytes": "i.i.d.", "huffman_bytes": "Huffman", "dense_huffman_bytes": "dense Huffman", "zlib_bytes": "zlib"
}

STUDENT, TEACHER = drawing.BLUE, "#8a8f94"
MOMENTS = {
    "dense": "#8a8f94",
    "pruned": "#c8743a",
    "recovered": "#2f6f9f",
    "clustered": "#8d7bb0",
    "shared": "#3d8a62",
}
LAYERS_A_PAGE = 8
SPIKES = 256  # a layer with at most so many different weights is drawn value by value


def write(folder: Path, report: Mapping[str, Any], weights: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write report.json, report.md and the plots into the folder, each file whole or not at all.

    report: "name", "recipe", "versions", "hardware", "seconds", "rows", "layers" and more if wanted;
        "command" and "seed" are shown in report.md. In report.json a number that is not finite is null.
    weights: moment ("dense", "pruned", "recovered", "clustered", "shared") -> layer -> weights of any shape.
    """
    folder = Path(folder)
    plots = {}
    if any(_place(row) for row in report["rows"]):
        plots["accuracy_bytes.png"] = _accuracy_against_bytes(report)
    for name, figure in _histograms(report["name"], weights):
        plots[name] = figure
    for name, figure in plots.items():
        files.write_bytes(folder / name, drawing.png(figure))
    files.write_bytes(folder / "report.md", _markdown(report, list(plots)).encode())
    data = json.dumps(files.plain(report, not_finite=lambda _: None), indent=1, ensure_ascii=False, allow_nan=False)
    files.write_bytes(folder / "report.json", data.encode())


def read(folder: Path) -> dict[str, Any]:
    """Read the report.json of a run's folder. Mistake naming the file when it is missing or not whole."""
    path = Path(folder) / "report.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Mistake(f"{path}: cannot be read: {error}") from error


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table that reads well as plain text and is Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "stage": lambda row: str(row["stage"]),
        "top-1 %": lambda row: _decimals(row.get("top1"), 2),
        "agreement %": lambda row: _decimals(row.get("agreement"), 2),
        "non-zero": lambda row: _count(row.get("num_nonzero")),
        "zeros %": lambda row: _decimals(row.get("sparsity"), 2, 100),
        "bytes": lambda row: _count(row.get("file_bytes")),
        "to student": lambda row: _ratio(row.get("ratio_student")),
        "to teacher": lambda row: _ratio(row.get("ratio_teacher")),
    }
    return _aligned(columns, rows, num_text=1)


def layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    """The layers as such a table; "formula" is `sharing_ratio`, "bytes" what the packed file spends."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "layer": lambda layer: str(layer["layer"]),
        "shape": lambda layer: "×".join(str(size) for size in layer["shape"]) or "scalar",
        "non-zero": lambda layer: _count(layer.get("num_nonzero")),
        "zeros %": lambda layer: _decimals(_sparsity(layer), 2, 100),
        "threshold": lambda layer: _thresholds(layer.get("thresholds")),
        "clusters": lambda layer: _count(layer.get("clusters")),
        "bits": lambda layer: _count(layer.get("bits")),
        "formula": lambda layer: _ratio(layer.get("ratio_sharing")),
        "bytes": lambda layer: _count(layer.get("file_bytes")),
        "CSR bytes": lambda layer: _count(layer.get("csr_bytes")),
        "CSC bytes": lambda layer: _count(layer.get("csc_bytes")),
    }
    return _aligned(columns, layers, num_text=2)


def byte_table(account: Sequence[Mapping[str, Any]]) -> str:
    """Where each byte of a packed file goes (`codec.account`), a row for each tensor; the last is the file.

    Beside it stands what masks and values would take otherwise: the i.i.d. entropy, Huffman-coded relative indexes
    and codes, Huffman-coded codes of all weights, and zlib.
    """
    tensors: dict[str, dict[str, float]] = {}
    for part in account:
        name = part["tensor"] or f"({part['part']})"
        row = tensors.setdefault(name, {"tensor": name, "bytes": 0.0})
        kind = part["part"] if part["part"] in ("mask", "values", "codebook") else "other"
        row[kind] = row.get(kind, 0.0) + part["bytes"]
        row["bytes"] += part["bytes"]
        row |= {key: part[key] for key in (*COUNTED, *OTHERWISE) if key in part}
    rows = list(tensors.values())
    numbers = ("mask", "values", "codebook", "other", "bytes", "numel", "nonzero", *OTHERWISE)
    whole = {key: sum(row[key] for row in rows if key in row) for key in numbers}
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "tensor": lambda row: row["tensor"],
        **{title: lambda row, key=key: _count(row.get(key)) for key, title in COUNTED.items()},
        **{key: lambda row, key=key: _decimals(row.get(key), 1) for key in numbers[:5]},
        **{title: lambda row, key=key: _decimals(row.get(key), 1) for key, title in OTHERWISE.items()},
    }
    text = _aligned(columns, [*rows, {"tensor": "file", **whole}], num_text=1)
    compared = [row for row in rows if "iid_bytes" in row]
    if not compared:
        return text
    ours = sum(row.get("mask", 0.0) + row["values"] for row in compared)
    beside = [f"{ours / whole[key]:.3f} of {title}" for key, title in OTHERWISE.items() if whole[key]]
    said = f"{ours:,.0f} bytes, {', '.join(beside)} (codebooks counted in none)"
    return f"{text}\n\nMasks and values of the weights: {said}."


def sharing_ratio(num_weights: int, bits: int, k: int) -> float:
    """How many times smaller weights get that share k values: r = n b / (n log2 k + k b) (Han et al. 2016).

    num_weights: n, the weights that are stored. bits: b, of one weight before, so 32 for float32. The
    positions of the weights that are left are not counted.
    """
    if min(num_weights, bits, k) < 1:
        raise ValueError(
            f"sharing_ratio: got {num_weights} weights of {bits} bits, {k} values; all are at least 1"
        )
    return num_weights * bits / (num_weights * math.log2(k) + k * bits)


def csr_bytes(weight: np.ndarray) -> int:
    """Bytes of a layer as compressed sparse rows of [out, rest]: values, column indices and row pointers."""
    return _sparse_bytes(weight, "csr")


def csc_bytes(weight: np.ndarray) -> int:
    """Bytes of a layer as compressed sparse columns of [out, rest]: values, row indices, column pointers."""
    return _sparse_bytes(weight, "csc")


def hardware() -> dict[str, Any]:
    """What this runs on: "cpu", "cores" (it may use), "torch_threads", "gpu" (names or None), "system"."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return {
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": ", ".join(gpus) or None,
        "system": platform.platform(),
    }


def command() -> str:
    """The command line that this process was started with, without the folders that programs lie in."""
    program = Path(sys.argv[0])
    name = "python -m trainer" if program.name == "__main__.py" else program.name
    return f"{name} {shlex.join(sys.argv[1:])}".rstrip()


def versions() -> dict[str, str]:
    """Versions of Python, of this package ("source" when not installed) and of the installed libraries."""
    found = {"python": platform.python_version(), "trainer": _version("tiny-student") or "source"}
    return found | {name: version for name in PACKAGES if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _sparse_bytes(weight: np.ndarray, layout: str) -> int:
    import scipy.sparse

    weight = np.asarray(weight)
    flat = weight.reshape(weight.shape[0] if weight.ndim else 1, -1) != 0  # scipy has no float16
    places = scipy.sparse.csr_array(flat) if layout == "csr" else scipy.sparse.csc_array(flat)
    return places.nnz * weight.itemsize + places.indices.nbytes + places.indptr.nbytes


# -- text


def _aligned(columns: Mapping[str, Callable[[Any], str]], items: Sequence[Any], num_text: int) -> str:
    """A Markdown table, its columns padded to one width; the first num_text are text, the others numbers."""
    cells = [
        list(columns),
        *([show(item).replace("|", "\\|") for show in columns.values()] for item in items),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if number < num_text else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(padded) + " |")
    rules = [
        "-" * width if number < num_text else "-" * (width - 1) + ":" for number, width in enumerate(widths)
    ]
    lines.insert(1, "| " + " | ".join(rules) + " |")
    return "\n".join(lines)


def _decimals(value: float | None, digits: int, times: float = 1) -> str:
    return NOTHING if _missing(value) else f"{value * times:,.{digits}f}"


def _count(value: float | None) -> str:
    return (
        NOTHING if _missing(value) else f"{value:,.0f}"
    )  # entropy-coded, a layer's bytes may be no whole number


def _ratio(value: float | None) -> str:
    return NOTHING if _missing(value) else f"{value:,.1f}×" if value < 1000 else f"{value:,.0f}×"


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _sparsity(layer: Mapping[str, Any]) -> float | None:
    if layer.get("sparsity") is None and layer.get("num_weights") and layer.get("num_nonzero") is not None:
        return 1 - layer["num_nonzero"] / layer["num_weights"]
    return layer.get("sparsity")


def _thresholds(value: float | Sequence[float] | None) -> str:
    several = sorted(value) if isinstance(value, Sequence) else [] if value is None else [value]
    if not several:
        return NOTHING
    low, high = f"{several[0]:.3g}", f"{several[-1]:.3g}"
    return low if low == high else f"{low} to {high}"


def _markdown(report: Mapping[str, Any], plots: Iterable[str]) -> str:
    recipe = report.get("recipe")
    seed = report.get("seed", recipe.get("seed") if isinstance(recipe, Mapping) else None)
    parts = [f"# {report['name']}"]
    facts = [f"took {_duration(report['seconds'])}"]
    if seed is not None:
        facts.append(f"seed {seed}")
    command = report.get("command")
    parts.append((f"`{command}`  \n" if command else "") + ", ".join(facts))
    parts += ["## Stages", table(report["rows"])]
    parts.append(
        "Top-1 and agreement with the teacher are on the test split. Bytes are those of the packed file at "
        "that stage; the ratios compare them with the dense student and the dense teacher."
    )
    if report["layers"]:
        parts += ["## Layers", layer_table(report["layers"])]
        parts.append(
            "Formula is the ratio by weight sharing alone, n·b / (n·log2 k + k·b), for the n weights left, "
            "of b = 32 bits, and k clusters; bytes are what the packed file really spends on the layer."
        )
    if plots := list(plots):
        parts += [
            "## Plots",
            *(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots),
        ]
    parts += ["## Hardware", _listed(report["hardware"]), "## Versions", _listed(report["versions"])]
    return "\n\n".join(parts) + "\n"


def _listed(facts: Mapping[str, Any]) -> str:
    return "\n".join(
        f"- {key.replace('_', ' ')}: {NOTHING if value is None else value}" for key, value in facts.items()
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


# -- plots


def _is_teacher(row: Mapping[str, Any]) -> bool:
    return "teacher" in str(row["stage"])


def _place(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Where a row is drawn: (bytes, top-1 in percent); None when either is not known."""
    if _missing(row.get("top1")) or not row.get("file_bytes"):
        return None
    return float(row["file_bytes"]), float(row["top1"])


def _accuracy_against_bytes(report: Mapping[str, Any]) -> "Figure":
    """Top-1 over the bytes of the file: the student's way from stage to stage, and the teacher."""
    [[axes]] = drawing.grid(1, 1, (6.8, 3.9), (0, 0), top=0.5)
    drawing.calm(axes)
    placed = [(row, place) for row in report["rows"] if (place := _place(row))]
    way = [place for row, place in placed if not _is_teacher(row)]
    axes.plot([x for x, _ in way], [y for _, y in way], color=STUDENT, linewidth=1, alpha=0.4, zorder=2)
    for row, place in placed:
        colour, marker = (TEACHER, "D") if _is_teacher(row) else (STUDENT, "o")
        axes.plot(*place, marker, color=colour, markersize=7, markeredgecolor="white", zorder=3)
    drawing.byte_axis(axes, [x for _, (x, _) in placed])
    _accuracy_axis(axes, [y for _, (_, y) in placed])
    axes.grid(color=GRID, linewidth=0.7)
    drawing.title(axes.figure, f"{report['name']}: accuracy against size")
    drawing.label(
        axes,
        [(place, str(row["stage"]), TEACHER if _is_teacher(row) else STUDENT) for row, place in placed],
        way,
    )
    return axes.figure


def _accuracy_axis(axes: "Axes", values: Sequence[float]) -> None:
    """Plain where the accuracies are near each other. Otherwise spaced by the logarithm of the error, so
    that a fall
    to 60 % and a tenth of a percent at 98 % can both be seen."""
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


def _histograms(name: str, weights: Mapping[str, Mapping[str, np.ndarray]]) -> Iterable[tuple[str, "Figure"]]:
    """(file name, figure) of the weights: a row for each layer, a column for each moment; a few layers a
    page.

    "clustered" is left out where "shared" is there: the same values before their training, hardly to be
    told apart.
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
    """Bin edges [62] that hold all the weights of a layer, at all moments."""
    low = min(float(np.min(array)) for array in arrays)
    high = max(float(np.max(array)) for array in arrays)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, 62)


def _histogram(axes: "Axes", weight: np.ndarray | None, edges: np.ndarray, colour: str) -> None:
    """The weights that are not zero; few different values as one spike each. Zeros are said in words."""
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
