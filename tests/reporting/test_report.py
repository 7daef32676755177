"""The report: figures by hand against figures computed, tables that line up, plots that can be read."""

import json
import math
import platform
import re
import sys
import threading
from unittest.mock import ANY

import numpy as np
import pytest
import scipy.sparse
import torch

from trainer.reporting import facts, report, tables
from trainer.reporting.plots import accuracy_against_bytes, histograms
from trainer.reporting.tables import NOTHING, byte_table, csc_bytes, csr_bytes, layer_table, sharing_ratio

pytestmark = pytest.mark.usefixtures("plots")


def row(stage: str, top1: float, file_bytes: int, **more) -> dict:
    return {
        "stage": stage, "index": 0, "top1": top1, "top1_validation": top1 - 0.1, "agreement": None,
        "num_weights": 266200, "num_nonzero": 16300, "sparsity": 1 - 16300 / 266200, "file_bytes": file_bytes,
        "ratio_student": 1066440 / file_bytes, "ratio_teacher": None, "seconds": 12.0, **more,
    }  # fmt: skip


ROWS = [
    row("teacher", 99.41, 4412000, agreement=100.0, ratio_student=None, ratio_teacher=1.0),
    row("trained", 98.02, 986000, num_nonzero=266200, sparsity=0.0),
    row("pruned", 57.31, 62133, agreement=57.5),
    row("recovered", 98.15, 62040),
    row("clustered", 98.11, 24210),
    row("shared", 98.17, 24190),
    row("decoded", 98.17, 24190, digest="abc"),
]
LAYERS = [
    {"layer": "fc1", "shape": [300, 784], "num_weights": 235200, "num_nonzero": 14000, "thresholds": [0.0701],
     "clusters": 32, "bits": 5, "ratio_sharing": 6.3, "file_bytes": 12774.4,
     "csr_bytes": 94108, "csc_bytes": 96044},
    {"layer": "conv1", "shape": [6, 1, 5, 5], "num_weights": 150, "num_nonzero": 150, "thresholds": None},
]  # fmt: skip


def a_report(**changes) -> dict:
    return {
        "name": "lenet300_mnist", "recipe": {"seed": 3}, "versions": {"python": "3"},
        "hardware": {"cpu": "x", "gpu": None}, "seconds": 321.5, "command": "trainer run recipes/x.yaml",
        "rows": ROWS, "layers": LAYERS, **changes,
    }  # fmt: skip


def some_weights() -> dict:
    random = np.random.default_rng(0)
    dense = random.normal(0, 0.05, (30, 78)).astype(np.float32)
    pruned = dense * (np.abs(dense) > 0.1)
    shared = np.round(pruned, 1)
    return {
        "dense": {"fc1": dense},
        "pruned": {"fc1": pruned},
        "clustered": {"fc1": shared},
        "shared": {"fc1": shared},
    }


# -- figures


def test_sharing_ratio_is_the_papers():
    # The 4 x 4 example of Han et al. 2016: 16 weights of 32 bits that share 4 values.
    assert sharing_ratio(16, 32, 4) == 3.2
    assert sharing_ratio(1000, 32, 1) == 1000
    assert sharing_ratio(10**9, 32, 32) == pytest.approx(32 / 5, rel=1e-6)


@pytest.mark.parametrize("numbers", [(0, 32, 4), (16, 0, 4), (16, 32, 0)])
def test_sharing_ratio_of_nothing(numbers):
    with pytest.raises(ValueError, match="at least 1"):
        sharing_ratio(*numbers)


def test_sparse_bytes_by_hand():
    weight = np.array([[0, 1, 0, 0], [2, 0, 0, 3], [0, 0, 0, 0]], np.float32)
    # 3 values of 4 bytes, 3 indices of 4 bytes, 4 row or 5 column pointers of 4 bytes
    assert csr_bytes(weight) == 12 + 12 + 16
    assert csc_bytes(weight) == 12 + 12 + 20


@pytest.mark.parametrize("shape", [(300, 784), (16, 6, 5, 5), (12,), (1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sparse_bytes_are_scipys(shape, dtype):
    weight = np.random.default_rng(0).normal(size=shape).astype(dtype)
    weight[np.abs(weight) < 1.5] = 0
    flat = weight.reshape(shape[0], -1)
    for found, layout in (
        (csr_bytes, scipy.sparse.csr_matrix),
        (csc_bytes, scipy.sparse.csc_matrix),
    ):
        matrix = layout(flat)
        assert found(weight) == matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes


def test_sparse_bytes_of_half_precision():
    assert csr_bytes(np.ones((2, 2), np.float16)) == 4 * 2 + 4 * 4 + 3 * 4


def test_hardware_and_versions():
    hardware = facts.hardware()
    assert set(hardware) == {"cpu", "cores", "torch_threads", "gpu", "system"}
    assert hardware["cpu"] and hardware["cores"] >= 1
    assert hardware["torch_threads"] == torch.get_num_threads()
    assert (hardware["gpu"] is None) == (not torch.cuda.is_available())
    versions = facts.versions()
    assert versions["python"] == platform.python_version()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["numpy"] == np.__version__
    assert versions["trainer"]
    assert all(isinstance(version, str) for version in versions.values())


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["/somewhere/trainer/__main__.py", "run", "a b.yaml"], "python -m trainer run 'a b.yaml'"),
        (["/somewhere/bin/trainer", "run", "x.yaml", "--seed", "1"], "trainer run x.yaml --seed 1"),
        (["/somewhere/trials.py"], "trials.py"),
    ],
)
def test_the_command_names_no_folders_of_programs(monkeypatch, argv, shown):
    monkeypatch.setattr(sys, "argv", argv)
    assert facts.command() == shown


# -- tables


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_table():
    text = tables.table(ROWS)
    assert len({len(line) for line in text.splitlines()}) == 1
    head, rule, *body = cells(text)
    assert head == [
        "stage",
        "top-1 %",
        "agreement %",
        "non-zero",
        "zeros %",
        "bytes",
        "to student",
        "to teacher",
    ]
    assert [cell.endswith(":") for cell in rule] == [False] + [True] * 7
    assert all(set(cell) <= set("-:") and len(cell) >= 3 for cell in rule)
    assert body[0] == ["teacher", "99.41", "100.00", "16,300", "93.88", "4,412,000", "–", "1.0×"]
    assert body[1] == ["trained", "98.02", "–", "266,200", "0.00", "986,000", "1.1×", "–"]
    assert body[2] == ["pruned", "57.31", "57.50", "16,300", "93.88", "62,133", "17.2×", "–"]
    # numbers end under each other
    ends = {match.end() for line in text.splitlines()[2:] for match in [re.search(r"\d+\.\d\d(?= \|)", line)]}
    assert len(ends) == 1


def test_table_of_little():
    head, _, body = cells(tables.table([{"stage": "a|b", "top1": float("nan"), "ratio_student": 12345.6}]))
    assert len(head) == 8
    assert body == ["a\\", "b", "–", "–", "–", "–", "–", "12,346×", "–"]
    assert len(tables.table([]).splitlines()) == 2


def test_byte_table():
    account = [
        {"tensor": "", "part": "frame", "bytes": 7.0},
        {"tensor": "fc.weight", "part": "form", "bytes": 0.5},
        {"tensor": "fc.weight", "part": "mask", "bytes": 20.25},
        {"tensor": "fc.weight", "part": "codebook", "bytes": 4.0},
        {"tensor": "fc.weight", "part": "values", "bytes": 10.0, "numel": 1200, "nonzero": 100, "clusters": 4,
         "iid_bytes": 60.5, "huffman_bytes": 121.0, "dense_huffman_bytes": 60.5, "zlib_bytes": 242},
        {"tensor": "fc.bias", "part": "values", "bytes": 8.25},
    ]  # fmt: skip
    text, _, told = byte_table(account).rpartition("\n\n")
    table = cells(text)
    assert table[0][:4] == ["tensor", "weights", "non-zero", "clusters"]
    assert table[0][4:] == [
        "mask",
        "values",
        "codebook",
        "other",
        "bytes",
        "i.i.d.",
        "Huffman",
        "dense Huffman",
        "zlib",
    ]
    nothing = NOTHING
    assert table[2] == ["(frame)", *[nothing] * 6, "7.0", "7.0", *[nothing] * 4]
    assert table[3][:4] == ["fc.weight", "1,200", "100", "4"]
    assert table[3][4:] == ["20.2", "10.0", "4.0", "0.5", "34.8", "60.5", "121.0", "60.5", "242.0"]
    assert table[-1][0] == "file" and table[-1][8] == "50.0", "the last row is the whole file"
    assert told.startswith(
        "Masks and values of the weights: 30 bytes, 0.500 of i.i.d., 0.250 of Huffman, 0.500 of dense"
    )
    assert "Masks" not in byte_table([account[0], account[-1]])


def test_layer_table():
    head, _, first, second = cells(layer_table(LAYERS))
    assert head == [
        "layer", "shape", "non-zero", "zeros %", "threshold", "clusters", "bits", "formula", "bytes",
        "CSR bytes", "CSC bytes",
    ]  # fmt: skip
    assert first == [
        "fc1",
        "300×784",
        "14,000",
        "94.05",
        "0.0701",
        "32",
        "5",
        "6.3×",
        "12,774",
        "94,108",
        "96,044",
    ]
    assert second == ["conv1", "6×1×5×5", "150", "0.00", "–", "–", "–", "–", "–", "–", "–"]


@pytest.mark.parametrize(
    ("thresholds", "shown"),
    [(0.25, "0.25"), ([0.2, 0.1], "0.1 to 0.2"), ([], "–"), ([0.10001, 0.10002], "0.1")],
)
def test_thresholds(thresholds, shown):
    assert cells(layer_table([{**LAYERS[0], "thresholds": thresholds}]))[2][4] == shown


# -- files


def test_write(tmp_path):
    found = a_report(
        extra=np.float32(0.5),
        array=np.arange(2),
        rows=[*ROWS, row("odd", float("nan"), 10, tensor=torch.tensor(2))],
    )
    report.write(tmp_path / "run", found, some_weights(), {})
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
        "accuracy_bytes.png",
        "weights.png",
    }
    text = (folder / "report.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    written = report.read(folder)
    assert written | {"sha256": ANY} == json.loads(text)
    assert list(written) == list(found)
    assert written["rows"][:-1] == ROWS
    assert written["rows"][-1]["top1"] is None
    assert written["rows"][-1]["tensor"] == 2
    assert (written["extra"], written["array"], written["layers"]) == (0.5, [0, 1], LAYERS)

    page = (folder / "report.md").read_text(encoding="utf-8")
    assert page.startswith("# lenet300_mnist\n\n`trainer run recipes/x.yaml`  \ntook 5 min, seed 3\n")
    assert tables.table(found["rows"]) in page
    assert layer_table(LAYERS) in page
    assert "- cpu: x\n- gpu: –\n" in page
    assert all((folder / name).is_file() for name in re.findall(r"!\[.*?\]\((.*?)\)", page))
    assert len(re.findall(r"!\[", page)) == 2


def test_write_of_little(tmp_path):
    report.write(tmp_path, a_report(rows=[], layers=[], recipe="x.yaml", command=None, seconds=8000), {}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.html"}
    assert (tmp_path / "report.md").read_text().startswith("# lenet300_mnist\n\ntook 2 h 13 min\n")
    report.write(
        tmp_path,
        a_report(rows=[row("trained", 100.0, 500)]),
        {"dense": {"fc": np.zeros(3)}, "shared": {"a": np.ones(2)}},
        {},
    )
    assert (tmp_path / "weights.png").stat().st_size > 1000


def test_the_old_report_stays_when_the_new_one_cannot_be_written(tmp_path):
    report.write(tmp_path, a_report(), {}, {})
    with pytest.raises(KeyError):
        report.write(tmp_path, {"name": "x", "rows": []}, {}, {})
    assert report.read(tmp_path)["name"] == "lenet300_mnist"


def test_read_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"report\.json: cannot be read"):
        report.read(tmp_path)
    for text in (
        "{",
        "[1]",
        '{"rows": 3}',
        '{"rows": [{"stage": "x", "top1": "a lot"}]}',
        "[" * 100_000,
        f'{{"rows": [{{"stage": "x", "file_bytes": {10**400}}}]}}',
    ):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"report\.json: is damaged: .*; remove .*report\.json, and the same"
        ):
            report.read(tmp_path)


def test_same_plots_every_time_and_no_pyplot(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    report.write(tmp_path / "a", a_report(), some_weights(), {})
    thread = threading.Thread(target=report.write, args=(tmp_path / "b", a_report(), some_weights(), {}))
    thread.start()
    thread.join()
    for name in ("accuracy_bytes.png", "weights.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert ("matplotlib.pyplot" in sys.modules) == before


# -- plots


def boxes_of_labels(figure) -> list:
    figure.draw_without_rendering()
    [axes] = figure.axes
    return [
        (text.get_text(), text.get_window_extent().extents) for text in axes.texts if text.get_text()
    ], axes


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        ROWS[:2],
        ROWS[1:2],
        [row(f"step {i}", 50 + 4 * i, 60000 - 100 * i) for i in range(12)],
        [row(f"step {i}", 98 + 0.01 * i, 10 ** (3 + 0.3 * i)) for i in range(12)],
        [row("chance", 0.0, 5000), row("perfect", 100.0, 5000)],
        [row("same", 98.0, 24190) for _ in range(4)],
    ],
)
def test_labels_of_the_accuracy_plot_can_be_read(rows):
    figure = accuracy_against_bytes(a_report(rows=rows))
    labels, axes = boxes_of_labels(figure)
    for entry in rows:
        assert any(entry["stage"] in text for text, _ in labels)
    left, bottom, right, top = axes.get_window_extent().extents
    for number, (_, box) in enumerate(labels):
        assert left <= box[0] and box[2] <= right and bottom <= box[1] and box[3] <= top
        for _, other in labels[:number]:
            assert box[0] >= other[2] or other[0] >= box[2] or box[1] >= other[3] or other[1] >= box[3]
    assert axes.get_xscale() == "log"
    assert all(0 <= tick <= 100 for tick in axes.get_yticks())
    assert len(axes.get_yticks()) >= 2
    assert len([text for text in axes.get_xticklabels() if text.get_text()]) >= 2


def test_points_in_one_spot_share_a_label():
    labels, _ = boxes_of_labels(accuracy_against_bytes(a_report()))
    assert any("shared, decoded  98.1" in text for text, _ in labels)


def test_points_are_where_the_rows_say():
    figure = accuracy_against_bytes(a_report())
    [axes] = figure.axes
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert points == [(entry["file_bytes"], entry["top1"]) for entry in ROWS]
    [way] = [line for line in axes.lines if len(line.get_xdata()) > 1]
    assert list(way.get_ydata()) == [
        entry["top1"] for entry in ROWS[1:]
    ]  # the teacher is no stage of the student


def test_histograms_leave_out_zeros_and_show_shared_values():
    [(name, figure)] = histograms("x", some_weights())
    assert name == "weights.png"
    dense, pruned, shared = figure.axes  # clustered is left out beside shared
    weights = some_weights()
    for axes, moment in ((dense, "dense"), (pruned, "pruned")):
        array = weights[moment]["fc1"]
        heights, edges, _ = axes.patches[0].get_data()
        assert heights.sum() == np.count_nonzero(array)
        assert edges[0] <= weights["dense"]["fc1"].min() and edges[-1] >= weights["dense"]["fc1"].max()
        assert f"{100 * np.mean(array == 0):.1f} % zeros" in axes.texts[0].get_text()
    array = weights["shared"]["fc1"]
    values, counts = np.unique(array[array != 0], return_counts=True)
    spikes = shared.lines[0]
    assert list(spikes.get_xdata()) == list(values)
    assert list(spikes.get_ydata()) == list(counts)
    assert f"{len(values)} values" in shared.texts[0].get_text()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["dense", "pruned", "shared"]


def test_many_layers_take_several_pages():
    layers = {f"blocks.{i}.attention.projection": np.arange(10.0) for i in range(19)}
    pages = list(histograms("x", {"dense": layers}))
    assert [name for name, _ in pages] == ["weights_1.png", "weights_2.png", "weights_3.png"]
    assert sum(len(figure.axes) for _, figure in pages) == len(layers)
    assert math.isclose(pages[0][1].axes[0].get_position().width, pages[2][1].axes[0].get_position().width)


def test_names_of_classes_break_no_table():
    names = ["a\nb", "c|d"]
    text = tables.confusion_table([[3, 1], [0, 2]], names)
    assert [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in text.splitlines() if ":-" not in line] == [
        ["true class", r"a\nb", r"c\|d"], [r"a\nb", "3", "1"], [r"c\|d", "0", "2"],
    ]  # fmt: skip
    found = [
        {"name": name, "images": 4, "right": 3, "answered": 4} for name in [*names, "<!-- <b>, a < 1, <5"]
    ]
    lines = tables.class_table(found).splitlines()
    assert lines.pop().startswith(r"| \<!-- \<b>, a < 1, <5 ")
    assert len(lines) == 4 and lines[2].startswith(r"| a\nb ") and lines[3].startswith(r"| c\|d ")
