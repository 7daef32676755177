"""An .onnx file in 8-bit integers, by onnxruntime's static quantization."""

from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from trainer.exporting.graph import Graph
from trainer.exporting.integer_steps import is_quantized
from trainer.exporting.onnx_file import OPS as OPS
from trainer.exporting.onnx_int8 import write_int8
from trainer.exporting.subject import Exported, Subject
from trainer.mistakes import Mistake

NEEDS_DATA = True
# Keys that a quantized student leaves without effect.
OF_CALIBRATION = {"calibration", "images", "reduce_range"}


def check_graph(settings: Any, graph: Graph) -> None:
    """Raises Mistake for keys that a quantized student leaves without effect."""
    given = sorted(settings.model_fields_set & OF_CALIBRATION)
    if given and is_quantized(graph):
        raise Mistake(
            f"to onnx_int8: {', '.join(given)}: no effect: the student is quantized, and its own steps are written"
        )


def onnx_int8(
    subject: Subject,
    folder: Path,
    *,
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax",
    images: PositiveInt = 256,
    reduce_range: bool = True,
) -> Exported:
    """Writes student_int8.onnx: weights on 8 bits for each channel, activations on 8 bits, by onnxruntime's own quantization (QDQ).

    calibration: how the ranges of the activations are chosen. images: how many training images they are chosen from.
    reduce_range: whether weights take 7 of their 8 bits. Processors of the x86 kind without VNNI add two products in 16 bits,
    which 8 bits overflow: EfficientNet-Lite0 had 85.6 % there instead of 90.3, and with 7 bits 90.1.
    The answers are not the student's: how many differ is measured and said, beside bytes and time. It makes small students
    larger and slower more often than not. After a stage quantize the steps are those that the student has learnt, and all three
    keys are refused.
    """
    return write_int8(subject, folder / "student_int8.onnx", calibration, images, reduce_range)
