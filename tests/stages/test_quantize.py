"""The quantized student is what integers compute, bit for bit; shares and zeros stay, the packed file holds all of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trainer
from trainer.compression.rounding import grid_exponent
from trainer.data.images import normalize
from trainer.exporting.integer_steps import IMAGE, steps_of
from trainer.exporting.quantizing import fit_first_layers, quantized
from trainer.exporting.tracing import trace
from trainer.mistakes import Mistake
from trainer.models.lstm import lstm
from trainer.networks.norms import give_biases
from trainer.networks.quantizers import quantizers
from trainer.packing.loading import load
from trainer.recipe.text import RecipeError
from trainer.runs.check import check as check_recipe

TRAINING = {"epochs": 2, "batch_size": 30, "lr": 1e-2}
STUDENTS = {
    "lenet300": {"model": "lenet300", "hidden": [24, 16]},
    "lenet5": {"model": "lenet5", "width": 3, "batch_norm": True},
    "separable": {"model": "separable", "widths": [6, 6, 8], "strides": [2, 1, 1], "residual": True},
}


def recipe(folder: Path, student, stages, **data) -> Path:
    written = {
        "name": "x",
        "data": {"dataset": "digits", "subset": 300, "validation": 60, "size": 16, **data},
        "student": student,
        "stages": stages,
    }
    (folder / "x.yaml").write_text(json.dumps(written))  # JSON is YAML
    return folder / "x.yaml"


@pytest.fixture(scope="module", params=list(STUDENTS))
def ran(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    stages = [
        {"stage": "train", "training": TRAINING},
        *([{"stage": "fold"}] if request.param != "lenet300" else []),
        {"stage": "prune", "sparsity": 0.4, "method": "magnitude"},
        {"stage": "share", "bits": 4},
        {"stage": "quantize", "training": TRAINING},
        {"stage": "pack"},
    ]
    report = trainer.run(recipe(folder, STUDENTS[request.param], stages), folder=folder)
    return report, load(folder / "x/student.tiny")


def whole(tensor, exponent):
    """Numbers that are integers times 2^exponent, as integers."""
    found = tensor.detach().double().numpy() * 2.0**-exponent
    assert np.array_equal(found, np.rint(found))
    return np.rint(found).astype(np.int64)


def windows(x, kernel, stride, padding, fill):
    """[C, H, W] to [C, OH, OW, kernel, kernel]; outside is `fill`."""
    (up, down), (left, right) = padding
    x = np.pad(x, ((0, 0), (up, down), (left, right)), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(x, kernel, (1, 2))
    return view[:, :: stride[0], :: stride[1]]


def in_integers(net, steps, pixels):
    """The logits of one image uint8 [C, H, W], by integers alone, and the exponent of their step."""
    maps = {IMAGE: pixels.astype(np.int64)}
    for step in steps:
        op, a, x, zero = step.node.op, step.node.attributes, maps[step.x.name], step.x.zero
        divisor, exponent = 1, step.x.exponent
        if op == "max_pool":
            maps[step.y.name] = windows(x, a["kernel"], a["stride"], a["padding"], 0).max((3, 4))
            continue
        if op == "mean":
            sums, divisor = (x - zero).sum((1, 2)), x[0].size
        else:
            layer = net.get_submodule(step.node.layer)
            own = grid_exponent(layer.weight)
            weight, exponent = whole(layer.weight, own), exponent + own
            assert np.abs(weight).max() <= 127
            bias = 0 if layer.bias is None else whole(layer.bias, exponent)
            if op == "linear":
                sums = weight @ (x.reshape(-1) - zero) + bias
            else:
                seen = windows(x, weight.shape[2:], a["stride"], a["padding"], zero) - zero
                groups = np.split(seen, a["groups"])
                parts = np.split(weight, a["groups"])
                sums = np.concatenate(
                    [np.einsum("chwij,ocij->ohw", g, w) for g, w in zip(groups, parts, strict=True)]
                )
                sums = sums + np.reshape(bias, (-1, 1, 1))
        assert np.abs(sums).max() < 2**24
        if step.relu:
            sums = np.maximum(sums, 0)
        if step.added is not None:
            factor = 2.0 ** (step.added.exponent - exponent)
            assert factor == int(factor)
            sums = sums + (maps[step.added.name] - step.added.zero) * int(factor)
        if step.y is None:
            return sums, exponent
        ratio = 2.0 ** (step.y.exponent - exponent) * divisor
        tie = 0.5 + (2.0**-15 if divisor == 1 else 0)
        made = np.clip(np.floor(sums / ratio + tie).astype(np.int64) + step.y.zero, 0, 255)
        for pool in step.pools:
            p = pool.attributes
            made = windows(made, p["kernel"], p["stride"], p["padding"], 0).max((3, 4))
        maps[step.y.name] = made
    raise AssertionError("no logits")


def test_torch_computes_what_integers_compute(ran):
    _, net = ran
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 16, 16), np.uint8)
    pixels[0], pixels[1] = 0, 255
    with torch.no_grad():
        logits = net(net.preprocess(torch.from_numpy(pixels))).numpy()
    steps = steps_of(trace(net, pixels.shape[1:]))
    for image, row in zip(pixels, logits, strict=True):
        sums, exponent = in_integers(net, steps, image)
        assert np.array_equal(sums * 2.0**exponent, row)


def test_shares_and_zeros_stay_and_rows_are_before_and_after(ran):
    report, net = ran
    rows = {row["stage"]: row for row in report["rows"]}
    assert rows["quantized"]["top1"] == rows["decoded"]["top1"]
    assert rows["quantized"]["top1_validation"] > rows["clustered"]["top1_validation"] - 12
    assert rows["rounded"]["file_bytes"] > 0
    assert rows["quantized"]["num_nonzero"] <= rows["clustered"]["num_nonzero"]
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert len(module.weight.unique()) <= 17
    assert sum(bool(one.mean) for one in quantizers(net).values()) == 1


def test_a_plain_student_is_quantized_too_and_without_training(tmp_path):
    stages = [{"stage": "train", "training": TRAINING}, {"stage": "quantize"}, {"stage": "pack"}]
    report = trainer.run(recipe(tmp_path, STUDENTS["lenet5"], stages, mean=[0], std=[1]), folder=tmp_path)
    rows = {row["stage"]: row for row in report["rows"]}
    assert abs(rows["rounded"]["top1"] - rows["trained"]["top1"]) < 4
    assert rows["rounded"]["file_bytes"] < rows["trained"]["file_bytes"] / 2
    net = load(tmp_path / "x/student.tiny")
    pixels = np.random.default_rng(1).integers(0, 256, (1, 16, 16), np.uint8)
    sums, exponent = in_integers(net, steps_of(trace(net, pixels.shape)), pixels)
    logits = net(net.preprocess(torch.from_numpy(pixels[None]))).detach().numpy()[0]
    assert np.array_equal(sums * 2.0**exponent, logits)


@pytest.mark.parametrize("later", [{"stage": "share", "bits": 4}, {"stage": "quantize"}])
def test_nothing_but_pack_and_export_comes_after_it(later, tmp_path):
    stages = [{"stage": "quantize"}, later]
    with pytest.raises(RecipeError, match="only pack and export may follow|is quantized already"):
        trainer.run(recipe(tmp_path, STUDENTS["lenet300"], stages), folder=tmp_path)


def test_sharing_what_batch_norm_would_be_folded_into_is_refused_before_anything_is_trained(tmp_path):
    train, quantize = {"stage": "train", "training": TRAINING}, {"stage": "quantize"}
    share = {"stage": "share", "bits": 4}

    def check(*stages):
        check_recipe(recipe(tmp_path, STUDENTS["lenet5"], [*stages]), build=True)

    with pytest.raises(RecipeError, match=r"stages\[2\]: layer 'conv1' shares its .* add fold before share"):
        check(train, share, quantize)
    with pytest.raises(RecipeError, match="layer 'conv2' shares"):
        check(train, share | {"exclude": ["conv1"]}, quantize)
    check(train, {"stage": "fold"}, share, quantize)
    check(train, share | {"exclude": ["conv1", "conv2"]}, quantize)


def test_what_integers_cannot_compute_is_refused_with_its_layer():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 36, 10))
    with pytest.raises(Mistake, match="layer '1': operator sigmoid cannot be computed in integers"):
        quantized(net, {"model": "x"}, (1, 8, 8), [0.0], [1.0])
    net = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
    with pytest.raises(Mistake, match="layer '0': the image is read by avg_pool"):
        quantized(net, {"model": "x"}, (1, 8, 8), [0.0], [1.0])
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(Mistake, match="layer '1': operator batch_norm"):
        quantized(net, {"model": "x"}, (1, 8, 8), [0.0], [1.0])
    with pytest.raises(Mistake, match="^operator permute cannot be"):  # of no layer
        quantized(lstm((1, 8, 8), 10), {"model": "lstm"}, (1, 8, 8), [0.0], [1.0])


def test_it_ends_the_same_after_an_interruption(tmp_path):
    stages = [
        {"stage": "train", "training": TRAINING},
        {"stage": "quantize", "training": TRAINING},
        {"stage": "pack"},
    ]
    written = recipe(tmp_path, STUDENTS["lenet300"], stages)
    trainer.run(written, folder=tmp_path)
    first = (tmp_path / "x/student.tiny").read_bytes()
    for name in ("01-quantize", "02-pack"):
        shutil.rmtree(tmp_path / f"x/checkpoints/{name}")
    for name in ("done", "student.tiny"):
        (tmp_path / "x" / name).unlink()
    trainer.run(written, folder=tmp_path)
    assert (tmp_path / "x/student.tiny").read_bytes() == first


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_first_layer_computes_from_pixels_what_it_computed_from_channels_of_their_own_mean(
    bias, groups, padding
):
    torch.manual_seed(0)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=padding, bias=bias, groups=groups),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    images = normalize(torch.randint(0, 256, (16, 3, 8, 8)).float() / 255, mean, std)
    with torch.no_grad():
        net(images)
        before = net[0](images)
        net, spec = quantized(net.eval(), {"model": "x"}, (3, 8, 8), mean, std)
        fit_first_layers(net, trace(net, (3, 8, 8)))
        off = (net[0](images) - before).abs()
    assert spec.get("biased", []) == ([] if bias else ["0"])
    assert off[..., padding : 8 - padding, padding : 8 - padding].max() < 1e-5
    if padding:  # the grey value that stands for 0 is up to 11 from a channel's mean
        grey = np.abs(round(255 * sum(mean) / 3) - 255 * np.array(mean)) / 255 / std
        assert off.max() > 0.01 and grey.max() * 255 * 0.225 < 11
        reach = net[0].weight.abs().sum((2, 3)).max() * 3 / groups
        assert off.max() < reach * grey.max()


def unbiased(input_shape, num_classes):
    width = 4 * (input_shape[1] - 2) * (input_shape[2] - 2)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(width, num_classes)
    )


def test_a_first_layer_without_a_bias_is_given_one_which_the_packed_file_has(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.models.lenet300.lenet300", unbiased)
    stages = [
        {"stage": "train", "training": TRAINING},
        {"stage": "quantize", "training": TRAINING},
        {"stage": "pack"},
    ]
    report = trainer.run(recipe(tmp_path, {"model": "lenet300"}, stages), folder=tmp_path)
    net = load(tmp_path / "x/student.tiny")
    assert net[0].bias is not None and net[0].bias.any()
    rows = {row["stage"]: row for row in report["rows"]}
    assert abs(rows["rounded"]["top1"] - rows["trained"]["top1"]) < 4
    assert rows["quantized"]["top1"] == rows["decoded"]["top1"]


@pytest.mark.parametrize("biased", [["5"], ["1"], [3], 7, "x"])
def test_only_layers_are_given_biases(biased):
    with pytest.raises(Mistake, match="biased: the network has no layer"):
        give_biases(nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()), biased)
