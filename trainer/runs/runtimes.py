"""Prepares torch, with dense and with sparse products, for `exporting.fresh.measured`.

onnxruntime and C, which run without torch, have theirs in `exporting.onnx_session` and `exporting.c_machines`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.exporting.fresh import Load
from trainer.exporting.sparse_products import Layout, with_sparse_products
from trainer.mistakes import Mistake
from trainer.runs.answering import open_student


def prepare_torch(file: str, own: str | None, allow_python: bool, threads: int) -> Load:
    """A file that torch runs."""
    torch.set_num_threads(threads)
    return lambda: on_arrays(open_student(Path(file), own, allow_python).answer)


def prepare_sparse(file: str, own: str | None, allow_python: bool, layout: Layout, threads: int) -> Load:
    """The same with sparse products."""
    torch.set_num_threads(threads)

    def load() -> Callable[[np.ndarray], Any]:
        return on_arrays(
            with_sparse_products(network_of(open_student(Path(file), own, allow_python)), layout)[0]
        )

    return load


def network_of(student: Any) -> nn.Module:
    """Returns the module of a file that torch runs as one. Raises Mistake for others."""
    if student.network is None:
        raise Mistake("its runtime holds no network of torch")
    return student.network


def on_arrays(answer: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a network as a function of arrays."""

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return answer(torch.from_numpy(images)).numpy()

    return run
