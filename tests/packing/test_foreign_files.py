"""A packed file never has code run: what it names must be on the shelf, or be brought by the reader."""

import cProfile
import importlib
import json
import pstats
import re
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from trainer.cli import main
from trainer.networks import build as building
from trainer.packing import container, together
from trainer.packing import network as packed
from trainer.packing import tensors as packing_tensors
from trainer.packing.loading import load
from trainer.storage.weights_file import save_file

FACTS = {"shape": [1, 8, 8], "mean": [0.1], "std": [0.3], "classes": ["a", "b"]}


@pytest.mark.parametrize(
    "net",
    [
        {"model": "python:os:system"},
        {"model": "hf-hub:somebody/net"},
        {"model": "timm/hf-hub:timm/resnet18.a1_in1k"},
        {"model": "timm/local-dir:/tmp"},
        {"model": "timm/resnet18", "pretrained": True},
        {"model": "python", "name": "os:system"},
        {"model": "python", "name": "os:system", "options": {}},
        {"model": "timm", "name": "hf-hub:timm/resnet18.a1_in1k"},
    ],
)
def test_a_file_that_names_code_or_a_hub_builds_nothing(net, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(building, "build", lambda *a: pytest.fail("built a network that the file named"))
    monkeypatch.setattr(packed, "build", lambda *a: pytest.fail("built a network that the file named"))
    model = nn.Linear(4, 2)
    path = tmp_path / "x.tiny"
    path.write_bytes(packed.encode(model, net, FACTS))
    assert main(["inspect", str(path)]) == 0
    with pytest.raises(
        ValueError, match="x.tiny: holds the weights of .* give the network as `into`; .* --model"
    ):
        load(path)
    decoded = load(path, into=nn.Linear(4, 2))
    assert torch.equal(decoded.weight, model.weight)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"classes": 10**9}, "classes are neither names nor a number up to 1,048,576"),
        ({"classes": None}, "classes are neither names nor a number"),
        ({"classes": True}, "classes are neither names nor a number"),
        ({"classes": [1, 2]}, "classes are not names"),
        ({"net": "lenet5"}, "net names no model"),
        ({"net": {"width": 3}}, "net names no model"),
        ({"net": {"model": 5}}, "net names no model"),
        ({"net": {"model": "lenet5"}, "shape": []}, "shape is missing"),
        ({"shape": None}, "shape is not channels, height and width"),
        ({"shape": [1, 28]}, "shape is not channels, height and width"),
        ({"shape": [1, 28, -28]}, "shape is not channels, height and width"),
        *(({"mean": [far]}, "mean and std are not finite in float32") for far in (10**400, -(10**400), 1e39)),
        *(({"std": [far]}, "or a std is not above 0") for far in (10**400, 1e39, 1e-39, 0, -1)),
        ({"mean": "0.1"}, "mean and std are not numbers"),
    ],
)
def test_headers_that_nobody_here_wrote(change, told, tmp_path, capsys):
    data = container.encode(FACTS | change, {"a": np.zeros(3, np.float32)})
    for read in (packed.header, packed.tensors, packed.account, packed.decode):
        with pytest.raises(ValueError, match="x.tiny: its header is not that of a packed network: .*" + told):
            read(data, "x.tiny")
    path = tmp_path / "x.tiny"
    path.write_bytes(data)
    assert main(["inspect", str(path)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("header", [{}, [1, 2], 5, None])
def test_headers_that_are_something_else(header):
    data = container.encode(header, {"a": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="its header is not that of a packed network"):
        packed.header(data)


def test_a_header_nested_too_deeply(monkeypatch):
    deep = "[" * 50_000
    with monkeypatch.context() as patch:
        patch.setattr(container.json, "dumps", lambda *a, **k: deep)
        patch.setattr(container.json, "loads", lambda text: None)
        data = container.encode({}, {"a": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="x.tiny: the header is nested too deeply"):
        packed.header(data, "x.tiny")


@pytest.mark.parametrize("small", [0, container.MEDIUM])
@pytest.mark.parametrize("shape", [(2**23,), (2**24,), (1, 2**23), (2**12, 2**12)])
def test_a_few_bytes_do_not_announce_millions_of_positions(shape, small, monkeypatch):
    """Files whose layout names a large tensor and whose stream ends there: refused before memory is taken for it."""
    known = {"a": (shape, "float32")}
    monkeypatch.setattr(container, "MEDIUM", small)
    four = np.array([0, 1.5, 0, 2.5], np.float32)
    data = container.encode(FACTS, {"a": four if len(shape) == 1 else four[None]})
    real = container._code_layout
    monkeypatch.setattr(container, "_code_layout", lambda *a: real(*a) and known)
    for module in (packing_tensors, together):
        monkeypatch.setattr(module, "code_masks", lambda *a: pytest.fail("took the stream at its word"))
    with pytest.raises(ValueError, match=f"cannot hold the {np.prod(shape):,} positions"):
        container.decode(data)


@pytest.mark.parametrize("model", ["python", "timm"])
def test_settings_cannot_name_what_is_built(model, monkeypatch):
    monkeypatch.setattr("trainer.models.python.ones_own", lambda name: pytest.fail(f"imported {name}"))
    monkeypatch.setattr("timm.create_model", lambda *a, **k: pytest.fail("built it"))
    with pytest.raises(ValueError, match=f"model '{model}' cannot be built"):
        building.build({"model": model, "name": "os:system"}, (1, 8, 8), 2)


@pytest.mark.parametrize("ending", ["tiny", "safetensors"])
@pytest.mark.parametrize("net", [{"model": "python", "name": "evil:build"}, {"model": "python:evil:build"}])
def test_no_command_runs_code_that_a_file_names(net, ending, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(
        "open('ran', 'w').close()\n\n\ndef build(*a, **k):\n    raise SystemExit\n"
    )
    path = tmp_path / f"x.{ending}"
    if ending == "tiny":
        layout = {"weight": ((2, 4), "float32"), "bias": ((2,), "float32")}
        arrays = {"weight": np.ones((2, 4), np.float32), "bias": np.ones(2, np.float32)}
        path.write_bytes(container.encode({"net": net, **FACTS}, arrays, layout=layout))
    else:
        facts = {"net": net, **FACTS, "shape": [1, 2, 2], "reading": {}}
        save_file(path, dict(nn.Linear(4, 2).state_dict()), {"facts": json.dumps(facts)})
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    recipe = "name: r\ndata: {dataset: digits}\nstudent: {model: lenet5, checkpoint: FILE}\nstages: [{stage: pack}]\n"
    (tmp_path / "r.yaml").write_text(recipe.replace("FILE", path.name))
    commands = [["predict", path.name, "a.png"], ["check", "r.yaml", "--build"]]
    if ending == "tiny":
        commands += [["inspect", path.name], ["unpack", path.name, "out.safetensors"], ["bench", path.name]]
    for words in commands:
        assert main(words) in (0, 2), words
        assert not (tmp_path / "ran").exists(), words
    capsys.readouterr()


def test_settings_of_timm_that_would_read_files_are_refused():
    with pytest.raises(ValueError, match="options holds checkpoint_path"):
        building.build({"model": "timm/resnet18", "options": {"checkpoint_path": "x.pth"}}, (1, 32, 32), 2)
    data = container.encode(
        {"net": {"model": "timm/resnet18", "options": {"checkpoint_path": "x.pth"}}, **FACTS}, {}
    )
    with pytest.raises(ValueError, match="options holds checkpoint_path"):
        packed.decode(data)


FOR_EVER = {
    "depth of 600 million in 20 bytes": bytes.fromhex("745301f2673ec9a4f0d65c56ac474ba8984a5920"),
    "text without an end in 15 bytes": bytes.fromhex("745301ff9ea563f0b0a16cfaf0dafd"),
}
ASKING = [
    ({"model": "cifar_resnet", "depth": 6 * 10**5 + 2}, "more parts than the file can hold"),
    ({"model": "wide_resnet", "depth": 6 * 10**8 + 4}, "settings add up to 6e"),
    ({"model": "wide_resnet", "widen": 99}, "more numbers than the file can hold"),
    ({"model": "lstm", "num_layers": 10**9}, "settings add up to 1e"),
    ({"model": "gru", "num_layers": 10**5}, "more numbers than the file can hold"),
    ({"model": "lenet300", "hidden": [1] * 9000}, "more parts than the file can hold"),
    ({"model": "lenet5", "width": 10**6}, "more numbers than the file can hold"),
    ({"model": "timm/convnext_atto", "options": {"depths": [10**9] * 4}}, "settings add up to 4e"),
    ({"model": "timm/resnet18", "options": {"layers": [2, 10**400, 2, 2]}}, "settings add up to 1.84e"),
]


def refused(data: bytes, *ways) -> str:
    """The message that a file is refused with, alike by each way to open it, after little work."""
    told = set()
    for read in ways or (packed.decode,):
        started = time.process_time()
        with pytest.raises(ValueError) as caught:
            read(data, "x.tiny")
        assert time.process_time() - started < 4  # 0.05 to 0.6 s
        told.add(str(caught.value))
    [message] = told
    assert message.startswith("x.tiny: ") and len(message) < 300 and "\n" not in message
    return message


@pytest.mark.parametrize("what", FOR_EVER)
def test_a_few_bytes_that_asked_for_work_without_an_end(what):
    told = refused(FOR_EVER[what], packed.tensors, packed.account, packed.decode)
    assert re.search("settings add up to|a text is longer than 4,096 bytes", told)


@pytest.mark.parametrize(("net", "told"), ASKING)
def test_a_file_asks_for_no_larger_network_than_it_can_hold(net, told):
    facts = {"shape": [3, 32, 32], "mean": [0.1] * 3, "std": [0.3] * 3, "classes": 10}
    assert told in refused(container.encode({"net": net, **facts}, {}))


def test_a_loop_of_a_model_that_builds_nothing_ends_too(monkeypatch):
    def endless(input_shape, num_classes):
        while True:
            len(())

    monkeypatch.setattr(building.shelves, "find", lambda key, name: endless)
    assert "more parts than the file can hold" in refused(
        container.encode({"net": {"model": "x"}, **FACTS}, {})
    )
    assert sys.getprofile() is None


def test_what_a_model_imports_does_not_count(monkeypatch, tmp_path):
    """timm's import takes a million calls; a fresh process does it while the network is built."""
    (tmp_path / "imported_while_built.py").write_text("f = lambda: 0\nfor _ in range(5000):\n    f()\n")
    monkeypatch.syspath_prepend(tmp_path)

    def importing(input_shape, num_classes):
        importlib.import_module("imported_while_built")
        return nn.Linear(2, 2)

    monkeypatch.setattr(building.shelves, "find", lambda key, name: importing)
    monkeypatch.setattr(container, "_CALLS", (2000, 0))  # older versions of torch take more than 400
    net = {"model": "x"}
    data = packed.encode(nn.Linear(2, 2), net, FACTS)
    monkeypatch.delitem(sys.modules, "imported_while_built", raising=False)
    assert packed.decode(data)[1]["net"] == net
    assert "imported_while_built" in sys.modules
    monkeypatch.delitem(sys.modules, "imported_while_built")
    monkeypatch.setattr(container, "_CALLS", (20, 0))
    with pytest.raises(ValueError, match="more parts than the file can hold"):
        packed.decode(data)


def test_large_networks_that_are_real_are_read():
    """Fresh weights of timm; of zeros alone, 11 million weights, or 110 layers, in a few hundred bytes."""
    facts = {"shape": [3, 32, 32], "mean": [0.1] * 3, "std": [0.3] * 3, "classes": list("0123456789")}
    for net, zeros in (
        ({"model": "timm/resnet18"}, True),
        ({"model": "cifar_resnet", "depth": 110, "channels": [2, 2, 2, 2]}, True),
        ({"model": "timm/mobilenetv3_small_050"}, False),
    ):
        model = building.build(net, (3, 32, 32), 10)
        if zeros:
            for tensor in model.state_dict().values():
                tensor.zero_()
        data = packed.encode(model, net, facts)
        decoded, _ = packed.decode(data)
        assert len(data) < 1000 or not zeros
        assert all(map(torch.equal, model.state_dict().values(), decoded.state_dict().values()))


def test_more_numbers_than_a_file_holds_are_neither_written_nor_read(monkeypatch):
    huge = {"a": np.broadcast_to(np.float32(0), (2**25,))}
    with pytest.raises(ValueError, match=r"33,554,432 numbers in a file of \d+ bytes; at most 1"):
        container.encode(FACTS, huge)
    monkeypatch.setattr(container, "_check_room", lambda *a: None)
    data = container.encode(FACTS, huge)
    monkeypatch.undo()
    monkeypatch.setattr(container, "code_tensor", lambda *a: pytest.fail("took memory for it"))
    with pytest.raises(ValueError, match=r"x.tiny: 33,554,432 numbers in a file"):
        container.decode(data, "x.tiny")


def test_text_that_unfolds_and_names_without_number():
    with pytest.raises(ValueError, match="the header's .* bytes unfold to more than"):
        container.read_header(container.encode(FACTS | {"classes": ["a" * 10**6]}, {}))
    long = container.encode(FACTS, {"a" * 9000: np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"a text is longer than 8,\d+ bytes"):
        container.decode(long)


def test_two_tensors_of_one_name(monkeypatch):
    class Twice(dict):
        def items(self):
            return [*super().items(), *super().items()]

    layout = Twice(a=((1,), "float32"))
    monkeypatch.setattr(container, "_normal", lambda _: layout)
    data = container.encode(FACTS, {"a": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match="two tensors are called 'a'"):
        container.decode(data)


def test_a_file_is_opened_under_a_profiler(tmp_path):
    """The limit on calls takes the place of a profiler for a moment, and gives it back."""
    spec = {"model": "lenet300", "hidden": [4]}
    net = building.build(spec, (1, 8, 8), 2)
    (tmp_path / "x.tiny").write_bytes(packed.encode(net, spec, FACTS | {"reading": {}}))
    profiler = cProfile.Profile()
    with profiler:
        load(tmp_path / "x.tiny")
        len(str(tmp_path))
    names = {function for _, _, function in pstats.Stats(profiler).stats}
    assert {"load", "<built-in method builtins.len>"} <= names and sys.getprofile() is None
    seen = []
    sys.setprofile(lambda frame, event, argument: seen.append(event))
    try:
        load(tmp_path / "x.tiny")
        seen.clear()
        str(tmp_path)
    finally:
        sys.setprofile(None)
    assert "call" in seen
