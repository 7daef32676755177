"""Files of networks side by side: each runtime's accuracy, what is missing is said, sparse products, names, the sentence."""

import math
from pathlib import Path

import pytest
import torch

from trainer.data.batches import make_data
from trainer.data.reading import reading_of
from trainer.exporting import c_machines
from trainer.exporting.export import export
from trainer.exporting.subject import NotInstalled
from trainer.functional import prune
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.packing import network as packed
from trainer.recipe.recipe import read
from trainer.reporting.plots import accuracy_against_latency
from trainer.reporting.tables import bench_table
from trainer.runs import bench as benching
from trainer.runs.answering import Student
from trainer.runs.bench import bench, verdicts
from trainer.runs.bench_subjects import Subject, short_names
from trainer.runs.c_files import told_by
from trainer.runs.evaluate_file import evaluate_file

SPEC = {"model": "lenet5", "width": 2}
RECIPE = """
name: b
data: {dataset: digits, subset: 40, validation: 20}
student: {model: lenet5, width: 2}
stages: [{stage: train, training: {epochs: 1}}, {stage: pack}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe, a pruned student packed for its data, and exports of it."""
    pytest.importorskip("onnxruntime")
    here = tmp_path_factory.mktemp("bench")
    (here / "b.yaml").write_text(RECIPE)
    data = make_data(read(here / "b.yaml")[0].data, torch.device("cpu"))
    torch.manual_seed(0)
    net = build(SPEC, data.shape, 10).eval()
    prune(net, sparsity=0.7)
    (here / "s.tiny").write_bytes(packed.encode(net, SPEC, packed.facts_of(data)))
    facts = {"mean": data.mean, "std": data.std, "classes": data.classes, "shape": data.shape}
    export(net, here / "export", ["onnx"], **facts)
    return here


@pytest.fixture
def at_once(monkeypatch):
    """Networks are opened and asked in this process; each takes as many seconds as it was asked before."""
    asked = []

    def measured(prepare, arguments, shape, threads, batches, seconds):
        run = prepare(**arguments, threads=threads)()
        for batch in batches:
            assert run(torch.zeros(batch, *shape).numpy()).shape == (batch, 10)
        asked.append(arguments)
        return {"load_seconds": 0.1, "seconds": {batch: (len(asked) * batch, 9.0) for batch in batches}}

    before = torch.get_num_threads()
    monkeypatch.setattr(benching, "measured", measured)
    yield asked
    torch.set_num_threads(before)


@pytest.fixture
def no_gcc(monkeypatch):
    monkeypatch.setattr(c_machines, "missing", lambda programs: f"needs {programs[0]}: apt-get install it")


def test_side_by_side(folder, at_once, no_gcc, monkeypatch):
    monkeypatch.setattr(benching, "available_threads", lambda _: 2)
    right = evaluate_file(folder / "s.tiny", folder / "b.yaml")["top1"]
    found = bench([folder / "s.tiny", folder / "export/onnx/student.onnx"], folder / "b.yaml")
    rows = found["rows"]
    assert [(row["name"], row["runtime"], row["threads"]) for row in rows] == [
        ("s.tiny", "torch", 1),
        ("s.tiny", "torch", 2),
        ("s.tiny", "scipy CSR", 1),
        ("s.tiny", "torch CSR", 1),
        ("s.tiny", "torch CSR", 2),
        ("student.onnx", "onnxruntime", 1),
        ("student.onnx", "onnxruntime", 2),
    ]
    assert [row["top1"] for row in rows] == [right, right, None, None, None, right, right]
    assert [row["latency_seconds"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[0]["images_per_second"] == 1 and rows[0]["file_bytes"] == (folder / "s.tiny").stat().st_size
    assert found["missing"] == [f"{folder / 's.tiny'} in C: needs gcc: apt-get install it"]
    [said] = verdicts(found)
    assert "70.0 % of the weights are zero" in said and said.endswith("it does not pay here")
    assert "scipy CSR takes 3 times as long, torch CSR takes 4 times as long" in said
    table = bench_table(rows)
    assert len(table.splitlines()) == 9 and "7,000.000" in table
    assert len(accuracy_against_latency(rows).axes[0].lines) == 2


def test_without_a_recipe_there_is_no_accuracy(folder, at_once):
    [row] = [row for row in bench([folder / "export/onnx/student.onnx"])["rows"] if row["threads"] == 1]
    assert row["top1"] is None and row["latency_p95_seconds"] == 9.0


@pytest.mark.device
def test_c_and_onnxruntime_in_processes_of_their_own(folder, tmp_path):
    [network] = [packed.decode((folder / "s.tiny").read_bytes())[0]]
    header = packed.header((folder / "s.tiny").read_bytes())
    facts = {key: header[key] for key in ("mean", "std", "classes", "shape")}
    export(network, tmp_path, ["c"], **facts)
    found = bench(
        [tmp_path / "c/student.c", folder / "export/onnx/student.onnx"], folder / "b.yaml", seconds=0.05
    )
    c, *onnx = found["rows"]
    assert c["runtime"] == "C" and c["threads"] == 1 and c["top1"] == onnx[0]["top1"]
    for row in found["rows"]:
        assert 0 < row["latency_seconds"] <= row["latency_p95_seconds"] < row["batch_p95_seconds"] * 50
        assert row["load_seconds"] >= 0 and row["own_bytes"] >= 0
    assert c["peak_bytes"] < 200e6 and c["file_bytes"] < 100_000


def test_all_files_that_cannot_be_opened_are_named_before_anything_is_measured(folder, at_once, tmp_path):
    (tmp_path / "x.tiny").write_bytes(b"no packed file")
    (tmp_path / "y.zip").write_bytes(b"")
    with pytest.raises(Mistake) as told:
        bench([folder / "s.tiny", tmp_path / "x.tiny", tmp_path / "y.zip", tmp_path / "none.onnx"])
    lines = str(told.value).splitlines()
    assert len(lines) == 3 and all(
        name in line for name, line in zip(("x.tiny", "y.zip", "none.onnx"), lines)
    )
    assert not at_once


def test_other_images_are_refused(folder, at_once):
    other = folder / "other.yaml"
    other.write_text(RECIPE.replace("dataset: digits", "dataset: digits, size: 32"))
    net = build(SPEC, (1, 28, 28), 2)
    facts = {"shape": [1, 28, 28], "mean": [0.2], "std": [0.4], "classes": ["cat", "dog"]}
    (folder / "two.tiny").write_bytes(packed.encode(net, SPEC, facts))
    with pytest.raises(Mistake, match=r"two.tiny: has other classes than the data of"):
        bench([folder / "two.tiny"], folder / "b.yaml")
    with pytest.raises(Mistake, match="--model has no effect: no .tiny"):
        bench([folder / "export/onnx/student.onnx"], own="lenet5")


def test_a_file_without_names_that_answers_with_another_number_of_classes_is_refused(folder):
    """student.c has no names of classes: two logits for the ten digits were said to be right in 0.00 %."""
    data = make_data(read(folder / "b.yaml")[0].data, torch.device("cpu"))

    def subject(number: int) -> Subject:
        answer = lambda images: torch.zeros(len(images), number)
        student = Student((), reading_of(data.shape, {}), [0.0], [1.0], answer)
        return Subject("c/student.c", "student.c", "C", 9, student, answer, lambda: None, {})

    benching._check_images([subject(10)], data, Path("b.yaml"))
    with pytest.raises(Mistake, match=r"^c/student.c: answers with 2 classes; the data of b.yaml has 10$"):
        benching._check_images([subject(2)], data, Path("b.yaml"))


def test_a_missing_runtime_is_said_and_the_rest_goes_on(folder, at_once, no_gcc, monkeypatch):
    from trainer.runtime import student

    def needed(module, extra):
        raise NotInstalled(f"needs the package {module}")

    monkeypatch.setattr(student, "needed", needed)
    found = bench([folder / "export/onnx/student.onnx", folder / "s.tiny"])
    assert found["missing"][0].endswith("student.onnx: needs the package onnxruntime")
    assert {row["name"] for row in found["rows"]} == {"s.tiny"}
    with pytest.raises(NotInstalled, match="needs the package onnxruntime"):
        bench([folder / "export/onnx/student.onnx"])


def test_names_tell_files_apart():
    assert short_names([Path("a/s.tiny"), Path("b/t.tiny")]) == ["s.tiny", "t.tiny"]
    assert short_names([Path("a/x/s.tiny"), Path("b/x/s.tiny")]) == ["a/x/s.tiny", "b/x/s.tiny"]
    assert short_names([Path("s.tiny"), Path("s.tiny")]) == ["s.tiny", "s.tiny"]


def test_the_sentence_says_what_pays():
    def row(runtime, one, many):
        return {"file": "f", "runtime": runtime, "threads": 1, "latency_seconds": one, "batch_seconds": many}

    rows = [row("torch", 1.0, 10.0), row("scipy CSR", 0.5, 20.0), row("C", 0.97, 1.0)]
    [said] = verdicts({"rows": rows, "sparsity": {"f": 0.9}})
    assert "scipy CSR is 2 times as fast, C takes as long; for 64 images" in said
    assert said.endswith("it pays in scipy CSR for one image and in C for 64 images")
    [said] = verdicts({"rows": rows, "sparsity": {"f": math.nan}})
    assert "nothing to leave out" in said


def test_what_an_export_to_c_says(tmp_path):
    sizes = "".join(
        f"#define STUDENT_{name} {n}\n" for name, n in (("CHANNELS", 2), ("HEIGHT", 3), ("WIDTH", 4))
    )
    (tmp_path / "student.h").write_text(sizes + "#define STUDENT_CLASSES 5\ntypedef float student_pixel;\n")
    (tmp_path / "example.c").write_text(
        "static const float mean[] = {0.5f, 1.0f};\nstatic const float scale[] = {4.0f, 2e0f};\n"
    )
    assert told_by(tmp_path) == ((2, 3, 4), 5, False, [0.5, 1.0], [0.25, 0.5])
    (tmp_path / "student.h").write_text(sizes + "#define STUDENT_CLASSES 5\ntypedef uint8_t student_pixel;\n")
    assert told_by(tmp_path) == ((2, 3, 4), 5, True, [0, 0], [1 / 255, 1 / 255])
    (tmp_path / "student.h").write_text("#define STUDENT_CLASSES 5\n")
    with pytest.raises(Mistake, match="do not say sizes, mean and scale"):
        told_by(tmp_path)
