"""The script that runs a student in a browser: its coder, every operator against torch, and images brought in as by Pillow."""

import json
import re
import shutil
import subprocess
from importlib import resources

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import trainer
from trainer.data.image_file import read_image
from trainer.data.reading import FITS, Reading
from trainer.exporting.export import export, subject_of
from trainer.exporting.player import answers as answers_in_node
from trainer.exporting.player import player, script_in
from trainer.exporting.script import _library, script_of
from trainer.exports.page import page
from trainer.mistakes import Mistake

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node: apt-get install nodejs")


def answers(net: nn.Module, shape, tmp_path, num=3):
    """The network's logits and the script's, for random images."""
    torch.manual_seed(0)
    subject = subject_of(net.eval(), shape, mean=[0.4] * shape[0], std=[0.3] * shape[0])
    file = tmp_path / "x.html"
    file.write_text(player(subject, script_of(subject), 0), encoding="utf-8")
    images = np.random.default_rng(0).integers(0, 256, (num, *shape), np.uint8)
    return subject.logits(subject.normalized(images)), answers_in_node(script_in(file), images)


class Everything(nn.Module):
    """Most operators of the graph, in one network."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1, dilation=1)
        self.deep = nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=6, bias=False)
        self.norm, self.group = nn.BatchNorm2d(6), nn.GroupNorm(2, 6)
        self.norm.running_mean.normal_(), self.norm.running_var.uniform_(0.5, 2)
        self.slope = nn.PReLU(6)
        self.layer = nn.LayerNorm(6)
        self.rnn = nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 5, batch_first=True)
        self.flat = nn.Conv1d(5, 5, 3, stride=2, padding=1)
        self.qkv = nn.Linear(5, 15)
        self.fc = nn.Linear(40, 7)

    def forward(self, x):
        x = F.hardswish(self.norm(self.conv(x)))
        x = self.slope(self.group(self.deep(x))) + F.silu(x) * torch.sigmoid(x.mean((2, 3), keepdim=True))
        x = F.max_pool2d(x, 3, 2, padding=1, ceil_mode=True) + F.avg_pool2d(
            x, 3, 2, padding=1, ceil_mode=True
        )
        x = F.pad(x, (1, 0, 0, 1), value=0.5)
        x = F.elu(F.leaky_relu(x, 0.1)) - F.mish(F.relu6(x)) / (1 + x.abs())
        x = self.layer(x.flatten(2).transpose(1, 2))
        x, _ = self.rnn(F.gelu(x) + F.softplus(x))
        x, _ = self.gru(F.gelu(x, approximate="tanh"))
        x = self.flat(x.transpose(1, 2))[:, :, 1::2].transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = F.scaled_dot_product_attention(q, k, v) + torch.softmax(q @ k.transpose(1, 2), -1) @ v
        x = torch.cat([x, torch.tanh(x).exp(), x.amax(2, keepdim=True).expand_as(x), (x**2).sqrt()], 2)
        return self.fc(x[:, :2].flatten(1))


@needs_node
def test_every_operator_answers_as_torch(tmp_path):
    torch.manual_seed(1)
    net = Everything()
    ours, theirs = answers(net, (2, 20, 20), tmp_path)
    np.testing.assert_allclose(theirs, ours, atol=2e-5)


@needs_node
@pytest.mark.parametrize("zeros", [0.0, 0.9])
@pytest.mark.parametrize("bits", [1, 4])
def test_compressed_weights_come_back_bit_for_bit(tmp_path, zeros, bits):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 30), nn.ReLU(), nn.Linear(30, 5))
    if zeros:
        trainer.prune(net, sparsity=zeros)
    trainer.share(net, bits=bits)
    subject = subject_of(net.eval(), (1, 8, 8))
    script = script_of(subject).replace(
        "return Object.assign(run", "return Object.assign({w0, w1, w2, w3, w4, w5}, run"
    )
    out = subprocess.run(
        ["node", "-e", script + "console.log(JSON.stringify([0,1,2,3,4,5].map(i => Array.from(student['w' + i]))))"],
        capture_output=True, check=True,
    )  # fmt: skip
    found = [np.array(values, np.float32) for values in json.loads(out.stdout)]
    for values, name in zip(found, ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]):
        assert values.tobytes() == subject.graph.weights[name].tobytes(), name


@needs_node
@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(28, 28), (13, 40), (90, 61), (200, 50)])
@pytest.mark.parametrize("fit", FITS)
def test_an_image_is_brought_in_as_by_the_reader(tmp_path, name, size, fit):
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 4), np.uint8)
    for channels in (1, 3):
        crop = 0.9 if fit == "crop" else 1.0
        reading = Reading((channels, 24, 32), crop=crop, filter=name, background=(10, 200, 30), fit=fit)
        facts = {"crop": crop, "filter": name, "background": reading.background, "fit": fit}
        source = (
            f"const student = {{shape: {list(reading.shape)}}}, reading = {json.dumps(facts)};\n"
            + (resources.files("trainer.exporting") / "templates/player.js").read_text()
            + f"\nprocess.stdout.write(Buffer.from(brought(require('fs').readFileSync(0), {size[0]}, {size[1]})));"
        )
        out = subprocess.run(
            ["node", "-e", source], input=pixels.tobytes(), capture_output=True, check=True
        ).stdout
        expected = read_image(Image.fromarray(pixels, "RGBA"), reading).numpy()
        assert np.abs(np.frombuffer(out, np.uint8).astype(int) - expected.reshape(-1)).max() == 0


class Several(nn.Module):
    """An image becomes three, each of which goes through the same layers."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.reshape(-1, 1, 6, 6)).reshape(-1, 3, 8).sum(1)


@needs_node
def test_an_image_that_becomes_several(tmp_path):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.Flatten())
    ours, theirs = answers(Several(inner), (3, 6, 6), tmp_path)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize("target", ["page", "c"])
def test_several_sequences_of_an_image_are_refused(target):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 4, batch_first=True)

        def forward(self, x):
            return self.lstm(x.reshape(-1, 6, 6))[0].reshape(-1, 3, 24).sum(1)

    with pytest.raises(Mistake, match=f"to {target}: layer 'lstm': operator lstm of 3 sequences an image"):
        export(Rows(), "unused", target, shape=(3, 6, 6))


@needs_node
def test_a_script_may_be_longer_than_an_argument(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 3))
    ours, theirs = answers(net, (1, 16, 16), tmp_path)
    assert (tmp_path / "x.html").stat().st_size > 160_000
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_only_what_is_needed_is_in_the_script():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    script = script_of(subject_of(net, (1, 4, 4)))
    assert "function linear" in script and "function conv" not in script and "//" not in script
    needed = _library("conv(x)")  # a convolution puts the maps of images together
    assert re.findall(r"function (\w+)", needed) == ["conv", "concat", "each"]


def test_names_of_classes_are_no_code():
    subject = subject_of(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2), classes=["</script><b>", "a<!--<script>"]
    )
    script = script_of(subject)
    assert "</script><b>" not in script and "<!--" not in script and "<script" not in script


@needs_node
def test_the_pages_bytes_are_counted_without_its_test_images(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    made = page(subject_of(net, (1, 8, 8)), tmp_path)
    size = (tmp_path / "student.html").stat().st_size
    assert abs(made.num_bytes - size) < 60 and "student.html" in [file.name for file in made.files]
