"""The packed file, or a page, as a QR code: a real decoder gives back the same bytes, and what they hold answers as the student."""

import shutil
import sys

import pytest
import torch
from torch import nn

import trainer
from trainer.exports import qr as target
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.packing import network as packed
from trainer.runs.export_file import export_file

pytest.importorskip("segno")
SPEC = {"model": "lenet300", "hidden": [12]}
CHROMIUM = shutil.which("chromium")


def written(file, spec=SPEC):
    torch.manual_seed(2)
    classes = [str(number) for number in range(10)]
    net = build(spec, (1, 8, 8), 10)
    for parameter in net.parameters():
        parameter.data = (parameter.data * 20).round() / 20
    trainer.pack(net, file, (1, 8, 8), [0.5], [0.25], classes, spec)
    return net.eval()


@pytest.fixture
def picture(tmp_path):
    """A code, and the file that it holds."""
    pytest.importorskip("zxingcpp")
    file = tmp_path / "student.tiny"
    written(file)
    [row] = export_file(file, ["qr"], tmp_path / "out")
    return row, tmp_path / "out/qr", file.read_bytes()


def test_the_picture_reads_as_the_file(picture):
    row, folder, content = picture
    assert row["files"] == ["student.svg", "student.png"] and row["file_bytes"] == len(content) < 2953
    assert target.bytes_of(folder / "student.png") == content
    assert row["agreement_student"] == 100 and row["max_difference"] == 0
    [note] = row["notes"]
    assert f"with the {len(content):,} bytes" in note and "not read back" not in note


@pytest.mark.device
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: scripts/install --devices")
def test_the_drawing_reads_as_the_file(picture, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    _, folder, content = picture
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 400, "height": 400}, device_scale_factor=4)
        page.goto((folder / "student.svg").as_uri())
        page.screenshot(path=tmp_path / "drawn.png")
    assert target.bytes_of(tmp_path / "drawn.png") == content


def test_a_network_without_a_file_is_packed(tmp_path):
    pytest.importorskip("zxingcpp")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    [row] = trainer.export(net, tmp_path, "qr", shape=(1, 4, 4), mean=[0.3], std=[0.5])
    content = target.bytes_of(tmp_path / "qr/student.png")
    (tmp_path / "read.tiny").write_bytes(content)
    same = trainer.load(tmp_path / "read.tiny", into=nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    assert torch.equal(same[1].weight, net[1].weight) and packed.header(content)["mean"] == [0.3]
    assert row["file_bytes"] == len(content)


def test_what_no_code_holds_is_refused_before_anything_is_written(tmp_path):
    file = tmp_path / "student.tiny"
    written(file, {"model": "lenet300", "hidden": [200]})
    size = file.stat().st_size
    assert size > 2953
    with pytest.raises(Mistake, match=f"to qr: the packed file has {size:,} bytes; .* holds at most 2,953"):
        export_file(file, ["pt2", "qr"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [2953, 2954])
def test_the_limit_is_the_largest_codes(size):
    segno = pytest.importorskip("segno")
    if size == target.MOST_BYTES:
        assert segno.make_qr(bytes(size), error="l", mode="byte").designator == "40-L"
    else:
        with pytest.raises(segno.DataOverflowError):
            segno.make_qr(bytes(size), error="l", mode="byte")


def test_a_picture_that_reads_otherwise_is_no_export(tmp_path, monkeypatch):
    written(tmp_path / "student.tiny")
    monkeypatch.setattr(target, "bytes_of", lambda picture: b"other")
    with pytest.raises(RuntimeError, match="the picture reads as 5 other bytes"):
        export_file(tmp_path / "student.tiny", ["qr"], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_without_a_decoder_it_is_said(tmp_path, monkeypatch):
    written(tmp_path / "student.tiny")
    monkeypatch.setitem(sys.modules, "zxingcpp", None)
    [row] = export_file(tmp_path / "student.tiny", ["qr"], tmp_path / "out")
    assert "not read back from the picture" in row["notes"][-1] and row["agreement_student"] == 100
    assert "needs the package zxing-cpp: pip install zxing-cpp, or the extra qr" in row["notes"][-1]
