"""Makes tables of stages, layers and bytes, as Markdown that reads well as plain text."""

import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from trainer.mistakes import printable

NOTHING = "–"
# Titles of an account's entries: counts, and the bytes of mask and values in other codes.
COUNTED = {"numel": "weights", "nonzero": "non-zero", "clusters": "clusters"}
FURTHER = {
    "top5": "top-5",
    "balanced": "balanced",
}  # accuracies that rows have where they say more than the top-1
FOLDED = 20  # a network with more layers than this is shown block by block, and its layers folded away
RATIOS_SAY = (
    "A ratio is the norm of the gradient of a weighted loss over that of the labels' cross-entropy of weight 1, for the student's "
    "weights; first and last as measured in the training. Far above 1 a loss drowns the labels, far below it does nothing."
)
OTHERWISE = {
    "iid_bytes": "i.i.d.",
    "huffman_bytes": "Huffman",
    "dense_huffman_bytes": "dense Huffman",
    "zlib_bytes": "zlib",
}


def table(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> str:
    """Returns a report's rows as a table. width: the characters that a line may have (`_aligned`)."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "stage": lambda row: str(row["stage"]),
        "top-1 %": lambda row: decimals(row.get("top1"), 2),
        **{f"{name} %": lambda row, k=key: decimals(row.get(k), 2) for key, name in FURTHER.items()},  # type: ignore[misc]
        "agreement %": lambda row: decimals(row.get("agreement"), 2),
        "non-zero": lambda row: _count(row.get("num_nonzero")),
        "zeros %": lambda row: decimals(row.get("sparsity"), 2, 100),
        "bytes": lambda row: _count(row.get("file_bytes")),
        "to student": lambda row: _ratio(row.get("ratio_student")),
        "to teacher": lambda row: _ratio(row.get("ratio_teacher")),
    }
    for key, name in FURTHER.items():
        if all(row.get(key) is None for row in rows):
            del columns[f"{name} %"]
    return _aligned(columns, rows, 1, width, ("non-zero", "zeros %", "to student", "agreement %"))


def class_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns the classes of a test split as a table. found: {"name", "images", "right", "answered"} of each."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "class": lambda row: str(row["name"]),
        "images": lambda row: _count(row["images"]),
        "right": lambda row: _count(row["right"]),
        "right %": lambda row: decimals(row["right"] / row["images"] if row["images"] else None, 2, 100),
        "answered": lambda row: _count(row["answered"]),
    }
    return _aligned(columns, found, num_text=1)


def confusion_table(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Returns a confusion matrix as a table: a row for each true class, a column for each answer."""
    columns: dict[str, Callable[[Any], str]] = {"true class": lambda row: str(row[0])}
    columns |= {name: lambda row, at=at: _count(row[1][at]) for at, name in enumerate(classes)}  # type: ignore[misc]
    return _aligned(columns, list(zip(classes, counts, strict=True)), num_text=1)


def export_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows of exports as a table: what each target takes, and how its real runtime answers."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "to": lambda row: str(row["stage"]),
        "bytes": lambda row: _count(row.get("file_bytes")),
        "top-1 %": lambda row: decimals(row.get("top1"), 2),
        "as the student %": lambda row: decimals(row.get("agreement_student"), 2),
        "images": lambda row: _count(row.get("num_images")) + " random" * bool(row.get("random_inputs")),
        "ties": lambda row: _count(row.get("num_near_ties")),
        "largest difference": lambda row: f"{row['max_difference']:.2g}",
        "median ms": lambda row: decimals(row.get("latency_seconds"), 3, 1000),
        "p95 ms": lambda row: decimals(row.get("latency_p95_seconds"), 3, 1000),
    }
    further = {
        "memory MB": ("peak_bytes", 1e-6, 1),
        "flash": ("flash_bytes", 1, 0),
        "RAM": ("ram_bytes", 1, 0),
        "instructions": ("instructions", 1, 0),
    }
    for title, (key, times, digits) in further.items():
        if any(row.get(key) is not None for row in rows):
            columns[title] = lambda row, k=key, t=times, d=digits: decimals(row.get(k), d, t)  # type: ignore[misc]
    return _aligned(columns, rows, num_text=1)


def weight_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns what each loss of the stages weighs (`weighed`) as a table."""
    found = weighed(rows)
    twice = any("first" in term for term in found)
    first: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "first ratio": lambda term: _significant(term.get("first"))
    }
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "stage": lambda term: str(term["stage"]),
        "loss": lambda term: str(term["term"]),
        "weight": lambda term: _significant(term["weight"]),
        **(first if twice else {}),
        "last ratio" if twice else "ratio": lambda term: _significant(term["last"]),
        "weight for 1": lambda term: _significant(term["balanced"]),
    }
    return _aligned(columns, found, num_text=2)


def weighed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each loss of each stage: "stage", "term", "weight", its ratios "first" and "last", and "balanced".

    balanced: the weight that would have made the last ratio 1.
    """
    return [
        {
            "stage": row["stage"],
            "term": name,
            **found,
            "balanced": found["weight"] / found["last"] if found["last"] else None,
        }
        for row in rows
        for name, found in (row.get("ratios") or {}).items()
    ]


def bench_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows of a bench as a table; memory is what a process needs beside its runtime."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "file": lambda row: str(row["name"]),
        "runtime": lambda row: str(row["runtime"]),
        "threads": lambda row: _count(row["threads"]),
        "bytes": lambda row: _count(row["file_bytes"]),
        "top-1 %": lambda row: decimals(row.get("top1"), 2),
        "load ms": lambda row: decimals(row["load_seconds"], 1, 1000),
        "memory MB": lambda row: decimals(row.get("own_bytes"), 1, 1e-6),
        "1 image ms": lambda row: decimals(row["latency_seconds"], 3, 1000),
        "p95": lambda row: decimals(row["latency_p95_seconds"], 3, 1000),
        "64 images ms": lambda row: decimals(row["batch_seconds"], 2, 1000),
        "p95 of 64": lambda row: decimals(row["batch_p95_seconds"], 2, 1000),
        "images/s": lambda row: _count(row["images_per_second"]),
    }
    return _aligned(columns, rows, num_text=2)


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows of `comparison.rows_of` as a table; * marks the runs that no other beats in bytes and accuracy."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "run": lambda row: str(row["run"]) + " *" * row["front"],
        "top-1 %": lambda row: decimals(row.get("top1"), 2),
        "agreement %": lambda row: decimals(row.get("agreement"), 2),
        "zeros %": lambda row: decimals(row.get("sparsity"), 2, 100),
        "bytes": lambda row: _count(row.get("file_bytes")),
        "to teacher": lambda row: _ratio(row.get("ratio_teacher")),
        "teacher %": lambda row: decimals(row["teacher_top1"], 2),
        "time": lambda row: duration(row["run_seconds"]),
        "seed": lambda row: NOTHING if row["seed"] is None else str(row["seed"]),
    }
    return _aligned(columns, rows, num_text=1)


def layer_table(layers: Sequence[Mapping[str, Any]], width: int | None = None) -> str:
    """Returns a report's layers, or its blocks (`by_block`), as a table.

    "formula" is `sharing_ratio`, "bytes" those of the packed file. width: the characters that a line may have (`_aligned`).
    """
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "layer": lambda layer: str(layer["layer"]),
        "shape": lambda layer: (
            f"{layer['layers']} layers"
            if "layers" in layer
            else "×".join(map(str, layer["shape"])) or "scalar"
        ),
        "non-zero": lambda layer: _count(layer.get("num_nonzero")),
        "zeros %": lambda layer: decimals(_sparsity(layer), 2, 100),
        "threshold": lambda layer: _thresholds(layer.get("thresholds")),
        "clusters": lambda layer: _count(layer.get("clusters")),
        "bits": lambda layer: _count(layer.get("bits")),
        "formula": lambda layer: _ratio(layer.get("ratio_sharing")),
        "bytes": lambda layer: _count(layer.get("file_bytes")),
        "CSR bytes": lambda layer: _count(layer.get("csr_bytes")),
        "CSC bytes": lambda layer: _count(layer.get("csc_bytes")),
    }
    spare = ("CSC bytes", "CSR bytes", "formula", "threshold", "bits", "shape", "non-zero", "clusters")
    return _aligned(columns, layers, 2, width, spare)


def by_block(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each block of a network, with the sums of its layers; `layers` has their number.

    A block is what layers share up to the first number in their dotted names: blocks.1.0.conv and blocks.1.1.conv
    are of blocks.1. A layer without a number is a block of its own.
    """
    blocks: dict[str, dict[str, Any]] = {}
    for layer in layers:
        parts = str(layer["layer"]).split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        name = ".".join(parts if number is None else parts[: number + 1])
        row = blocks.setdefault(name, {"layer": name, "layers": 0})
        row["layers"] += 1
        for key in ("num_weights", "num_nonzero", "file_bytes", "csr_bytes", "csc_bytes"):
            if layer.get(key) is not None:
                row[key] = row.get(key, 0) + layer[key]
    return list(blocks.values())


def duration(seconds: float) -> str:
    """Returns a duration as text: '19 s', '12 min', '3 h 5 min'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def byte_table(account: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of where each byte of a packed file goes: a row for each tensor, the last for the file.

    Further columns have the bytes of masks and values in other codes: the i.i.d. entropy, Huffman-coded relative
    indexes and codes, Huffman-coded codes of all weights, and zlib. account: of `packing.container.account`.
    """
    tensors: dict[str, dict[str, Any]] = {}
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

    def count_of(key: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: _count(row.get(key))

    def bytes_of(key: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: decimals(row.get(key), 1)

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "tensor": lambda row: row["tensor"],
        **{title: count_of(key) for key, title in COUNTED.items()},
        **{key: bytes_of(key) for key in numbers[:5]},
        **{title: bytes_of(key) for key, title in OTHERWISE.items()},
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
    """Returns the compression ratio of weights that share k values: n b / (n log2 k + k b) (Han et al. 2016).

    The positions of the remaining weights are not counted.

    Args:
        num_weights: n, the number of stored weights.
        bits: b, of one weight before, so 32 for float32.
        k: Number of shared values.

    Raises:
        ValueError: For a number below 1.
    """
    if min(num_weights, bits, k) < 1:
        raise ValueError(
            f"sharing_ratio: got {num_weights} weights of {bits} bits, {k} values; all are at least 1"
        )
    return num_weights * bits / (num_weights * math.log2(k) + k * bits)


def csr_bytes(weight: np.ndarray) -> int:
    """Returns the bytes of a layer as compressed sparse rows of [out, rest]: values, column indices, row pointers."""
    return _sparse_bytes(weight, "csr")


def csc_bytes(weight: np.ndarray) -> int:
    """Returns the bytes of a layer as compressed sparse columns of [out, rest]: values, row indices, column pointers."""
    return _sparse_bytes(weight, "csc")


def _sparse_bytes(weight: np.ndarray, layout: str) -> int:
    import scipy.sparse

    weight = np.asarray(weight)
    flat = weight.reshape(weight.shape[0] if weight.ndim else 1, -1) != 0  # scipy has no float16
    sparse = scipy.sparse.csr_array(flat) if layout == "csr" else scipy.sparse.csc_array(flat)
    return sparse.nnz * weight.itemsize + sparse.indices.nbytes + sparse.indptr.nbytes


def terminal_width() -> int | None:
    """Returns how many characters a line of the terminal has that stdout is; None where it is none."""
    return (os.get_terminal_size(sys.stdout.fileno()).columns or None) if sys.stdout.isatty() else None


def _aligned(
    columns: Mapping[str, Callable[[Any], str]],
    items: Sequence[Any],
    num_text: int,
    width: int | None = None,
    spare: Sequence[str] = (),
) -> str:
    """Returns a Markdown table with padded columns; the first num_text are text, the others numbers.

    Where a line would be longer than `width`, the table has no rules between columns and heads of several lines, and as many of
    the `spare` columns are left out, the first of them first, as have no room.
    """
    columns = {_cell(name): show for name, show in columns.items()}
    text = _drawn(columns, items, num_text, "pipe")
    if width is None or _width(text) <= width:
        return text
    for count in range(len(spare) + 1):
        left_out = spare[:count]
        kept = {name.replace(" ", "\n"): show for name, show in columns.items() if name not in left_out}
        texts = sum(name not in left_out for name in list(columns)[:num_text])
        text = _drawn(kept, items, texts, "simple")
        if _width(text) <= width:
            break
    return text


def _drawn(
    columns: Mapping[str, Callable[[Any], str]], items: Sequence[Any], num_text: int, form: str
) -> str:
    cells = [[_cell(show(item)) for show in columns.values()] for item in items]
    sides = ["left"] * num_text + ["right"] * (len(columns) - num_text)
    return tabulate(
        cells, list(columns), tablefmt=form, colalign=sides if cells else None, disable_numparse=True
    )


def _cell(text: str) -> str:
    """Returns a text of the user's as a cell: an end of its line, or a rule in it, would break the table, and HTML the page."""
    return re.sub(r"<(?=[A-Za-z/!?])", r"\\<", printable(text, keep="").replace("|", "\\|"))


def _width(text: str) -> int:
    return max(map(len, text.splitlines()), default=0)


def decimals(value: float | None, digits: int, times: float = 1) -> str:
    """Returns a value times a number with so many digits after the point, and thousands apart; a dash for a missing one."""
    return NOTHING if value is None or missing(value) else f"{value * times:,.{digits}f}"


def percent(value: float | None) -> str:
    """Returns a percentage as text, "98.17 %"; a dash for a missing one."""
    return NOTHING if missing(value) else f"{value:.2f} %"


def _significant(value: float | None) -> str:
    return NOTHING if value is None or missing(value) else f"{value:.3g}"


def _count(value: float | None) -> str:
    return (
        NOTHING if missing(value) else f"{value:,.0f}"
    )  # entropy-coded, a layer's bytes may be no whole number


def _ratio(value: float | None) -> str:
    if value is None or missing(value):
        return NOTHING
    return f"{value:,.1f}×" if value < 1000 else f"{value:,.0f}×"


def missing(value: float | None) -> bool:
    """Returns whether a value is None, infinite or NaN."""
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
