"""The report's page: one file, right numbers, nothing of the user's that could run, and charts of odd values."""

import json
import math
import re

import numpy as np
import pytest

from tests.reporting.test_report import a_report, row, some_weights
from trainer.reporting import charts
from trainer.reporting.page import _windows, page, read_log
from trainer.reporting.tables import by_block, layer_table

EVIDENCE = {
    "classes": ["cat", "<script>alert(1)</script>", "ox"],
    "confusion": [[8, 1, 1], [0, 9, 0], [2, 0, 5]],
    "per_class": [
        {"name": "cat", "images": 10, "right": 8, "answered": 10},
        {"name": "<script>alert(1)</script>", "images": 9, "right": 9, "answered": 10},
        {"name": "ox", "images": 7, "right": 5, "answered": 6},
    ],
    "confused": [{"label": "ox", "answer": "cat", "images": 2}],
    "num_apart": 1,
    "disagreements": [
        {"picture": "data:image/png;base64,AAAA", "label": "ox", "student": "cat", "teacher": "ox"}
    ],
    "views": [
        {"picture": "data:image/png;base64,BBBB", "label": "ox", "teacher": "cat", "share": 0.876},
        {"picture": "data:image/png;base64,CCCC", "label": None, "teacher": "ox", "share": 1.0},
    ],
    "maps": None,
    "account": [
        {"tensor": "", "part": "frame", "bytes": 7.0},
        {"tensor": "fc1.weight", "part": "mask", "bytes": 100.5},
        {"tensor": "fc1.weight", "part": "values", "bytes": 200.25},
    ],
}


def a_page(log=(), weights=None, evidence=None, **changes) -> str:
    return page(
        a_report(seed=3, **changes), log, some_weights() if weights is None else weights, evidence or EVIDENCE
    )


def test_one_file_without_references_or_foreign_code():
    text = a_page(name="x<b>", command="trainer run '<img src=http://x>'")
    assert "<script" not in text and "<b>x" not in text and "<img src=http" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    references = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"'\s>)]+)", text.replace("&#39;", "'"))
    assert all(found.startswith(("data:", "http://x&gt;")) for found in references), references
    assert "data:image/png;base64,AAAA" in text


def test_numbers_are_the_reports():
    text = a_page()
    assert "98.17 % of the test images right in <b>24,190 bytes</b>" in text
    assert "teacher, which has" not in text  # the ratio to the teacher is not known here
    assert "pruned: 57.31 % in 62,133 bytes" in text
    assert "ox answered as cat: 2 of 7" in text
    assert "fc1.weight, values: 200.2 bytes" in text
    assert "1 test image.<" in text
    assert "2,345 test images, of which 1 stand here.<" in a_page(evidence={**EVIDENCE, "num_apart": 2345})
    assert "ox answered as cat (2)." in text
    assert "teacher: cat, 88&nbsp;%" in text and "<b>unlabelled</b>" in text


def test_without_rows_layers_and_evidence():
    text = page(a_report(rows=[], layers=[], seed=0), [], {}, {})
    assert "<svg" not in text and "How it was made" in text


def test_values_that_are_not_finite_are_left_out_of_the_curves():
    log = [
        {"kind": "numbers", "stage": "distill", "step": 1, "lr": 0.1, "loss": 2.0, "kl": "nan"},
        {"kind": "numbers", "stage": "distill", "step": 2, "lr": 0.1, "loss": 1.0, "kl": 0.0},
        {"kind": "numbers", "stage": "distill", "step": 2, "epoch": 1, "validation": 50.0},
        {"kind": "numbers", "stage": "teacher", "num_bytes": 3, "step": 0},
        {"kind": "row", "stage": "distilled"},
    ]
    text = a_page(log)
    assert "step 1: loss 2; kl nan" in text and "step 2: loss 1; kl 0" in text
    assert not re.search(r'(points|cx|cy|x|y|width|height)="[^"]*(nan|inf)', text)


def test_means_over_a_few_steps_join_the_next():
    """After an epoch of 105 steps the log has a mean over 5 of them beside means over 50."""
    means = {50: 4.0, 100: 3.0, 105: 9.0, 150: 2.0, 200: 1.0, 210: 7.0}
    assert _windows(means) == [
        (50, 4.0),
        (100, 3.0),
        (150, (5 * 9 + 45 * 2) / 50),
        (210, (50 * 1 + 10 * 7) / 60),
    ]
    assert _windows({3: 5.0}) == [(3, 5.0)] and _windows({0: 5.0}) == [(0, 5.0)]
    assert str(_windows({10: 1.0, 11: math.nan, 20: 2.0})) == "[(10, 1.0), (11, nan), (20, 2.0)]"


def test_a_resumed_run_wrote_some_steps_twice_and_the_later_line_counts(tmp_path):
    lines = [{"kind": "numbers", "stage": "train", "step": 5, "loss": loss} for loss in (3.0, 2.0)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "numb')
    text = a_page(read_log(tmp_path / "log.jsonl"))
    assert "step 5: loss 2" in text and "step 5: loss 3" not in text


def logged(index: int, fit: int, step: int, loss: float, stage: str = "prune") -> dict:
    return {"kind": "numbers", "stage": stage, "index": index, "fit": fit, "step": step, "loss": loss}


def test_trainings_of_one_name_have_charts_of_their_own():
    text = a_page([logged(1, 0, 5, 3.0), logged(2, 0, 5, 2.0), logged(2, 1, 5, 1.5), logged(3, 0, 5, 1.0)])
    titles = re.findall(r"<summary>(\d.*)</summary>", text)
    assert titles == ["2. prune", "3. prune, training 1", "3. prune, training 2", "4. prune"]
    assert re.findall(r"step 5: loss (\S+?)<", text) == ["3", "2", "1.5", "1"]


def test_what_was_logged_of_stages_that_began_anew_is_not_drawn():
    """The second stage began anew and has fewer steps; the third is gone. The first was resumed, and goes on."""
    first = [logged(0, 0, 50, 9.0, "train"), logged(0, 0, 100, 8.0, "train"), logged(0, 0, 100, 7.0, "train")]
    old = [logged(1, 0, 5, 3.0), logged(1, 0, 10, 2.5), logged(1, 1, 5, 2.2), logged(2, 0, 5, 2.0)]
    text = a_page([*first, *old, {"kind": "begun", "index": 1}, logged(1, 0, 5, 1.0, "distill")])
    assert re.findall(r"<summary>(\d.*)</summary>", text) == ["1. train", "2. distill"]
    assert re.findall(r"step (\d+: loss \S+?)<", text) == ["50: loss 9", "100: loss 7", "5: loss 1"]


def test_damaged_lines_of_a_log_are_left_out_of_the_page(tmp_path, caplog):
    right = {"kind": "numbers", "stage": "train", "step": 5, "loss": 3.0}
    odd = [
        *("{", "3", "[]", "{}", '{"kind": 3}', "[" * 100_000),
        *(
            json.dumps(right | change)
            for change in (
                {"loss": [1]},
                {"step": "x"},
                {"step": 10**400},
                {"kl": {}},
                {"fit": "x"},
                {"index": -1},
            )
        ),
        json.dumps({"kind": "numbers", "step": 3, "loss": 9e99}),
    ]
    (tmp_path / "log.jsonl").write_text("\n".join([json.dumps(right), *odd, ""]))
    found = read_log(tmp_path / "log.jsonl")
    assert found[0] == right and len(found) == 2
    assert "12 lines of the log are left out" in caplog.text and "log.jsonl:2: is damaged" in caplog.text
    assert "step 5: loss 3" in a_page(found)
    assert "step 5: loss 3" in a_page([right, right | {"kl": "a lot", "loss": 10**400, "step": 6}])


def test_many_layers_are_shown_by_block():
    layers = [
        {"layer": f"blocks.{block}.{n}.conv", "shape": [4, 4], "num_weights": 16, "num_nonzero": 4,
         "file_bytes": 2.5} for block in range(3) for n in range(9)
    ]  # fmt: skip
    layers.append({"layer": "head", "shape": [4, 4], "num_weights": 16, "num_nonzero": 16})
    blocks = by_block(layers)
    assert [(block["layer"], block["layers"]) for block in blocks] == [
        ("blocks.0", 9), ("blocks.1", 9), ("blocks.2", 9), ("head", 1),
    ]  # fmt: skip
    assert blocks[0] == {
        "layer": "blocks.0", "layers": 9, "num_weights": 144, "num_nonzero": 36, "file_bytes": 22.5,
    }  # fmt: skip
    assert re.search(r"\| blocks.1 +\| 9 layers +\|", layer_table(blocks))
    text = a_page(layers=layers, weights={})
    assert "all 28 layers" in text and text.index("<th>blocks.1</th>") < text.index(
        "<th>blocks.0.0.conv</th>"
    )


@pytest.mark.parametrize("log", [False, True])
def test_curves_keep_to_their_frame(log):
    drawn = charts.curves({"a": [(0, 5.0), (10, 1e-3)], "b": [(5, 2.0)]}, (400, 200), ("step", "loss"), log)
    places = [
        tuple(map(float, pair.split(",")))
        for way in re.findall(r'points="([^"]*)"', drawn)
        for pair in way.split()
    ]
    assert len(places) == 3 and all(0 <= x <= 400 and 0 <= y <= 200 for x, y in places)
    assert [place[1] for place in places[:2]] == sorted(place[1] for place in places[:2])  # larger is higher


def test_points_of_one_size_and_accuracy():
    drawn = charts.scatter([(100, 90, "a", 0), (100, 90, "b", 0)], (400, 200), ("bytes", "top-1"))
    assert len(re.findall("<circle", drawn)) == 2 and "nan" not in drawn


def test_no_name_of_a_point_covers_another_point():
    """The second point lies where the first one's name would stand, to its right."""
    points = [(1480, 97.22, "recovered", 0), (3300, 97.5, "distilled", 0), (1500, 60.0, "pruned", 0)]
    points += [(880, 97.1, "shared", 0), (21000, 98.61, "teacher", 1)]
    drawn = charts.scatter(points, (460, 300), ("bytes", "top-1"))
    dots = [tuple(map(float, at)) for at in re.findall(r'<circle [^>]*cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    names = re.findall(r'<text class="name" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">(\w+)<', drawn)
    assert {name for *_, name in names} == {name for _, _, name, _ in points} and len(dots) == 5
    for x, y, anchor, name in names:
        width = 6.8 * len(name)
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        for across, down in dots:
            apart = max(left - across, across - left - width, float(y) - 12 - down, down - float(y) - 2)
            assert apart >= 4.9, (name, across, down)


def test_a_bar_has_the_length_of_its_share():
    drawn = charts.stacked(
        [("x", {"mask": 30.0, "values": 10.0}), ("y", {"mask": 20.0})], ("mask", "values"), 400
    )
    widths = [float(width) for width in re.findall(r'<rect [^>]* width="([\d.]+)"', drawn)]
    np.testing.assert_allclose(np.array(widths) / widths[0], [1, 1 / 3, 2 / 3], atol=0.01)


def test_shares_of_a_confusion_matrix():
    drawn = charts.heatmap([[8, 2], [0, 5]], ["cat", "ox"], 300)
    assert re.findall(r'class="(right|wrong)".*?opacity="([\d.]+)"', drawn) == [
        ("right", "0.800"), ("wrong", "0.800"), ("wrong", "0.000"), ("right", "1.000"),
    ]  # fmt: skip


def test_unknown_numbers_are_a_dash():
    text = a_page(rows=[row("trained", float("nan"), 500, agreement=None)])
    assert "nan" not in text.lower().replace("finance", "")


def test_bytes_of_many_layers_are_shown_by_block():
    parts = [
        ("", "frame"),
        ("", "header"),
        ("bn1.weight", "values"),
        ("bn1.bias", "values"),
        ("scale", "values"),
    ]
    parts += [(f"blocks.0.{n}.conv.weight", "mask") for n in range(3)]
    account = [{"tensor": tensor, "part": part, "bytes": 10.0} for tensor, part in parts]
    layers = [{"layer": f"l{n}", "shape": [2], "num_weights": 2, "num_nonzero": 2} for n in range(30)]
    text = a_page(weights={}, layers=layers, evidence={**EVIDENCE, "account": account})
    for said in (
        "bn1, values: 20.0",
        "blocks.0, mask: 30.0",
        "scale, values: 10.0",
        "(the file&#x27;s frame), other: 20.0",
    ):
        assert f"{said} bytes" in text
