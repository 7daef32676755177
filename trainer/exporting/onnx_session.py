"""Opens an ONNX file by onnxruntime. Imports nothing heavy: it runs in processes that are measured."""

from pathlib import Path
from typing import Any

import numpy as np

from trainer.exporting.fresh import Load
from trainer.exporting.installed import needed


def session_of(
    runtime: Any,
    file: Path | bytes,
    optimized: Path | None = None,
    level: Any = None,
    threads: int | None = None,
) -> Any:
    """Returns a session on the CPU.

    file: the file, or its content; optimized: where the graph that it runs is written; level: of onnxruntime's optimizations (all); threads: those of torch
    when not given.
    """
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if level is not None:
        options.graph_optimization_level = level
    return runtime.InferenceSession(
        file if isinstance(file, bytes) else str(file), options, providers=["CPUExecutionProvider"]
    )


def prepare(file: str, threads: int) -> Load:
    """Prepares onnxruntime for `fresh.measured`."""
    runtime = needed("onnxruntime", "onnx")

    def load():
        session = session_of(runtime, Path(file), threads=threads)
        name = session.get_inputs()[0].name

        def run(images: np.ndarray) -> np.ndarray:
            return session.run(None, {name: images})[0]

        return run

    return load
