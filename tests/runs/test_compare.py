"""Several runs side by side: the front, what differs, what is refused and said; the page in one file."""

import json
import re

import pytest

from tests.reporting.test_report import a_report, row
from trainer.cli import main
from trainer.mistakes import Mistake
from trainer.reporting.comparison import differences
from trainer.reporting.front import on_front
from trainer.runs.compare import compare

RECIPE = {
    "name": "a",
    "data": {"dataset": "digits", "size": 20, "views": 4},
    "teacher": {"model": "lenet5"},
    "student": {"model": "lenet5", "width": 4},
    "stages": [
        {"stage": "distill", "training": {"epochs": 2}, "losses": [{"loss": "kl", "temperature": 4}]},
        {"stage": "prune", "sensitivity": 1.0},
        {"stage": "pack"},
    ],
}


def a_run(folder, name, top1=97.0, file_bytes=9000, recipe=None, **changes):
    rows = [row("teacher", 99.0, 400_000), row("distilled", 98.0, 90_000), row("decoded", top1, file_bytes)]
    report = a_report(rows=rows, recipe=RECIPE if recipe is None else recipe, seed=0, name=name)
    report["versions"] = {"trainer": "1.0"}
    (folder / name).mkdir()
    (folder / name / "report.json").write_text(json.dumps(report | changes))
    return folder / name


def changed(*path, to):
    recipe = json.loads(json.dumps(RECIPE))
    at = recipe
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return recipe


def test_the_front():
    points = [(10, 5.0), (20, 4.0), (20, 4.0), (15, 6.0), (30, 4.0), (5, 9.0)]
    assert on_front(points) == [True, True, True, False, False, True]


def test_a_page_and_a_table(tmp_path, capsys):
    folders = [
        a_run(tmp_path, "small", 95.0, 5000),
        a_run(tmp_path, "best", 98.0, 9000, changed("stages", 1, "sensitivity", to=0.5)),
        a_run(tmp_path, "worse<b>", 97.0, 12_000),
    ]
    output = tmp_path / "out.html"
    assert main(["compare", *map(str, folders), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    order = re.findall(r"^\| (small \*|best \*|worse\\<b>)", said, re.M)
    assert order == ["small *", "best *", r"worse\<b>"] and str(output) in said
    page = output.read_text()
    assert "<script" not in page and "worse<b>" not in page and "worse&lt;b&gt;" in page
    assert not re.findall(r"(?:src|href)\s*=", page)
    assert page.count("★") == 2 and "worse&lt;b&gt;: 97.00 % in 12,000 bytes" in page
    [line] = re.findall(r"<tr><th>stages.prune.sensitivity</th>(.*)</tr>", page)
    assert re.findall(r"<td>(.*?)</td>", line) == ["1.0", "0.5", "1.0"]
    assert "different data" not in said
    with pytest.raises(Mistake, match="out.html: is there already; --force replaces it"):
        compare(folders, output)
    compare(folders[:2], output, force=True)
    assert "worse" not in output.read_text()


def test_what_differs_is_told_by_names():
    later = json.loads(json.dumps(RECIPE))
    later["stages"].insert(0, {"stage": "train", "who": "teacher"})
    later["stages"][1]["losses"].append({"loss": "hint", "at": ["a", "b"]})
    assert dict(differences([RECIPE, later])) == {
        "stages": ["distill, prune, pack", "train, distill, prune, pack"],
        "stages.train.who": ["–", "teacher"],
        "stages.distill.losses": ["kl", "kl, hint"],
        "stages.distill.losses.hint.at": ["–", "a, b"],
    }
    twice = {"stages": [{"stage": "train", "epochs": 1}, {"stage": "train", "epochs": 2}]}
    other = {"stages": [{"stage": "train", "epochs": 1}, {"stage": "train", "epochs": 3}]}
    assert differences([twice, other]) == [("stages.train 2.epochs", ["2", "3"])]


def test_runs_on_different_data_are_said(tmp_path):
    one = a_run(tmp_path, "one")
    output = tmp_path / "x.html"

    def said(name, **changes):
        return compare([one, a_run(tmp_path, name, **changes)], output, force=True)

    words = "different data (dataset, size, folder differ)"
    assert words in said("photos", recipe=changed("data", to={"dataset": "image_folder", "folder": "x"}))
    assert words in output.read_text()
    assert "differ" not in said("views", recipe=changed("data", "views", to=8))
    assert "different versions of the program: 1.0, 2.0" in said("later", versions={"trainer": "2.0"})
    one_set, another = ({"num": 3, "labels": digest} for digest in ("aa", "bb"))
    first, second = a_run(tmp_path, "f", test_images=one_set), a_run(tmp_path, "s", test_images=another)
    assert "tested on different images" in compare([first, second], output, force=True)
    assert "tested on" not in compare([first, one], output, force=True)  # whose report does not say


def test_what_cannot_be_compared_is_refused_at_once(tmp_path):
    good = a_run(tmp_path, "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "going").mkdir()
    (tmp_path / "going/begun.json").write_text("{}")
    old = a_run(tmp_path, "old")
    (old / "report.json").write_text(json.dumps({"rows": [], "name": "old"}))
    with pytest.raises(Mistake) as told:
        compare([good, tmp_path / "empty", tmp_path / "going", old], tmp_path / "x.html")
    lines = str(told.value).splitlines()
    assert "empty: is no run's folder: it has no report.json" in lines[0]
    assert "going: this run has not finished" in lines[1]
    assert "another version of the program" in lines[2] and not (tmp_path / "x.html").exists()
    for given in ([good], [good, good]):
        with pytest.raises(Mistake, match="two runs or more"):
            compare(given, tmp_path / "x.html")


def test_a_run_of_a_teacher_alone(tmp_path):
    alone = a_run(tmp_path, "alone", rows=[row("teacher", 99.0, 400_000)])
    text = compare([alone, a_run(tmp_path, "both")], tmp_path / "x.html")
    assert re.search(r"^\| alone +\| +– \|", text, re.M)
