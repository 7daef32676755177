"""Exports the students of runs and tabulates what each target takes: bytes, top-1, latency, flash, RAM.

    python scripts/bench_export.py runs/lenet300_error158 runs/digits_mobilenet
    python scripts/bench_export.py runs/lenet300_mnist --to onnx onnx_int8 --against timm/resnet18

A folder of a run holds its recipe, report and student. The first rows are the teacher, and the student's network before it was pruned, both as
plain .onnx files: their accuracy is the report's. Times of onnxruntime are of the processor, on one thread: the first decile of many calls, since
other load on the machine only ever adds to them. The networks take turns, and a second table has the medians of the ratios of neighbouring
calls. The teacher and `--against`, a network for the student's images, are timed with random weights.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from trainer.exporting.export import subject_of
from trainer.exporting.onnx_builder import IMAGE
from trainer.exporting.onnx_file import write_onnx
from trainer.exporting.onnx_session import session_of
from trainer.exporting.subject import needed
from trainer.exporting.timing import latency
from trainer.networks.build import build, spec
from trainer.recipe.recipe import read
from trainer.runs.evaluate_file import opened
from trainer.runs.export_file import export_file

BATCHES = (1, 64)
DENSE = {"to": "onnx", "compressed": False, "folder": "dense"}
HEADS = ["", "bytes", "top-1 %", "as the student %", "ms, one image", "flash", "RAM", "instructions"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--to", nargs="+", default=["onnx", "onnx_int8", "c", "page"])
    parser.add_argument("--against", help="a further model whose time is measured")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of calls of the slowest network at each batch (3)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    for run in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            print(tabled(run, options.to, options.against, options.seconds, Path(folder)), flush=True)


def tabled(run: Path, to: list[str], against: str | None, seconds: float, folder: Path) -> str:
    """Returns the two tables of a run's student."""
    file, report = run / "student.tiny", json.loads((run / "report.json").read_text())
    recipe, _ = read(run / "recipe.yaml")
    rows = {row["stage"]: row for row in export_file(file, [*to, DENSE], folder, run / "recipe.yaml")}
    _, network, header = opened(file, recipe)
    files = {name: folder / name / row["files"][0] for name, row in rows.items()}
    files = {name: path for name, path in files.items() if path.suffix == ".onnx"}
    others = {"teacher": spec(recipe.teacher)} if recipe.teacher else {}
    others |= {against: {"model": against}} if against else {}
    for name, model in others.items():
        files[name] = folder / f"{len(files)}.onnx"
        _written({k: v for k, v in model.items() if k != "pretrained"}, header, files[name])
    milliseconds, ratios = times(files, header["shape"], seconds)
    stages = {row["stage"]: row for row in report["rows"]}
    taught = next(row for row in report["rows"] if row["stage"] != "teacher")
    table = []
    if recipe.teacher:
        size = files["teacher"].stat().st_size
        table.append(["teacher, dense .onnx", size, stages["teacher"]["top1"], None, milliseconds["teacher"]])
    size = rows["dense"]["file_bytes"]
    table.append([f"dense .onnx ({taught['stage']})", size, taught["top1"], None, milliseconds["dense"]])
    plain = torch.zeros(1, *header["shape"])
    with torch.inference_mode():
        taken = 1e3 * latency(lambda _: network(plain), plain.numpy())[0]
    table.append(["student.tiny (torch)", file.stat().st_size, stages["decoded"]["top1"], 100.0, taken])
    for name in to:
        row = rows[name]
        numbers = [row.get(key) for key in ("flash_bytes", "ram_bytes", "instructions")]
        own = 1e3 * row["latency_seconds"]
        table.append(
            [
                name,
                row["file_bytes"],
                row["top1"],
                row["agreement_student"],
                milliseconds.get(name, own),
                *numbers,
            ]
        )
    shown = [[_shown(value) for value in row] + ["–"] * (len(HEADS) - len(row)) for row in table]
    return "\n\n".join(
        [
            f"\n{run}",
            tabulate(shown, HEADS, tablefmt="pipe", disable_numparse=True, colalign=_right(HEADS)),
            ratios,
        ]
    )  # fmt: skip


def _written(model: dict[str, Any], header: dict[str, Any], file: Path) -> None:
    shape = header["shape"]
    write_onnx(subject_of(build(model, tuple(shape), len(header["classes"])), shape), file, compressed=False)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value


def times(files: dict[str, Path], shape: list[int], seconds: float) -> tuple[dict[str, float], str]:
    """Returns the milliseconds of each file for one image, and a table of all times in those of the dense file."""
    sessions = {name: session_of(needed("onnxruntime", "onnx"), file) for name, file in files.items()}
    table: dict[str, list[str]] = {name: [name] for name in files}
    single: dict[str, float] = {}
    for batch in BATCHES:
        images = np.random.default_rng(0).random((batch, *shape), np.float32)
        taken: dict[str, list[float]] = {name: [] for name in files}
        while max(sum(each) for each in taken.values()) < seconds or len(taken["dense"]) < 5:
            for name, session in sessions.items():
                session.run(None, {IMAGE: images})  # its weights are in the cache again
                started = time.thread_time()
                session.run(None, {IMAGE: images})
                taken[name].append(time.thread_time() - started)
        for name, each in taken.items():
            ratio = float(np.median(np.array(each) / np.array(taken["dense"])))
            single.setdefault(name, 1e3 * float(np.quantile(each, 0.1)))
            table[name] += [f"{1e3 * np.quantile(each, 0.1):.3f}", f"{ratio:.3f}"]
    heads = [head for batch in BATCHES for head in (f"ms at batch {batch}", "in the dense file's")]
    heads = ["", *heads]
    return single, tabulate(
        list(table.values()), heads, tablefmt="pipe", disable_numparse=True, colalign=_right(heads)
    )


def _right(heads: list[str]) -> list[str]:
    """Returns where the columns of a table stand: names to the left, numbers to the right."""
    return ["left", *["right"] * (len(heads) - 1)]


if __name__ == "__main__":
    main()
