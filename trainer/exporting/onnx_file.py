"""Assembles an ONNX file, and runs it by onnxruntime."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.exporting.onnx_builder import IMAGE, LOGITS, Builder
from trainer.exporting.onnx_nodes import WRITERS, write_nodes
from trainer.exporting.onnx_weights import compress
from trainer.exporting.subject import Exported, Subject, needed

OPS = frozenset(WRITERS)
SHOWN = 5  # logits of the test vector that are in the metadata
OPSET, IR_VERSION = 18, 8  # what onnxruntime 1.17 reads; BitwiseAnd came with opset 18

# In a process of its own: what loading costs, and the most memory. VmHWM, since getrusage's maximum counts the parent's too.
MEASURE = """
import sys, time
import numpy, onnxruntime
path, threads, shape = sys.argv[1], int(sys.argv[2]), [int(size) for size in sys.argv[3:]]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
started = time.process_time()
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
loaded = time.process_time() - started
session.run(None, {session.get_inputs()[0].name: numpy.zeros([1, *shape], numpy.float32)})
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(loaded, int(status["VmHWM"].split()[0]) * 1024)
"""


def write_onnx(subject: Subject, path: Path, compressed: bool) -> Exported:
    """Writes a subject as one ONNX file and opens it.

    Raises NotInstalled without onnx and onnxruntime.
    """
    needed("onnxruntime", "onnx")
    made = write_nodes(subject.graph)
    if compressed:
        compress(made)
    data = serialized(made, subject.shape, len(subject.classes) or None, metadata(subject))
    path.write_bytes(data)
    return opened(path, subject)


def metadata(subject: Subject) -> dict[str, str]:
    """Returns what a user of the file must know: classes, mean, std, shape, where it came from, and a test vector."""
    _, logits = subject.test_vector()
    facts: dict[str, Any] = {
        "classes": list(subject.classes),
        "mean": list(subject.mean),
        "std": list(subject.std),
        "shape": list(subject.shape),
        "reading": subject.reading.settings() if subject.reading else None,
        "sha256": subject.sha256,
        # Of the uint8 image whose pixel i is (i * 37 + i // 101 * 11) % 256, normalised: [class, logit] of the highest.
        "test": [[int(c), float(f"{logits[c]:.6g}")] for c in np.argsort(-logits)[:SHOWN]],
    }
    return {key: json.dumps(value, separators=(",", ":")) for key, value in facts.items() if value}


def serialized(
    made: Builder, shape: tuple[int, ...], num_classes: int | None, facts: dict[str, str]
) -> bytes:
    """Returns the bytes of an ONNX file."""
    onnx = needed("onnx", "onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    short = made.rename()
    nodes = [
        helper.make_node(
            op,
            [short[i] for i in inputs],
            [short[o] for o in outputs],
            **{
                k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v
                for k, v in attributes.items()
            },
        )
        for op, inputs, outputs, attributes in made.nodes
    ]
    used = {name for _, inputs, _, _ in made.nodes for name in inputs}
    constants = [
        numpy_helper.from_array(array, short[name]) for name, array in made.constants.items() if name in used
    ]
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info(IMAGE, float32, ["N", *shape])],
        [helper.make_tensor_value_info(LOGITS, float32, ["N", num_classes])],
        constants,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="tiny-student",
    )
    helper.set_model_props(model, facts)
    return model.SerializeToString()


def opened(path: Path, subject: Subject) -> Exported:
    """Opens an ONNX file by onnxruntime, as `Exported`, with the memory of a fresh process that runs it."""
    runtime = needed("onnxruntime", "onnx")
    session = session_of(runtime, path)

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {IMAGE: images})[0]

    return Exported([path], run, path.stat().st_size, numbers=_measured(path, subject.shape))


def session_of(runtime: Any, path: Path, optimized: Path | None = None, level: Any = None) -> Any:
    """Returns a session on the CPU with torch's number of threads.

    optimized: where the graph that it runs is written; level: of onnxruntime's optimizations (all).
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if level is not None:
        options.graph_optimization_level = level
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _measured(path: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns load_seconds (of the processor) and peak_bytes of a process that opens the file and answers once."""
    if not Path("/proc/self/status").exists():
        return {}
    command = [sys.executable, "-c", MEASURE, str(path), str(torch.get_num_threads()), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a fresh process could not run it:\n{done.stderr[-1000:]}")
    seconds, peak = done.stdout.split()
    return {"load_seconds": float(seconds), "peak_bytes": int(peak)}
