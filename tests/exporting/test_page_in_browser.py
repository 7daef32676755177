"""The page in a real browser: it opens from a file, asks nothing of the network, answers as the network does, and can be drawn on."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.data.test_image_file import odd_photos
from tests.reporting.test_page import EVIDENCE
from tests.reporting.test_report import a_report, some_weights
from trainer.data.batches import make_data
from trainer.data.image_file import read_image
from trainer.data.reading import Reading
from trainer.exporting.export import subject_of
from trainer.exports.page import page
from trainer.recipe import shelves
from trainer.recipe.keys import DataKeys
from trainer.reporting.page import page as report_page

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(CHROMIUM is None or shutil.which("node") is None, reason="needs chromium and node: scripts/install --devices"),
]  # fmt: skip


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    return subject_of(
        net.eval(), (1, 28, 28), mean=[0.1], std=[0.3], classes=[f"class {i}" for i in range(10)]
    )


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        yield (found := driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]))
        found.close()


@pytest.fixture
def browse(browser):
    """Opens a file in Chromium: returns a function of (file, options) that returns the page, its errors and its requests."""
    contexts = []

    def opened(file, **options):
        contexts.append(browser.new_context(**options))
        found = contexts[-1].new_page()
        troubles: list[str] = []

        def console(message):
            if message.type in ("error", "warning"):
                troubles.append(message.text)

        def request(one):
            if not one.url.startswith(("file:", "data:", "blob:")):
                troubles.append(one.url)

        found.on("console", console)
        found.on("pageerror", lambda error: troubles.append(str(error)))
        found.on("request", request)
        found.goto(f"file://{file}")
        return found, troubles

    yield opened
    for context in contexts:
        context.close()


def test_500_images_have_the_networks_classes(subject, browse, tmp_path):
    page(subject, tmp_path)
    found, troubles = browse(tmp_path / "student.html")
    images = np.random.default_rng(1).integers(0, 256, (500, 1, 28, 28), np.uint8)
    classes = found.evaluate(
        "images => images.map(one => { const l = student(one); return l.indexOf(Math.max(...l)); })",
        images.reshape(500, -1).tolist(),
    )
    assert classes == subject.logits(subject.normalized(images)).argmax(1).tolist()
    assert "Self-check passed" in found.text_content(".check")
    assert troubles == []


def test_drawing_changes_the_answer(subject, browse, tmp_path):
    page(subject, tmp_path)
    found, troubles = browse(tmp_path / "student.html")
    bars = "() => [...document.querySelectorAll('.bars i')].map(bar => bar.style.width)"
    box = found.locator(".board").bounding_box()
    seen = []
    for down in (0.2, 0.8):
        found.mouse.move(box["x"] + 60, box["y"] + 60)
        found.mouse.down()
        found.mouse.move(box["x"] + 200, box["y"] + 280 * down, steps=5)
        found.mouse.up()
        seen.append(found.evaluate(bars))
        found.click(".clear")
    assert len(seen[0]) == 10 and seen[0] != seen[1] and troubles == []


def test_a_drawing_fits_as_the_test_images_do(subject, browse, tmp_path):
    """Of the digits, which fill their images from top to bottom, nothing is cut off; MNIST's have a margin of 4 pixels."""
    keys = shelves.checker(shelves.find("dataset", "digits"), DataKeys)
    data = make_data(keys.model_validate({"dataset": "digits", "size": 28}), torch.device("cpu"))
    rows = {}
    for name, given in (("mnist", subject), ("digits", dataclasses.replace(subject, data=data))):
        (tmp_path / name).mkdir()
        page(given, tmp_path / name)
        found, troubles = browse(tmp_path / name / "student.html")
        box = found.locator(".board").bounding_box()
        found.mouse.move(box["x"] + 150, box["y"] + 100)
        found.mouse.down()
        found.mouse.move(box["x"] + 150, box["y"] + 220, steps=5)
        found.mouse.up()
        seen = found.evaluate(
            "() => Array.from(document.querySelector('.seen').getContext('2d').getImageData(0, 0, 28, 28).data)"
        )
        image = np.array(seen, np.uint8).reshape(28, 28, 4)[..., 0]
        rows[name] = np.flatnonzero((image > 60).any(1))
        assert troubles == []
    assert (rows["mnist"][0], rows["mnist"][-1]) == (4, 23)
    assert (rows["digits"][0], rows["digits"][-1]) == (0, 27)


def test_a_dropped_image_is_read_as_by_the_reader(subject, browse, tmp_path):
    page(subject, tmp_path)
    picture = np.random.default_rng(2).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    found, troubles = browse(tmp_path / "student.html")
    found.set_input_files("input[type=file]", tmp_path / "photo.png")
    found.wait_for_function("document.querySelector('.said').textContent.includes('photo.png')")
    shown = found.evaluate(
        "() => Array.from(document.querySelector('.seen').getContext('2d').getImageData(0, 0, 28, 28).data)"
    )
    assert (
        np.array(shown, np.uint8).reshape(28, 28, 4)[..., 0]
        == read_image(tmp_path / "photo.png", Reading((1, 28, 28))).numpy()[0]
    ).all()
    found.set_input_files(
        "input[type=file]", {"name": "x.png", "mimeType": "image/png", "buffer": b"no image"}
    )
    found.wait_for_function("document.querySelector('.said').textContent.includes('is no image')")
    assert troubles == []


def test_odd_photos_that_are_dropped_have_the_readers_pixels(browse, tmp_path):
    """All modes of PNG, turned by EXIF, transparent, grey, with a palette: bit by bit what `read_image` gives."""
    odd_photos(tmp_path / "photos", 48)
    files, modes = [], set()
    for file in sorted(tmp_path.glob("photos/*/*.png")):
        with Image.open(file) as image:
            if image.mode != "I;16":
                files.append(file)
                modes.add(image.mode)
    assert modes == {"RGB", "L", "RGBA", "LA", "P", "1"}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 5, stride=3), nn.Flatten(), nn.Linear(72, 3)).eval()
    reading = Reading((3, 20, 20), crop=0.8)
    page(
        subject_of(net, (3, 20, 20), mean=[0.5] * 3, std=[0.2] * 3, classes=list("abc"), reading=reading),
        tmp_path,
    )
    found, troubles = browse(tmp_path / "student.html")
    for file in files:
        found.set_input_files("input[type=file]", file)
        found.wait_for_function(f"document.querySelector('.said').textContent.includes({file.name!r})")
        shown = found.evaluate(
            "() => Array.from(document.querySelector('.seen').getContext('2d').getImageData(0, 0, 20, 20).data)"
        )
        shown = np.array(shown, np.uint8).reshape(20, 20, 4)[..., :3].transpose(2, 0, 1)
        assert (shown == read_image(file, reading)).all(), file.name
    assert [
        line for line in troubles if "willReadFrequently" not in line
    ] == []  # said of this test's own looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1100])
def test_the_report_fits_its_screen_in_both_themes(browse, tmp_path, scheme, width):
    log = [
        {"kind": "numbers", "stage": "distill", "step": n, "loss": 2.0 / n, "validation": 50.0 + n}
        for n in (1, 2, 3)
    ]
    file = tmp_path / "report.html"
    file.write_text(report_page(a_report(seed=1), log, some_weights(), EVIDENCE), encoding="utf-8")
    found, troubles = browse(file, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert found.evaluate("document.documentElement.scrollWidth") <= width
    back = json.loads(
        found.evaluate(
            "JSON.stringify(getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number))"
        )
    )
    assert (max(back) < 60) == (scheme == "dark")
    assert found.locator("svg").count() >= 4 and troubles == []


def test_names_of_classes_leave_the_page_alive(browse, tmp_path):
    """In a script element "<!--<script>" takes away the end of the script."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 2)).eval()
    names = ["a<!--", "b<script>"]
    page(subject_of(net, (1, 28, 28), mean=[0.1], std=[0.3], classes=names), tmp_path)
    found, troubles = browse(tmp_path / "student.html")
    assert found.evaluate("student.classes") == names and not troubles
    assert found.evaluate("student.check()") < 1e-3
