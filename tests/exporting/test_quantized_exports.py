"""What is not C keeps a quantized student too: the same bits as ONNX, script and program, its own steps in QDQ."""

import numpy as np
import pytest

from tests.quantized import NETS
from trainer.exporting.export import check, export
from trainer.exporting.onnx_builder import Builder
from trainer.exporting.onnx_int8 import write_int8
from trainer.exporting.onnx_quantize import integer_layer
from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.targets import ExportKeys


@pytest.fixture(scope="module", params=["sequence", "residual", "lenet300"])
def subject(request):
    return NETS[request.param]()


@pytest.mark.parametrize("to", ["onnx", "pt2", pytest.param("page", marks=pytest.mark.device)])
def test_it_answers_bit_for_bit(subject, to, tmp_path):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    looks = {"shape": subject.shape, "mean": subject.mean, "std": subject.std}
    [row] = export(subject.network, tmp_path, to, **looks)
    assert row["max_difference"] == 0 and row["agreement_student"] == 100


def test_qdq_has_the_steps_of_the_student(subject, tmp_path):
    onnx = pytest.importorskip("onnx")
    exported = write_int8(subject, tmp_path / "x.onnx", "minmax", 1, True)
    pixels = np.random.default_rng(0).integers(0, 256, (50, *subject.shape), np.uint8)
    images = subject.normalized(pixels)
    found, expected = exported.run(images), subject.logits(images)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()  # halves go to the even number
    assert (found == expected).mean() > 0.2
    graph = onnx.load(tmp_path / "x.onnx").graph
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    rounded = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    quantizers = [node for node in subject.graph.nodes if node.op == "quantize"]
    steps = [(float(constants[node.input[1]]), int(constants[node.input[2]])) for node in rounded]
    assert steps == [(2.0 ** q.attributes["exponent"], q.attributes["zero"]) for q in quantizers]


def test_a_quantized_student_takes_no_calibration(subject):
    checker = shelves.checker(shelves.find("to", "onnx_int8"), ExportKeys)
    check([checker(to="onnx_int8")], subject.graph, True)
    with pytest.raises(
        Mistake, match="to onnx_int8: calibration, images, reduce_range: no effect: the student is quantized"
    ):
        check(
            [checker(to="onnx_int8", calibration="entropy", images=5, reduce_range=False)],
            subject.graph,
            True,
        )


def test_weights_and_biases_are_whole_numbers_times_their_steps(subject):
    for node in subject.graph.nodes:
        if node.op not in ("conv", "linear"):
            continue
        made = Builder()
        integer_layer(made, subject.graph, node)
        for role, (_, inputs, _, _) in zip(("weight", "bias"), made.nodes, strict=False):
            whole, step, zero = (made.constants[name] for name in inputs)
            assert whole.dtype == (np.int8 if role == "weight" else np.int32) and zero == 0
            assert np.array_equal(whole * step, subject.graph.weights[node.weights[role]])
