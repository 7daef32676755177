"""One ordinary .onnx file."""

from pathlib import Path

from trainer.exporting.onnx_file import OPS as OPS
from trainer.exporting.onnx_file import write_onnx
from trainer.exporting.subject import Exported, Subject


def onnx(subject: Subject, folder: Path, *, compressed: bool = True) -> Exported:
    """Writes student.onnx, an ordinary file for onnxruntime 1.17 or newer: no custom operator, no unpacking step.

    compressed: whether pruned and shared weights are stored as gaps, codes and values, which standard operators make dense
    when the session loads; the network then runs at dense speed. Otherwise all weights are dense in the file.
    The input is `image`, float32 [N, C, H, W], normalised by the mean and std of the metadata; the output is `logits`.
    """
    return write_onnx(subject, folder / "student.onnx", compressed)
