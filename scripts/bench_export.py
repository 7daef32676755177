"""Exports packed students and tabulates what each target takes: bytes, top-1, latency, memory.

    python scripts/bench_export.py runs/lenet300_mnist/student.tiny recipes/lenet300_mnist.yaml
    python scripts/bench_export.py FILE RECIPE --to onnx onnx_int8 --against timm/resnet18

Times are of onnxruntime on one thread, the median of many calls; the networks take turns, so that other load on the machine falls on
all alike. `--against` is a network of random weights for the student's images, which answers nothing and only takes time.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from trainer.exporting.export import subject_of
from trainer.exporting.onnx_builder import IMAGE
from trainer.exporting.onnx_file import write_onnx
from trainer.exporting.onnx_session import session_of
from trainer.exporting.subject import needed
from trainer.networks.build import build
from trainer.runs.evaluate_file import opened
from trainer.runs.export_file import export_file

BATCHES = (1, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--to", nargs="+", default=["onnx", "onnx_int8"])
    parser.add_argument("--against", default="timm/resnet18", help="a model whose time is measured too")
    parser.add_argument("--seconds", type=float, default=3.0, help="of calls for each network and batch (3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        to = [*options.to, {"to": "onnx", "compressed": False, "folder": "onnx_dense"}]
        rows = export_file(options.file, to, Path(folder), options.recipe)
        dense = next(row["file_bytes"] for row in rows if row["stage"] == "onnx_dense")
        print(f"\n{options.file}: {options.file.stat().st_size:,} bytes")
        for row in rows:
            print(f"{row['stage']}: {dense / row['file_bytes']:.1f}x of the dense file's {dense:,} bytes")
        files = {row["stage"]: Path(folder) / row["stage"] / row["files"][0] for row in rows}
        files = {name: file for name, file in files.items() if file.suffix == ".onnx"}
        _, _, header = opened(options.file, None)
        other = subject_of(
            build({"model": options.against}, header["shape"], len(header["classes"])), header["shape"]
        )
        files[options.against] = Path(folder) / "against.onnx"
        write_onnx(other, files[options.against], compressed=False)
        print(f"\n{times(files, header['shape'], options.seconds, options.against)}")


def times(files: dict[str, Path], shape: list[int], seconds: float, slowest: str) -> str:
    """Returns a table of milliseconds for each file and batch, and how many times as fast as `slowest` it is."""
    sessions = {name: session_of(needed("onnxruntime", "onnx"), file) for name, file in files.items()}
    table: dict[str, list[str]] = {name: [name] for name in files}
    for batch in BATCHES:
        images = np.random.default_rng(0).random((batch, *shape), np.float32)
        taken: dict[str, list[float]] = {name: [] for name in files}
        while min(sum(each) for each in taken.values()) < seconds:
            for name, session in sessions.items():
                for _ in range(1 if name == slowest else 5):
                    started = time.perf_counter()
                    session.run(None, {IMAGE: images})
                    taken[name].append(time.perf_counter() - started)
            if len(taken[slowest]) >= 500:
                break
        median = {name: float(np.median(each)) for name, each in taken.items()}
        for name in files:
            table[name] += [f"{median[name] * 1e3:.3f}", f"{median[slowest] / median[name]:.0f}x"]
    heads = [head for batch in BATCHES for head in (f"ms at batch {batch}", "as fast")]
    return tabulate(list(table.values()), ["", *heads], tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    main()
