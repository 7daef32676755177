"""Predictions for many files: folders, patterns, stdin, bad images among good ones, every form of output, both kinds of student."""

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from trainer.exporting.export import export
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.packing import network as packed
from trainer.packing.loading import load
from trainer.runs.answering import open_student
from trainer.runs.predicting import BATCH, answers, files_of, write_answers
from trainer.runtime import student as runtime

SPEC, SHAPE = {"model": "lenet5", "width": 2}, (1, 28, 28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed student, its ONNX file, and 70 odd images, one of them no image."""
    pytest.importorskip("onnxruntime")
    here = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    net = build(SPEC, SHAPE, 3)
    facts = {"shape": SHAPE, "mean": [0.2], "std": [0.4], "classes": ["a", "b,c", "d"]}
    (here / "s.tiny").write_bytes(packed.encode(net, SPEC, facts))
    (here / "images" / "sub").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(BATCH + 6):
        size = tuple(random.integers(20, 60, 2))
        place = here / "images" / ("sub" if number % 2 else "") / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(place)
    (here / "images" / "7.png").write_text("no image")
    export(net, here / "export", "onnx", **facts)
    return here


def test_every_file_once_in_order_and_a_bad_one_stops_none(folder):
    files = list(files_of([str(folder / "images")]))
    assert len(files) == BATCH + 7
    found = list(answers(open_student(folder / "s.tiny"), files, 2, 3))
    assert [one.file for one in found] == files
    [bad] = [one for one in found if one.error]
    assert bad.file.endswith("7.png") and "is no image that can be read" in bad.error and bad.classes == []
    net = load(folder / "s.tiny")
    for one in found:
        if one is not bad:
            with torch.inference_mode():
                best = net(net.preprocess(one.file)).softmax(1)[0].topk(2)
            assert [name for name, _ in one.classes] == [net.classes[k] for k in best.indices]
            np.testing.assert_allclose([share for _, share in one.classes], best.values, atol=1e-6)


def test_an_onnx_file_says_the_same(folder):
    files = [file for file in files_of([str(folder / "images")]) if not file.endswith("7.png")]
    ours, theirs = (
        list(answers(open_student(folder / name), files, 3, 2))
        for name in ("s.tiny", "export/onnx/student.onnx")
    )
    for one, other in zip(ours, theirs):
        assert [name for name, _ in one.classes] == [name for name, _ in other.classes]
        np.testing.assert_allclose([p for _, p in one.classes], [p for _, p in other.classes], atol=1e-5)


def test_what_arguments_mean(folder, monkeypatch):
    pattern = str(folder / "images" / "**" / "1*.png")
    assert [file.rpartition("/")[2] for file in files_of([pattern])][:3] == ["10.png", "12.png", "14.png"]
    monkeypatch.setattr("sys.stdin", io.StringIO("x.png\r\n\r\ny z.png\n"))
    assert list(files_of(["-", "none*.png", "w.png"])) == ["x.png", "y z.png", "none*.png", "w.png"]


def test_a_folder_by_a_relative_path(folder, monkeypatch):
    monkeypatch.chdir(folder)
    files = list(files_of(["images"]))
    assert len(files) == BATCH + 7 and all(Path(file).is_file() for file in files)
    (folder / "none").mkdir(exist_ok=True)
    [one] = answers(open_student(folder / "s.tiny"), files_of(["none"]), 1, 1)
    assert one.file == "none" and "Is a directory" in one.error


def test_forms(folder):
    student = open_student(folder / "s.tiny")
    files = [str(folder / "images" / name) for name in ("0.png", "7.png", "2.png")]
    texts = {}
    for form in ("text", "json", "csv"):
        out, err = io.StringIO(), io.StringIO()
        assert write_answers(answers(student, files, 3, 1), form, out, err) == 1
        assert err.getvalue().count("7.png: is no image that can be read") == 1
        texts[form] = out.getvalue()
    lines = [json.loads(line) for line in texts["json"].splitlines()]
    assert [line["file"] for line in lines] == files and "error" in lines[1]
    rows = list(csv.reader(io.StringIO(texts["csv"])))
    assert rows[0] == ["file", "class", "probability"] and len(rows) == 7
    first = lines[0]["classes"][0]
    assert rows[1] == [files[0], first["class"], f"{first['probability']:.6f}"]
    assert (
        texts["text"]
        .splitlines()[0]
        .startswith(f"{files[0]}: {first['class']} {100 * first['probability']:.1f} %")
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_a_name_that_is_no_utf8_is_an_escape_in_every_form(folder, tmp_path):
    name = os.fsencode(tmp_path) + b"/x\xff.png"
    shutil.copy(folder / "images" / "0.png", name)
    found = list(answers(open_student(folder / "s.tiny"), [os.fsdecode(name)], 1, 1))
    texts = {}
    for form in ("text", "json", "csv"):
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace")
        assert write_answers(found, form, out, io.StringIO()) == 0
        out.flush()
        texts[form] = out.buffer.getvalue().decode()
        assert "x\\udcff.png" in texts[form]
    assert os.fsencode(json.loads(texts["json"])["file"]) == name


@pytest.mark.parametrize("content", [b"", b"no file of ONNX"])
def test_a_damaged_onnx_file(tmp_path, content):
    pytest.importorskip("onnxruntime")
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(Mistake, match="x.onnx: is no ONNX file that can be run"):
        open_student(tmp_path / "x.onnx")


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (None, None),
        (2, None),
        (3, "has 2 answers .* name 3 classes"),
        (["a"], "name 1 classes"),
        ([], "name 0 classes"),
    ],
)
def test_an_onnx_files_classes_are_a_number_or_names_as_many_as_its_answers(tmp_path, classes, told):
    pytest.importorskip("onnxruntime")
    import onnx

    facts = {"shape": (1, 2, 2), "mean": [0.5], "std": [0.5], "classes": ["0", "1"]}
    export(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), tmp_path, "onnx", **facts)
    model = onnx.load(tmp_path / "onnx/student.onnx")
    for entry in model.metadata_props:
        if entry.key == "classes" and classes is not None:
            entry.value = json.dumps(classes)
    onnx.save(model, tmp_path / "x.onnx")
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    if told is None:
        assert runtime.open_onnx(tmp_path / "x.onnx").predict([tmp_path / "a.png"])[0] in ("0", "1")
        return
    with pytest.raises(Mistake, match=told):
        runtime.open_onnx(tmp_path / "x.onnx").predict([tmp_path / "a.png"])


def test_an_onnx_file_of_somebody_else(tmp_path):
    pytest.importorskip("onnxruntime")
    export(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), tmp_path, "onnx", shape=(1, 2, 2))
    with pytest.raises(Mistake, match="its metadata have no 'classes'"):
        open_student(tmp_path / "onnx/student.onnx")
