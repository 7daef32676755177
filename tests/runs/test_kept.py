"""`trainer cache`: what lies in the cache folder, with sizes; what is removed is ours, and used by nobody."""

import json
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from trainer import cli
from trainer.data.examined import examine
from trainer.data.fetch import FILES
from trainer.distillation.answer_file import AnswerFile
from trainer.runs import kept

FACTS = {
    "dataset": "digits", "model": [{"model": "lenet5", "width": 3}], "num_samples": 4, "views": 2,
    "record": {"logits": [[10], "float32"]},
}  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder with one entry of each kind, and somebody else's files beside and in them."""
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path))
    answers = AnswerFile(tmp_path / "views", FACTS, {"logits": ((10,), torch.float32)}, 2, 4)
    (answers.folder / "notes.txt").write_text("mine")
    del answers
    (tmp_path / "x.png").write_bytes(b"no picture")
    examine([str(tmp_path / "x.png")], "mine")
    mnist = tmp_path / "mnist"
    mnist.mkdir()
    for name in FILES["mnist"]:
        (mnist / name).write_bytes(b"12345")
    (mnist / ".t10k-labels-idx1-ubyte.part").write_bytes(b"123")
    for other in ("views/mine", "photographs"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "records").write_text("mine")
    (tmp_path / "examined" / "mine.json").write_text("{}")
    return tmp_path


def mine(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_list_says_what_made_each_entry_and_its_size(cache, capsys):
    assert cli.main(["cache"]) == 0
    told = capsys.readouterr().out
    [answers] = [path.parent for path in cache.glob("views/*/facts.json")]
    size = sum((answers / name).stat().st_size for name in ("records", "facts.json"))
    [line] = [line for line in told.splitlines() if f"views/{answers.name}" in line]
    assert f" {size:,} " in line
    assert "answers (logits) of lenet5 width=3 to digits, 4 images, 2 views" in line
    assert f"which of 1 images can be read, in {cache / 'x.png'}" in told
    [line] = [line for line in told.splitlines() if line.startswith("mnist ")]
    assert " 23 " in line and "trainer fetch mnist" in line
    assert "mine.json" not in told and "views/mine" not in told and "photographs" not in told


def test_what_is_removed_is_ours_alone(cache, capsys):
    [answers] = [path.parent.name for path in cache.glob("views/*/facts.json")]
    assert cli.main(["cache", "--remove", "mnist"]) == 0
    assert "removed 1 entries, 23 bytes" in capsys.readouterr().out
    assert not (cache / "mnist").exists() and (cache / "views" / answers / "records").exists()
    assert cli.main(["cache", "--remove"]) == 0
    left = [
        "examined/mine.json",
        "photographs/records",
        f"views/{answers}/notes.txt",
        "views/mine/records",
        "x.png",
    ]
    assert mine(cache) == sorted(left)
    capsys.readouterr()
    assert cli.main(["cache"]) == 0
    assert "holds nothing of this program" in capsys.readouterr().out


def test_a_wrong_name_removes_nothing(cache, capsys):
    before = mine(cache)
    assert cli.main(["cache", "--remove", "mnist", "mnits"]) == 2
    assert "has no entry 'mnits' (did you mean 'mnist'?)" in capsys.readouterr().err
    assert mine(cache) == before


def test_what_a_run_uses_stays_and_so_does_all_else(cache, capsys):
    before = mine(cache)
    answers = AnswerFile(cache / "views", FACTS, {"logits": ((10,), torch.float32)}, 2, 4)
    assert cli.main(["cache", "--remove"]) == 2
    assert f"{answers.folder}: a run is using it; nothing was removed" in capsys.readouterr().err
    del answers
    with FileLock(cache / "mnist" / ".lock"):
        assert cli.main(["cache", "--remove"]) == 2
    assert [name for name in mine(cache) if not name.endswith(".lock")] == [
        name for name in before if not name.endswith(".lock")
    ]
    assert cli.main(["cache", "--remove"]) == 0


def test_damaged_descriptions_are_listed_all_the_same(cache, capsys):
    [facts] = cache.glob("views/*/facts.json")
    for text in ("", "[]", json.dumps({"model": 3, "record": 5, "views": "x"})):
        facts.write_text(text)
        assert any(entry.name.startswith("views/") for entry in kept.kept())
