"""Without torch: every network of the models shelf is opened and answers as torch does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import trainer
from trainer.data.image_file import read_image
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.packing import headers
from trainer.packing import network as packed
from trainer.packing.loading import load, preprocess
from trainer.runs.answering import open_student
from trainer.runtime import student as runtime
from trainer.runtime.student import layout, normalized, open_tiny

NETS = [
    {"model": "airbench", "first": 6, "widths": [8, 10, 12]},
    {"model": "cifar_resnet", "depth": 8},
    {"model": "cifar_resnet", "depth": 14, "channels": [4, 6, 8, 10]},
    {"model": "cifar_vgg"},
    {"model": "gru", "hidden": 9},
    {"model": "gru", "hidden": 8, "num_layers": 2, "bidirectional": True},
    {"model": "lenet300"},
    {"model": "lenet300", "resized": {"fc1": [40, 1024], "fc2": [30, 40], "fc3": [3, 30]}},
    {"model": "lenet5"},
    {"model": "lenet5", "width": 3, "batch_norm": True, "dropout": 0.1},
    {"model": "lenet5_caffe"},
    {"model": "lstm", "hidden": 9},
    {"model": "lstm", "hidden": 8, "num_layers": 2, "bidirectional": True},
    {"model": "separable"},
    {
        "model": "separable",
        "widths": [6, 8, 8],
        "strides": [2, 1, 1],
        "residual": True,
        "repeat": 2,
        "kernel": 5,
    },
    {"model": "wide_resnet", "depth": 10, "widen": 1},
]
SHAPE = (1, 32, 32)
FACTS = {"shape": list(SHAPE), "mean": [0.2], "std": [0.4], "classes": ["a", "b", "c"]}


def written(spec: dict, path: Path, facts: dict = FACTS) -> torch.nn.Module:
    """Writes a network with random weights and statistics that are as large as trained ones'."""
    torch.manual_seed(3)
    net = build(spec, tuple(facts["shape"]), len(facts["classes"])).eval()
    for name, tensor in net.state_dict().items():
        if name.endswith(("running_mean", "norm1.bias", "bn1.bias")):
            tensor.normal_(0, 0.2)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    path.write_bytes(packed.encode(net, spec, facts))
    return net


@pytest.mark.parametrize("spec", NETS, ids=lambda spec: "-".join(map(str, spec.values()))[:30])
def test_logits_are_those_of_torch(spec, tmp_path):
    net = written(spec, tmp_path / "net.tiny")
    header = headers.header((tmp_path / "net.tiny").read_bytes())
    expected = [(name, shape, np.dtype(dtype).name) for name, (shape, dtype) in packed.layout(header).items()]
    assert [(name, shape, dtype) for name, (shape, dtype) in layout(header).items()] == expected
    pixels = np.random.default_rng(0).integers(0, 256, (70, *SHAPE), dtype=np.uint8)
    student = open_tiny(tmp_path / "net.tiny")
    found = student.logits(pixels)
    with torch.inference_mode():
        logits = net(preprocess(torch.from_numpy(pixels), student.reading, student.mean, student.std)).numpy()
    assert found.dtype == np.float32 and np.abs(found - logits).max() < 1e-5 * np.abs(logits).max() + 1e-6
    assert (found.argmax(1) == logits.argmax(1)).all()


def test_every_network_of_the_shelf_is_among_them():
    shelf = {path.stem for path in (Path(trainer.__file__).parent / "models").glob("[a-z]*.py")}
    assert {spec["model"] for spec in NETS} == shelf - {"timm", "python"}


@pytest.mark.parametrize("side", [8, 15, 28])
@pytest.mark.parametrize("model", ["lenet5", "separable", "lstm"])
def test_other_sizes_and_colours(model, side, tmp_path):
    facts = FACTS | {"shape": [3, side, side + 1], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    net = written({"model": model}, tmp_path / "net.tiny", facts)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, side, side + 1), dtype=np.uint8)
    student = open_tiny(tmp_path / "net.tiny")
    prepared = preprocess(torch.from_numpy(pixels), student.reading, student.mean, student.std)
    assert np.array_equal(normalized(pixels, student.mean, student.std), prepared.numpy())
    assert np.allclose(student.logits(pixels), net(prepared).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_images_are_read_alike(tmp_path):
    written({"model": "lenet5"}, tmp_path / "net.tiny")
    rng, files = np.random.default_rng(1), []
    for number in range(6):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)).save(files[-1])
    net, student = load(tmp_path / "net.tiny"), open_tiny(tmp_path / "net.tiny")
    assert student.predict(files) == net.predict(files) and student.predict([]) == []
    with_torch = open_student(tmp_path / "net.tiny")
    pixels = torch.stack([read_image(file, student.reading) for file in files]).numpy()
    assert np.allclose(with_torch.logits(pixels), student.logits(pixels), rtol=1e-5, atol=1e-6)


def test_other_networks_are_refused(tmp_path):
    for spec in ({"model": "timm/mobilenetv3_small_050"}, {"model": "find"}, {"model": "python:a:b"}, None):
        data = packed.encode(torch.nn.Linear(2, 2), None, FACTS)
        if spec is not None:
            data = packed.container.encode({"net": spec, **FACTS}, {"a": np.ones(1, np.float32)})
        (tmp_path / "x.tiny").write_bytes(data)
        with pytest.raises(Mistake, match="x.tiny: .*export it to onnx first"):
            open_tiny(tmp_path / "x.tiny")
    bad = [
        ({"model": "cifar_resnet", "depth": 6 * 10**5 + 2}, "more parts than the file can hold"),
        ({"model": "wide_resnet", "widen": 99}, "numbers in all tensors"),
        ({"model": "gru", "num_layers": 10**9}, "settings add up to 1e"),
        (
            {"model": "lenet5", "maps": {"fc1": [0, 0]}},
            "is quantized: it opens with torch, or as an .onnx file",
        ),
        ({"model": "lenet300", "hidden": "many"}, "cannot be built"),
        ({"model": "lenet300", "depth": 3}, "cannot be built"),
        ({"model": "cifar_vgg", "depth": 9}, "cannot be built"),
        ({"model": "lenet5", "resized": [1]}, "sizes of layers"),
        ({"model": "lenet5", "resized": {"conv2": [4, 9]}}, "takes 9 channels and gets 6"),
        ({"model": "lenet5", "resized": {"conv2": 4}}, "cannot be built"),
        ({"model": "lenet5"}, "does not hold the tensors of 'lenet5'"),
    ]
    for spec, told in bad:
        data = packed.container.encode({"net": spec, **FACTS}, {"a": np.ones(1, np.float32)})
        (tmp_path / "x.tiny").write_bytes(data)
        with pytest.raises(Mistake, match=f"x.tiny: .*{told}"):
            open_tiny(tmp_path / "x.tiny")


BLOCKED = r"""
import sys, time
for name in ("torch", "torchvision", "timm", "pydantic", "yaml", "tqdm", "scipy", "sklearn", "safetensors", "shtab"):
    sys.modules[name] = None  # as if it were not installed
import json, re
from trainer.cli import main
status = main(["predict", "--json", *sys.argv[1:]])
loaded = [name for name in sys.modules if name.partition(".")[0] in ("torch", "pydantic") and sys.modules[name]]
kilobytes = re.search("VmHWM: *([0-9]+)", open("/proc/self/status").read().replace("\t", " "))[1]
print(json.dumps([status, loaded, int(kilobytes) / 1024]))
"""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mean": [10**400]}, "mean and std are not finite in float32"),
        ({"std": [0]}, "a std is not above 0"),
        ({"mean": "0.1"}, "mean and std are not numbers"),
        ({"shape": [1, 8]}, "shape is not channels, height and width"),
        ({"classes": None}, "classes are neither names nor a number"),
        ({"reading": {"crop": 3}}, "how its images are read is not known"),
    ],
)
def test_metadata_that_nobody_here_wrote(change, told):
    facts = {"classes": ["a", "b"], "shape": [1, 8, 8], "mean": [0.1], "std": [0.3]}
    assert runtime.told_by("x.onnx", facts, lambda images: images).classes == ["a", "b"]
    with pytest.raises(Mistake, match=f"x.onnx: its metadata are not valid: .*{told}"):
        runtime.told_by("x.onnx", facts | change, lambda images: images)


def test_files_that_need_torch_are_named(tmp_path):
    for ending in ("pt2", "safetensors"):
        with pytest.raises(Mistake, match=f"x.{ending}: needs torch, which is not installed here"):
            runtime.open_student(tmp_path / f"x.{ending}")


def pictures(folder: Path) -> list[str]:
    rng, files = np.random.default_rng(1), []
    for number in range(3):
        files.append(str(folder / f"{number}.png"))
        Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)).save(files[-1])
    return files


def best(lines: str) -> list[str]:
    return [json.loads(line)["classes"][0]["class"] for line in lines.splitlines()]


def test_the_command_predicts_where_torch_is_not_installed(tmp_path):
    files = pictures(tmp_path)
    written({"model": "lenet5"}, tmp_path / "net.tiny")
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / "net.tiny"), *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, _, last = done.stdout.strip().rpartition("\n")
    assert best(told) == load(tmp_path / "net.tiny").predict(files)
    status, loaded, megabytes = json.loads(last)
    assert (status, loaded) == (0, []) and megabytes < 60


MEASURED = r"""
import json, re, sys, time
from trainer.cli import main
assert main(["predict", "--json", *sys.argv[1:]]) == 0
kilobytes = re.search("VmHWM:\\s*([0-9]+)", open("/proc/self/status").read())[1]
print(json.dumps(["torch" in sys.modules, time.process_time(), int(kilobytes) / 1024]))
"""


@pytest.mark.slow
def test_a_fresh_environment_without_torch(tmp_path, capsys):
    """scripts/runtime installs it; a .tiny and an .onnx of each network of the shelf have torch's classes there.

    With a .tiny the process takes at most 2 seconds of processor time, and 60 MB of memory unless the file alone takes 10.
    """
    top, files = Path(trainer.__file__).parents[1], pictures(tmp_path)
    subprocess.run([top / "scripts/runtime", tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    where: dict = {"cwd": tmp_path, "capture_output": True, "text": True, "env": {}}
    installed = subprocess.run([python, "-m", "pip", "list"], **where).stdout
    assert "numpy" in installed and "torch" not in installed
    for number, spec in enumerate(NETS):
        file = tmp_path / f"{number}.tiny"
        net = written(spec, file)
        expected = load(file).predict(files)
        facts = {"mean": [0.2], "std": [0.4], "classes": ["a", "b", "c"]}
        trainer.export(net, tmp_path / f"{number}", "onnx", shape=SHAPE, **facts)
        for one in (file, tmp_path / f"{number}/onnx/student.onnx"):
            done = subprocess.run([python, "-c", MEASURED, one, *files], **where)
            assert done.returncode == 0, (spec, done.stderr)
            told, _, last = done.stdout.strip().rpartition("\n")
            has_torch, seconds, megabytes = json.loads(last)
            assert best(told) == expected and not has_torch, spec
            size = one.stat().st_size
            if one == file:
                assert seconds < 2 and (megabytes < 60 or size > 10_000_000), (spec, seconds, megabytes)
            with capsys.disabled():
                print(
                    f"\n{spec} {one.suffix}, {size:,} bytes: {seconds:.2f} s, {megabytes:.0f} MB",
                    end="",
                )
    code = (
        "import time; t = time.process_time(); import trainer.runtime.student; print(time.process_time() - t)"
    )
    assert float(subprocess.run([python, "-c", code], **where).stdout) < 0.5
