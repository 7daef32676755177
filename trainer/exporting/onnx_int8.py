"""Quantizes an ONNX file by onnxruntime's static quantization, and says what it is worth."""

import contextlib
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.exporting.integer_steps import is_quantized
from trainer.exporting.onnx_builder import IMAGE
from trainer.exporting.onnx_file import metadata, opened, serialized
from trainer.exporting.onnx_nodes import write_nodes
from trainer.exporting.onnx_session import session_of
from trainer.exporting.subject import Exported, Subject, needed
from trainer.exporting.timing import latency

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
BATCH = 32  # images at a time, at most


def write_int8(
    subject: Subject, path: Path, calibration: str, num_images: int, reduce_range: bool
) -> Exported:
    """Writes a subject with 8-bit weights and activations, calibrated on training images, and opens it.

    A quantized student keeps its own steps, and needs no calibration. reduce_range: whether weights take 7 bits.
    """
    runtime = needed("onnxruntime", "onnx")
    needed("onnx", "onnx")
    quantization: Any = needed("onnxruntime.quantization", "onnx")
    with tempfile.TemporaryDirectory() as folder:
        plain, folded = Path(folder) / "plain.onnx", Path(folder) / "folded.onnx"
        quantized = is_quantized(subject.graph)
        made = write_nodes(subject.graph)
        plain.write_bytes(serialized(made, subject.shape, len(subject.classes) or None, {}))
        if quantized:
            integers = write_nodes(subject.graph, integers=True)
            path.write_bytes(
                serialized(integers, subject.shape, len(subject.classes) or None, metadata(subject))
            )
        else:
            # BatchNorm goes into the convolutions first
            basic = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            session_of(runtime, plain, optimized=folded, level=basic)
            with _quietly():
                quantization.quantize_static(
                    folded,
                    path,
                    _Reader(subject, num_images),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    reduce_range=reduce_range,
                    calibrate_method=getattr(quantization.CalibrationMethod, METHODS[calibration]),
                )
            _tell(path, metadata(subject))
        dense = opened(plain, subject)
        image = np.zeros((1, *subject.shape), np.float32)
        seconds, num_bytes = latency(dense.run, image)[0], dense.num_bytes
    found = opened(path, subject)
    found.compared = "measured"
    found.verdict = lambda row: (
        f"{_kept(row)}, {found.num_bytes / num_bytes:.2f} times the bytes and "
        f"{row['latency_seconds'] / seconds:.2f} times the time of the dense float file "
        f"({num_bytes:,} bytes, {seconds * 1e3:.3f} ms)"
    )
    return found


def _kept(row: Mapping[str, Any]) -> str:
    """Returns what a file keeps of the student's accuracy, or where no image has a label, of its answers."""
    points = row["top1"] - row["top1_student"]
    if math.isnan(points):
        return f"{row['agreement_student']:.2f} % of the student's answers"
    return f"{points:+.2f} points of top-1"


def _tell(path: Path, facts: dict[str, str]) -> None:
    """Adds metadata to an ONNX file."""
    onnx = needed("onnx", "onnx")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, facts)
    path.write_bytes(model.SerializeToString())


class _Reader:
    """Hands out training images, as onnxruntime's calibration asks for them."""

    def __init__(self, subject: Subject, num_images: int) -> None:
        assert subject.data is not None
        num_images = min(num_images, len(subject.data.train))
        # Batches of one size: the histograms of entropy and percentile take no others.
        size = next(size for size in range(BATCH, 0, -1) if num_images % size == 0)
        batches = subject.batches(subject.data.train, size, num_images)
        self.batches: Iterator[dict[str, np.ndarray]] = (
            {IMAGE: subject.normalized(images)} for images, _ in batches
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silences the hints of onnxruntime's quantization, which are about files that it had not folded itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
