"""A Core ML package, for iPhones, iPads and Macs."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from trainer.exporting.mil import check, compute, program_of
from trainer.exporting.subject import Exported, Subject, needed
from trainer.mistakes import Mistake

# Those that were compared; others are refused, since nothing here could tell whether they are right.
OPS = frozenset(
    """conv linear batch_norm layer_norm max_pool avg_pool mean amax relu hardswish hardsigmoid silu sigmoid tanh exp abs
    erf neg clamp gelu leaky_relu softmax add sub mul div concat reshape permute slice quantize""".split()
)


def coreml(subject: Subject, folder: Path) -> Exported:
    """Writes student.mlpackage, an ML program in float32 for iOS 16, macOS 13 or newer.

    Its input `image` is one normalised image, float32 [1, C, H, W], its output `logits`; the weights are dense. Its metadata
    have classes, mean, std and shape. Core ML is on Apple's systems alone and is not run here: the saved package is read back,
    and its operators are computed by torch, one by one, on all test images. There is no latency.
    """
    with _quiet():
        coremltools = needed("coremltools", "coreml")
        images = torch.zeros(1, *subject.shape)
        try:
            # By the tracer, not torch.export: coremltools 9 reads pooling without a stride there alone.
            model = coremltools.convert(
                torch.jit.trace(subject.network, images),
                inputs=[coremltools.TensorType(name="image", shape=images.shape)],
                outputs=[coremltools.TensorType(name="logits")],
                convert_to="mlprogram",
                compute_precision=coremltools.precision.FLOAT32,
                minimum_deployment_target=coremltools.target.iOS16,
                skip_model_load=True,
            )
        except Exception as error:  # coremltools' many types
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise Mistake(
                f"to coreml: coremltools cannot write it: {type(error).__name__}: {reason[:200]}"
            ) from error
        for key, value in subject.facts().items():
            model.user_defined_metadata[key] = json.dumps(value)
        package = folder / "student.mlpackage"
        model.save(str(package))
        function = program_of(coremltools, package)
    check(function)
    files = sorted(path for path in package.rglob("*") if path.is_file())

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return torch.cat([compute(function, one) for one in torch.from_numpy(images).split(1)]).numpy()

    return Exported(
        files,
        run,
        num_bytes=sum(file.stat().st_size for file in files),
        numbers={"latency_seconds": None, "latency_p95_seconds": None},
        notes=[
            "not run by Core ML, which is on Apple's systems alone: the saved program was read back and computed by torch, operator "
            "by operator"
        ],
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what coremltools and torch say of versions, progress and their own future."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
