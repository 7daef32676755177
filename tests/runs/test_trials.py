"""Several runs at once, in processes of their own, and the table of several seeds."""

import json
import re
import statistics
from pathlib import Path

import pytest

from tests.runs.several_here import run_here, without_test_labels
from trainer.cli import main
from trainer.mistakes import Mistake
from trainer.recipe.words import changes_of
from trainer.reporting.report import read
from trainer.runs import several, trials
from trainer.runs.several import Job, run_all

RECIPE = """
name: tried
data: {dataset: digits, subset: 100, validation: 50}
student: {model: lenet5, width: 2}
allow_untrained: true
stages: [{stage: train, training: {epochs: 1, batch_size: 50, lr: 5e-3}}]
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def test_each_run_has_a_process_and_its_share_of_the_cores(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(several, "available_threads", lambda processes: 4 // processes)
    monkeypatch.setenv("WORLD_SIZE", "2")  # of a launch that the runs are no part of
    bad = {"name": "bad", "stages.0.at_least": 100}
    jobs = [Job(recipe, {"name": "good", "seed": 1}, tmp_path), Job(recipe, bad, tmp_path)]
    with pytest.raises(Mistake, match=r"bad: .*100.*\(.*bad\.out\)"):
        run_all(jobs)
    report = read(tmp_path / "good")
    assert report["seed"] == 1 and report["hardware"]["torch_threads"] == 2
    assert "trained" in (tmp_path / "good.out").read_text()
    told = capsys.readouterr().out
    assert "[2/2]" in told and re.search(r"good: trained \d+\.\d\d %", told)
    monkeypatch.setattr(several, "_start", None)  # another process would fail
    assert run_all(jobs[:1]) == [report]


def test_the_table_has_mean_spread_and_worst_of_each_row(recipe, monkeypatch, capsys):
    commands = run_here(monkeypatch)
    assert main(["trials", str(recipe), "--seeds", "3", "--set", "stages.0.training.lr=2e-3"]) == 0
    assert [words[words.index("--set") + 1] for words in commands] == ["stages.0.training.lr=0.002"] * 3
    found = json.loads(Path("runs/tried-trials.json").read_text())
    assert [one["seed"] for one in found] == [0, 1, 2]
    top1 = [one["rows"][0]["top1"] for one in found]
    told = capsys.readouterr().out
    cells = [cell.strip() for cell in told.strip().splitlines()[-1].split("|")]
    assert cells[1:4] == [
        "trained",
        f"{statistics.fmean(top1):.2f} ± {statistics.stdev(top1):.2f}",
        f"{min(top1):.2f}",
    ]
    assert Path("runs/tried-trials.md").read_text().strip() in told and "3 seeds (0 to 2)" in told
    commands.clear()
    assert main(["trials", str(recipe), "--seeds", "4", "--set", "stages.0.training.lr=2e-3"]) == 0
    assert len(commands) == 1 and 'name="tried-seed3"' in commands[0]


@pytest.mark.parametrize(
    "value", ["emoji 😀, ü", "a=b: 'c' # \"d\"", 1e-05, [0.5, None], {"model": "𝛼"}, True]
)
def test_changes_reach_a_runs_process_as_they_are(value, tmp_path):
    words = several.words_of(Job("r.yaml", {"name": "x", "data.path": value}, tmp_path), None, False)
    assert changes_of([words[-1]]) == {"data.path": value}


def test_rows_without_a_number_have_a_dash():
    rows = [
        {"stage": "page", "top1": 90.0, "file_bytes": 100},
        {"stage": "page", "top1": 80.0, "file_bytes": 120},
    ]
    line = trials.table([[row] for row in rows]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["page", "85.00 ± 7.07", "80.00", "–", "–", "–", "110", "120", "–"]


def test_without_test_labels_agreement_is_told(tmp_path, monkeypatch, capsys):
    run_here(monkeypatch)
    recipe = without_test_labels(tmp_path, monkeypatch)
    assert main(["trials", str(recipe), "--seeds", "1", "--allow-python"]) == 0
    told = capsys.readouterr().out
    agreement = read(tmp_path / "runs" / "unlabelled-seed0")["rows"][-1]["agreement"]
    assert f"unlabelled-seed0: decoded agreement {agreement:.2f} %" in told
    cells = [cell.strip() for cell in told.strip().splitlines()[-1].split("|")]
    assert cells[1:4] == ["decoded", "–", "–"] and cells[5] == f"{agreement:.2f}"
    # evaluate says so, and its JSON is JSON.
    file = "runs/unlabelled-seed0/student.tiny"
    assert main(["evaluate", file, str(recipe), "--allow-python"]) == 0
    assert capsys.readouterr().out == f"{file}: none of 40 test images has a label\n"
    assert main(["evaluate", file, str(recipe), "--allow-python", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["top1"] is None and found["images"] == 40


def test_faults_and_launches_are_told_before_anything_runs(recipe, monkeypatch, capsys):
    assert main(["trials", str(recipe), "--set", "stages.0.training.lr=-1"]) == 2
    assert "stages[0].training.lr" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert main(["trials", str(recipe)]) == 2
    assert "starts processes of its own" in capsys.readouterr().err
