"""A program of ExecuTorch, for phones and small Linux machines."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from trainer.exporting.subject import Exported, Subject, needed
from trainer.exporting.tracing import program_of
from trainer.mistakes import Mistake

MODULES = (
    "executorch",
    "executorch.exir",
    "executorch.backends.xnnpack.partition.xnnpack_partitioner",
    "executorch.runtime",
)


def pte(subject: Subject, folder: Path) -> Exported:
    """Writes student.pte, which ExecuTorch's runtime runs on Android, iOS and Linux, by XNNPACK where that has the operator.

    Its method forward takes one normalised image, float32 [1, C, H, W]; the weights are dense. facts.json beside it has
    classes, mean, std and shape. LSTM and GRU are unrolled step by step, which takes minutes. Proven by ExecuTorch's own runtime on this machine.
    """
    with _quiet():
        _, exir, xnnpack, executed = (needed(module, "pte") for module in MODULES)
        runtime = executed.Runtime.get()
        program = program_of(subject.network, subject.shape, 1)
        try:
            lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
            content = bytes(lowered.to_executorch().buffer)
        except Exception as error:  # ExecuTorch's many types
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise Mistake(
                f"to pte: ExecuTorch cannot write it: {type(error).__name__}: {reason[:200]}"
            ) from error
    files = [folder / "student.pte", folder / "facts.json"]
    files[0].write_bytes(content)
    files[1].write_text(json.dumps(subject.facts()), encoding="utf-8")
    held = runtime.load_program(files[0])  # the method reads it as long as it lives
    method = held.load_method("forward")

    def run(images: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(images).split(1)
        return torch.cat([method.execute([one])[0].clone() for one in inputs]).numpy()

    delegated = sum(
        node.op == "call_function" and "executorch_call_delegate" in str(node.target)
        for node in lowered.exported_program().graph.nodes
    )
    notes = [f"{delegated} parts run by XNNPACK; one image at a time"]
    return Exported(files, run, num_bytes=len(content), notes=notes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what ExecuTorch says of its own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
