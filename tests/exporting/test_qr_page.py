"""A page in one QR code: a decoder reads it, node and a browser run it, and it answers as the student."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
from torch import nn

import trainer
from trainer.exporting import qr_page
from trainer.exporting.export import subject_of
from trainer.exporting.player import answers
from trainer.exports import qr as target
from trainer.mistakes import Mistake

CHROMIUM = shutil.which("chromium")
PAGE = [{"to": "qr", "page": True}]


class Branched(nn.Module):
    """Every layer of the small script: convolutions dense and of each channel alone, with and without bias; a sum; both poolings."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.depth = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.point = nn.Conv2d(4, 4, 1)
        self.wide = nn.Conv2d(4, 5, 2)
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = torch.relu(x + torch.relu(self.point(self.depth(x))))
        x = torch.relu(self.wide(nn.functional.max_pool2d(x, 2, 1)))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


class Flat(nn.Module):
    """A grid of unequal sides, pooled in steps of its kernel, flattened."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(3 * 3 * 2, 3)

    def forward(self, x):
        return self.fc(nn.functional.max_pool2d(torch.relu(self.conv(x)), 2).flatten(1))


def rounded(net, steps=16):
    """A network whose weights are multiples of a power of two, few of them different."""
    torch.manual_seed(3)
    for parameter in net.parameters():
        parameter.data = (torch.randn_like(parameter) * 0.4 * steps).round() / steps
    return net.eval()


def subject(net, shape, classes=None):
    return subject_of(net, shape, mean=[0.25], std=[0.3], classes=classes or [])


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node: scripts/install --devices")
@pytest.mark.parametrize(("net", "shape"), [(Branched, (1, 9, 9)), (Flat, (1, 9, 7))])
def test_the_script_computes_every_layer_as_torch(net, shape):
    one = subject(rounded(net()), shape)
    page = qr_page.page_of(one)
    images = np.random.default_rng(1).integers(0, 256, (20, *shape), np.uint8)
    found = answers(qr_page.script_of(page, shape), images)
    expected = one.logits(one.normalized(images))
    assert np.ptp(expected, axis=0).min() > 0.1  # the images are told apart
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node: scripts/install --devices")
@pytest.mark.parametrize("given", [{}, {"mean": [-0.25], "std": [2.0]}, {"mean": [0.0], "std": [1.0]}])
def test_any_mean_and_std(given):
    one = subject_of(rounded(Flat()), (1, 9, 7), **given)
    images = np.random.default_rng(1).integers(0, 256, (5, 1, 9, 7), np.uint8)
    found = answers(qr_page.script_of(qr_page.page_of(one), (1, 9, 7)), images)
    np.testing.assert_allclose(found, one.logits(one.normalized(images)), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node: scripts/install --devices")
def test_names_of_classes_stay_as_they_are():
    names = ['the "a , b" of c', "d // e ; f", "g \\ <b>h</b> ; }", "<!-- <script>"]
    page = qr_page.page_of(subject(rounded(Flat()), (1, 9, 7), names))
    assert not set(page) & set("#%")
    script = page.partition("<script>")[2].partition("</script>")[0]
    written = script.partition("Z.textContent=")[2].partition("[C(")[0]
    assert json.loads(written) == names and "<" not in written
    answers(qr_page.script_of(page, (1, 9, 7)), np.zeros((1, 1, 9, 7), np.uint8))  # it is a script


def test_a_network_that_no_code_could_hold_is_refused_at_once():
    big = nn.Sequential(nn.Flatten(), nn.Linear(784, 1000)).eval()
    started = time.process_time()
    with pytest.raises(
        Mistake, match="to qr: the page has more than 65,536 bytes; one QR code holds at most 2,953"
    ):
        qr_page.page_of(subject(big, (1, 28, 28)))
    assert time.process_time() - started < 30  # 2 s; as one number it would take many minutes


def test_a_page_with_other_weights_says_that_it_is_broken():
    one = subject(rounded(Flat()), (1, 9, 7))
    page = qr_page.page_of(one)
    expected = int(one.test_vector()[1].argmax())
    assert f"=={expected}?" in page
    wrong = page.replace(f"=={expected}?", f"=={expected + 1}?")
    with pytest.raises(RuntimeError, match="own check fails"):
        answers(qr_page.script_of(wrong, (1, 9, 7)), np.zeros((1, 1, 9, 7), np.uint8))


@pytest.mark.parametrize(
    "values", [[0.0], [0.5, -0.5, 0.25], [1.0, 3.0, 1e5], [-3.0, 0.1, 2.0**-30], [1.0, -(2.0**-70)], [7.0]]
)
@pytest.mark.parametrize("repeated", [1, 40])
def test_weights_are_written_exactly(values, repeated):
    """Reads the number back as the script does."""
    tensor = np.tile(np.float32(values), repeated)
    form = qr_page._Form(tensor)
    most = max(form.range, form.offset, len(form.table)) + 1
    letters = qr_page._text(form.digits(most))
    assert not set(letters) & set('"#%<\\')
    number = 0
    for letter in reversed(letters):
        number = number * 88 + qr_page.ALPHABET.index(letter)

    def next_of(radix):
        nonlocal number
        number, digit = divmod(number, radix)
        return digit

    k, r, m, s = next_of(most), next_of(most), next_of(most), 2.0 ** -next_of(99)
    table = [(next_of(r) - m) * s for _ in range(k or len(tensor))]
    read = [table[next_of(k)] for _ in tensor] if k else table
    assert np.array_equal(np.float32(read), tensor) and number == 0


def test_letters_are_what_the_script_takes_them_for():
    codes = [ord(letter) - 36 for letter in qr_page.ALPHABET]
    assert [e - (e > 1) - (e > 24) - (e > 56) for e in codes] == list(range(88))


def test_the_code_reads_as_the_page_and_answers(tmp_path):
    pytest.importorskip("segno")
    pytest.importorskip("zxingcpp")
    [row] = trainer.export(rounded(Branched()), tmp_path, PAGE, shape=(1, 9, 9), mean=[0.25], std=[0.3])
    folder = tmp_path / "qr"
    assert row["files"] == ["student.svg", "student.png", "student.html"]
    address = target.bytes_of(folder / "student.png").decode()
    assert address == "data:text/html," + (folder / "student.html").read_text()
    assert row["file_bytes"] == len(address) < 2953
    assert row["agreement_student"] == 100 and row["max_difference"] < 1e-4 and row["num_images"] == 256


@pytest.mark.device
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: scripts/install --devices")
def test_a_browser_opens_the_address_and_answers_what_is_drawn():
    playwright = pytest.importorskip("playwright.sync_api")
    one = subject(rounded(Branched()), (1, 9, 9), ["naïve", 'a "b"', "c<d", "e"])
    address = qr_page.address_of(qr_page.page_of(one)).decode()
    images = np.random.default_rng(1).integers(0, 256, (5, 1, 9, 9), np.uint8)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 300, "height": 300})
        page.goto(address)
        assert page.inner_text("#Z") == "Draw. Double click: anew"
        found = page.evaluate("images => images.map(N)", images.reshape(5, -1).tolist())
        assert found == pytest.approx(one.logits(one.normalized(images)), rel=1e-4, abs=1e-4)
        box = page.locator("#B").bounding_box()
        page.mouse.move(box["x"] + 20, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 70, box["y"] + 60, steps=5)
        page.mouse.up()
        shown = page.inner_text("#Z")
        assert shown in one.classes
        drawn = page.evaluate("E(81, i => d[(i + j) * 4 + 3] || 0)")
        logits = one.logits(one.normalized(np.uint8(drawn).reshape(1, 1, 9, 9)))[0]
        assert shown == one.classes[logits.argmax()] and max(drawn) > 200
        page.dblclick("#B")
        assert page.evaluate("f.getImageData(0, 0, 9, 9).data.every(value => value == 0)")


def test_what_the_small_script_does_not_have_is_named_before_anything_is_written(tmp_path):
    def refused(net, shape, match, classes=None):
        given = {"mean": [0.5] * shape[0], "std": [0.5] * shape[0], "classes": classes or []}
        with pytest.raises(Mistake, match=match):
            trainer.export(net.eval(), tmp_path / "out", PAGE, shape=shape, **given)
        assert not (tmp_path / "out").exists()

    def after(*layers):
        return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))

    def made(*layers):
        net = after(*layers)
        net(torch.zeros(2, 1, 8, 8))
        return net

    refused(
        made(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
        (1, 8, 8),
        "layer '1': operator batch_norm is not in the small script",
    )
    refused(made(nn.Conv2d(1, 2, (3, 1))), (1, 8, 8), "layer '0': a convolution that is not square is not")
    refused(
        made(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=2)),
        (1, 8, 8),
        "layer '1': a convolution in groups is not",
    )
    refused(made(nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, 2, 1)), (1, 8, 8), "layer '1': operator max_pool is not")
    refused(made(nn.MaxPool2d(2), nn.ReLU()), (1, 8, 8), "layer '1': ReLU of anything but a layer is not")
    refused(made(nn.Conv2d(1, 2, 3), nn.Sigmoid()), (1, 8, 8), "layer '1': operator sigmoid is not")
    refused(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), (3, 4, 4), "a drawing has one channel, .* have 3")
    big = nn.Sequential(nn.Flatten(), nn.Linear(64, 40))
    refused(big, (1, 8, 8), r"to qr: the page has \d+,\d+ bytes; one QR code holds at most 2,953")
    refused(rounded(Branched()), (1, 9, 9), "the name of a class holds '%'", ["1 %", "b", "c", "d"])
