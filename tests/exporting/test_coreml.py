"""A Core ML package: what was saved is read back and computed by torch; without coremltools it is named."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.exporting.test_c import Images, Sequence, coarse
from tests.quantized import NETS
from trainer.exporting.export import export, subject_of
from trainer.exporting.mil import check, compute
from trainer.exporting.subject import NotInstalled
from trainer.exports.coreml import coreml
from trainer.mistakes import Mistake


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "sequence", "quantized"])
def test_the_saved_package_answers_as_torch(name, tmp_path):
    coremltools = pytest.importorskip("coremltools")
    torch.manual_seed(1)
    if name == "quantized":
        subject = next(iter(NETS.values()))()
    else:
        net, shape = (coarse(Images()), (3, 16, 16)) if name == "images" else (Sequence().eval(), (1, 8, 5))
        subject = subject_of(
            net, shape, mean=[0.4] * shape[0], std=[0.3] * shape[0], classes=list("abcdefghij")
        )
    exported = coreml(subject, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (7, *subject.shape), np.uint8)
    images = subject.normalized(pixels)
    expected = subject.logits(images)
    near = 1e-4 if name == "sequence" else 3e-6  # coremltools writes 1 / x as 1 / (x + 0.0001)
    assert np.abs(exported.run(images) - expected).max() <= near * np.abs(expected).max()
    assert exported.num_bytes == sum(file.stat().st_size for file in exported.files)
    assert "not run by Core ML" in exported.notes[0] and exported.numbers["latency_seconds"] is None
    told = coremltools.utils.load_spec(str(tmp_path / "student.mlpackage")).description
    assert [tuple(told.input[0].type.multiArrayType.shape), told.output[0].name] == [
        (1, *subject.shape),
        "logits",
    ]
    facts = {
        key: json.loads(value)
        for key, value in told.metadata.userDefined.items()
        if not key.startswith("com.")
    }
    assert facts["shape"] == list(subject.shape) and facts["mean"] == pytest.approx(list(subject.mean))


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(NotInstalled, match="to coreml: needs the package coremltools: .*the extra coreml"):
        export(net(), tmp_path, "coreml", shape=(1, 4, 4))


def test_what_was_never_compared_is_refused_with_its_layer(tmp_path):
    with pytest.raises(Mistake, match=r"to coreml: layer '1': operator gru cannot be written"):
        export(Rows(), tmp_path, "coreml", shape=(1, 4, 4))


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Identity(), nn.Linear(5, 3)
        self.add_module("1", nn.GRU(4, 5, batch_first=True))

    def forward(self, x):
        return self.last(getattr(self, "1")(x.squeeze(1))[0][:, -1])


# ---- programs written by hand, as coremltools would read them


def var(name, val=None):
    return SimpleNamespace(name=name, val=val)


def program(*steps):
    """(operator, {input: a name of what is known, or a value}, ...) one after the other; the first reads 'image'."""
    operations = [SimpleNamespace(op_type="const", inputs={}, outputs=[])]
    for number, (op, inputs) in enumerate(steps):
        read = {
            key: var(value) if isinstance(value, str) and value.startswith("%") else var(f"c{key}", value)
            for key, value in inputs.items()
        }
        operations.append(SimpleNamespace(op_type=op, inputs=read, outputs=[var(f"%{number}")]))
    return SimpleNamespace(
        inputs={"image": var("%image")}, outputs=[var(f"%{len(steps) - 1}")], operations=operations
    )


def test_maps_are_padded_as_the_program_says():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4, 5, 6), torch.randn(6, 2, 3, 2)
    pad = np.array([1, 0, 2, 1])  # top, bottom, left, right
    ones = np.ones(2, np.int32)
    conv = {
        "x": "%image",
        "weight": weight.numpy(),
        "strides": 2 * ones,
        "pad_type": "custom",
        "pad": pad,
        "dilations": ones,
        "groups": 2,
    }
    wide = F.pad(x, (2, 1, 1, 0))
    assert torch.equal(compute(program(("conv", conv)), x), F.conv2d(wide, weight, None, 2, groups=2))
    pool = {
        "x": "%image",
        "kernel_sizes": 2 * ones,
        "strides": 2 * ones,
        "pad_type": "custom",
        "pad": pad,
        "ceil_mode": False,
    }
    assert torch.equal(
        compute(program(("max_pool", pool)), x), F.max_pool2d(F.pad(x, (2, 1, 1, 0), value=-torch.inf), 2)
    )
    for excluded in (False, True):
        found = compute(program(("avg_pool", pool | {"exclude_padding_from_average": excluded})), x)
        counted = F.avg_pool2d(F.pad(torch.ones_like(x), (2, 1, 1, 0)), 2) if excluded else 1
        torch.testing.assert_close(found, F.avg_pool2d(wide, 2) / counted, equal_nan=True)
    over = {"ceil_mode": True, "exclude_padding_from_average": False}
    with pytest.raises(Mistake, match="ceil_mode over padding"):
        compute(program(("avg_pool", pool | over)), x)
    with pytest.raises(Mistake, match="padding same cannot be computed"):
        compute(program(("conv", conv | {"pad_type": "same"})), x)


def test_steps_read_what_came_before():
    x = torch.tensor([[-4.0, -1.0, 0.5, 7.0]])
    swish = program(
        ("thresholded_relu", {"x": "%image", "alpha": np.float32(-3)}),
        ("sigmoid_hard", {"x": "%0", "alpha": np.float32(1 / 6), "beta": np.float32(0.5)}),
        ("mul", {"x": "%0", "y": "%1"}),
    )
    torch.testing.assert_close(compute(swish, x), F.hardswish(x))
    masks = {
        "begin_mask": np.array([True, False]),
        "end_mask": np.array([True, False]),
        "squeeze_mask": np.array([False, False]),
    }
    part = program(
        ("slice_by_index", {"x": "%image", "begin": np.array([0, 1]), "end": np.array([0, 3]), **masks})
    )
    assert compute(part, x).tolist() == [[-1.0, 0.5]]
    last = masks | {"squeeze_mask": np.array([False, True])}
    one = program(
        ("slice_by_index", {"x": "%image", "begin": np.array([0, 3]), "end": np.array([0, 4]), **last})
    )
    assert compute(one, x).tolist() == [7.0]


def test_a_program_that_cannot_be_computed_is_refused():
    with pytest.raises(Mistake, match="operators lstm, while_loop cannot be computed here"):
        check(program(("while_loop", {}), ("relu", {"x": "%image"}), ("lstm", {})))
    check(program(("relu", {"x": "%image"})))
