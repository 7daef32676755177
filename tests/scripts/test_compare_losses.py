"""The table of what the losses are worth: small, on digits."""

import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import trainer
from trainer.recipe import shelves
from trainer.recipe.recipe import read

RECIPE = """
name: digits_taught
threads: 1
data: {{dataset: digits, views: 2, augment: {{shift: 1}}, subset: 100, validation: 60}}
teacher: {{model: lenet5, width: 2, checkpoint: "{file}"}}
student: {{model: lenet5, width: 2}}
stages:
  - {{stage: distill, training: {{epochs: 1}}, losses: [{{loss: kl}}]}}
"""


# In a process of its own: whoever forks must not have exported a network before, and other tests of this process have.
FRESH = """
import os, sys, torch
import compare_losses as script
script.RATES, script.BEST_SEEDS, script.BEST = (1e-3, 2e-2), 3, 1
parent, fit = os.getpid(), script.fit
script.fit = lambda *given: fit(*given) if os.getpid() != parent else sys.exit("the parent trains")
in_processes = script.in_processes


def forked(jobs, processes):  # by a parent that has used two threads, which its children do not have
    torch.set_num_threads(2)
    torch.nn.Conv2d(8, 8, 3)(torch.ones(16, 8, 32, 32))
    in_processes(jobs, processes)
    torch.set_num_threads(1)


script.in_processes = forked
script.main(sys.argv[1:])
"""


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(trainer.__file__).parents[1] / "scripts")
    return importlib.import_module("compare_losses")


def test_every_row_is_of_losses_on_the_shelf(script, tmp_path, teacher_file):
    """Not the other way round: whoever drops a loss in need not know of the table."""
    compared = {term["loss"] for terms in script.ROWS.values() for term in terms}
    assert compared <= set(shelves.names("loss")) and len(compared) > 25
    assert set(script.PROTOCOLS[1].rows) <= set(script.ROWS)
    (tmp_path / "r.yaml").write_text(RECIPE.format(file=teacher_file))
    for terms in script.ROWS.values():  # as the recipe's checker sees them
        script.recipe_of(tmp_path / "r.yaml", {}, terms, 30, 1e-3)
    shipped = Path(trainer.__file__).parents[1] / script.RECIPE
    assert read(shipped, {"teacher.checkpoint": str(teacher_file)})[0].data.subset == 4000


def test_processes_that_fork_are_refused_on_a_gpu(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.torch.accelerator, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="2"):
        script.main(["--processes", "2", "--folder", str(tmp_path)])
    assert "--processes: not on a GPU" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_small_table_and_what_a_second_call_takes_from_the_first(
    script, tmp_path, monkeypatch, teacher_file
):
    (tmp_path / "r.yaml").write_text(RECIPE.format(file=teacher_file))
    monkeypatch.setattr(script, "RATES", (1e-3, 2e-2))
    monkeypatch.setattr(script, "BEST_SEEDS", 3)
    monkeypatch.setattr(script, "BEST", 1)
    asked = ["--recipe", str(tmp_path / "r.yaml"), "--folder", str(tmp_path / "runs"), "--seeds", "2"]
    asked += ["--epochs", "1", "--rows", "kl, T = 1", "hint, paper"]
    text = script.main(asked)
    first, second = text.split("10 epochs, no augmentation: ")
    lines = [line for line in first.splitlines() if line.startswith("|")][2:]
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert set(rows) == {"labels alone", "kl, T = 1", "hint, paper"} and "in 6 views" in first
    assert second.count("\n| ") == 3 and "kl, T = 1" in second and "hint" not in second

    folder = tmp_path / "runs" / "compare_losses"
    assert (folder / "table.md").read_text() == text
    found = {}
    for name in ("labels_alone", "kl_T_1", "hint_paper"):
        tried = [
            json.loads(file.read_text())
            for file in sorted((folder / "students" / "views").glob(f"{name}-lr*"))
        ]
        validation = {
            one["facts"]["training"]["lr"]: one["top1_validation"]
            for one in tried
            if one["facts"]["seed"] == 0
        }
        assert set(validation) == {1e-3, 2e-2}
        best = max((1e-3, 2e-2), key=lambda rate: validation[rate])
        found[name] = [one for one in tried if one["facts"]["training"]["lr"] == best]
    base = [one["top1"] for one in found["labels_alone"]]
    for name, row in (("kl_T_1", "kl, T = 1"), ("hint_paper", "hint, paper")):
        gains = [one["top1"] - other for one, other in zip(found[name], base, strict=False)]
        assert rows[row][2].startswith(f"{statistics.fmean(gains):+.2f} ± ") and rows[row][3] == str(
            len(gains)
        )
    assert {rows["kl, T = 1"][3], rows["hint, paper"][3]} == {"2", "3"} and rows["labels alone"][3] == "3"
    assert rows["labels alone"][-1] == "1.00×" and float(rows["kl, T = 1"][-2]) > 0

    gone = next((folder / "students" / "views").glob("hint_paper-*-seed0.json"))
    gone.unlink()
    trained = []
    real = script.fit
    monkeypatch.setattr(script, "fit", lambda run, *rest: trained.append(run.seed) or real(run, *rest))
    assert len(script.main(asked).splitlines()) == len(text.splitlines())
    assert trained == [0]

    assert script.main([*asked, "--trained"]) == text
    missing = next((folder / "students" / "views").glob("hint_paper-*-seed0.json"))
    kept = missing.read_text()
    missing.unlink()
    rest = script.main([*asked, "--trained"])
    assert cells(rest) == [row for row in cells(text) if row[0] != "hint, paper"] and trained == [0]
    missing.write_text(kept)

    whole = next((folder / "students" / "views").glob("kl_T_1-*-seed0.json"))
    answers = [
        json.loads(whole.read_text())[key] for key in ("top1", "top1_validation", "agreement", "ratios")
    ]
    whole.unlink()
    command = [sys.executable, "-c", FRESH, *asked, "--processes", "2"]
    scripts = Path(script.__file__).parent
    subprocess.run(
        command, check=True, cwd=scripts, timeout=120
    )  # a forked process trains it, to the same weights
    assert [
        json.loads(whole.read_text())[key] for key in ("top1", "top1_validation", "agreement", "ratios")
    ] == answers
    assert trained == [0]
    trained.clear()  # at the rates of that table, in an empty folder: one student a row and seed, to the same weights
    elsewhere = tmp_path / "elsewhere"
    again = script.main([*asked, "--rates", str(folder / "table.md"), "--folder", str(elsewhere)])
    assert [row[:-1] for row in cells(again)] == [row[:-1] for row in cells(text)]
    assert len(trained) == len(list(elsewhere.rglob("*-seed*.json"))) == 8 + 6
    (tmp_path / "none.md").write_text("| loss | lr |")
    with pytest.raises(SystemExit):
        script.main([*asked, "--rates", str(tmp_path / "none.md")])

    with pytest.raises(ValueError, match=r"seed0.json: is of another data; remove it"):
        script.main([*asked, "--set", "data.subset=90"])
