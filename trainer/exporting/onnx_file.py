"""Assembles an ONNX file, and runs it by onnxruntime."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.exporting.fresh import measured
from trainer.exporting.onnx_builder import IMAGE, LOGITS, Builder
from trainer.exporting.onnx_nodes import WRITERS, write_nodes
from trainer.exporting.onnx_session import prepare, session_of
from trainer.exporting.onnx_weights import compress
from trainer.exporting.subject import Exported, Subject, needed

OPS = frozenset(WRITERS)
OPSET, IR_VERSION = 18, 8  # what onnxruntime 1.17 reads; BitwiseAnd came with opset 18


def write_onnx(subject: Subject, path: Path, compressed: bool) -> Exported:
    """Writes a subject as one ONNX file and opens it.

    Raises NotInstalled without onnx and onnxruntime.
    """
    needed("onnxruntime", "onnx")
    made = write_nodes(subject.graph)
    facts = subject.shape, len(subject.classes) or None
    dense = serialized(made, *facts, {}) if compressed else b""
    num_compressed = compress(made) if compressed else 0
    path.write_bytes(serialized(made, *facts, metadata(subject)))
    if num_compressed:
        _check_same(path, dense, subject)
    return opened(path, subject)


def _check_same(path: Path, dense: bytes, subject: Subject) -> None:
    """Raises RuntimeError unless a compressed file answers the test vector with the bits of the dense one."""
    runtime = needed("onnxruntime", "onnx")
    image = {IMAGE: subject.normalized(subject.test_vector()[0][None])}
    ours, theirs = (session_of(runtime, file).run(None, image)[0] for file in (path, dense))
    if not np.array_equal(ours.view(np.uint32), theirs.view(np.uint32)):
        raise RuntimeError(
            f"{path.name}: its weights are not those of the dense file when a session has read them"
        )


def metadata(subject: Subject) -> dict[str, str]:
    """Returns `Subject.facts` as the metadata of an ONNX file, each value as JSON."""
    return {key: json.dumps(value, separators=(",", ":")) for key, value in subject.facts().items()}


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


def _measured(path: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns load_seconds (of the processor) and peak_bytes of a process that opens the file and answers once."""
    found = measured(prepare, {"file": str(path)}, shape, torch.get_num_threads())
    known = {"load_seconds": found["load_cpu_seconds"]}
    return known | ({"peak_bytes": found["peak_bytes"]} if "peak_bytes" in found else {})
