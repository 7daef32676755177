"""Nothing is done twice: a changed recipe goes on after its last equal stage, and ends in the bits of an undisturbed run."""

import contextlib
import gc
import itertools
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from pydantic import BaseModel

from trainer import cli
from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.recipe import read
from trainer.recipe.text import RecipeError
from trainer.reporting import report
from trainer.reporting.log import Log
from trainer.runs import inputs, opening, resuming, runner
from trainer.runs.earlier import set_aside
from trainer.runs.guards import Untrained
from trainer.runs.inputs import inputs_of, num_equal
from trainer.stages import distill, train
from trainer.storage import checkpoint
from trainer.training import fit
from trainer.training.progress import Progress

pytestmark = pytest.mark.usefixtures("taken_over")

RECIPE = """
name: more
data: {dataset: digits, subset: 60, validation: 60}
teacher: {model: lenet300, hidden: [6]}
student: {model: lenet300, hidden: [3]}
stages:
  - {stage: train, who: teacher, training: {epochs: 1, batch_size: 30}}
  - {stage: distill, training: {epochs: 1, batch_size: 30}, losses: [{loss: kl}]}
  - {stage: prune, sensitivity: 1}
  - {stage: pack}
"""
STUDENT_FIRST = """
name: more
data: {dataset: digits, subset: 60, validation: 60}
teacher: {model: lenet300, hidden: [6]}
student: {model: lenet300, hidden: [3]}
stages:
  - {stage: train, training: {epochs: 1, batch_size: 30}}
  - {stage: train, who: teacher, training: {epochs: 1, batch_size: 30}}
  - {stage: distill, training: {epochs: 1, batch_size: 30}, losses: [{loss: kl}]}
  - {stage: pack}
"""


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Python's garbage is not collected at the end of each training, which takes longer than these trainings."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture
def trained(monkeypatch):
    """The stages that have trained, in order: '0 train', ..."""
    found = []
    for module in (train, distill):

        def counting(run, *given, real=module.fit):
            found.append(f"{run.stage} {run.stage_name}")
            return real(run, *given)

        monkeypatch.setattr(module, "fit", counting)
    return found


def write(folder, text=RECIPE):
    path = folder / "given.yaml"
    path.write_text(text)
    return path


def ended(folder, name="more"):
    """What a run has ended in: its file's bytes, and its rows without times."""
    rows = report.read(folder / name)["rows"]
    kept = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return (folder / name / "student.tiny").read_bytes(), kept


def undisturbed(tmp_path, text, changes=None):
    folder = tmp_path / "undisturbed"
    shutil.rmtree(folder, ignore_errors=True)
    changes = {key: value for key, value in (changes or {}).items() if key != "name"}
    runner.run(write(tmp_path, text), changes, folder=folder)
    return ended(folder)


# the same name


@pytest.mark.parametrize(
    ("text", "changes", "anew"),
    [
        (RECIPE, {"stages.2.sensitivity": 0.5}, []),
        (RECIPE, {"student.hidden": [4]}, ["1 distill"]),
        (STUDENT_FIRST, {"student.hidden": [4]}, ["0 train", "2 distill"]),
        (RECIPE, {"stages.1.losses.0.temperature": 2}, ["1 distill"]),
        pytest.param(RECIPE, {"stages.1.training.epochs": 2}, ["1 distill"], marks=pytest.mark.slow),
        pytest.param(
            RECIPE, {"stages.0.training.epochs": 2}, ["0 train", "1 distill"], marks=pytest.mark.slow
        ),
        pytest.param(RECIPE, {"data.validation": 50}, ["0 train", "1 distill"], marks=pytest.mark.slow),
    ],
    ids=["last", "student", "student first", "of a loss", "epochs", "teacher", "data"],
)
def test_a_changed_recipe_goes_on_after_its_last_equal_stage(tmp_path, trained, capsys, text, changes, anew):
    runs = tmp_path / "runs"
    runner.run(write(tmp_path, text), folder=runs)
    old = ended(runs)
    number = min([int(word.partition(" ")[0]) for word in anew], default=2)
    trained.clear(), capsys.readouterr()
    runner.run(write(tmp_path, text), changes, folder=runs)
    assert trained == anew
    told = capsys.readouterr().out
    assert (
        f"another recipe: what was there of the stages from {number + 1} on is now in {runs}/more/earlier/1\n"
        in told
    )
    assert (f"going on after stage {number} of 4" in told) is (number > 0)
    assert ended(runs) == undisturbed(tmp_path, text, changes) != old
    # Nothing is lost: the old recipe, its report and the stages that followed are together.
    aside = runs / "more" / "earlier" / "1"
    assert yaml.safe_load((aside / "recipe.yaml").read_text()) == yaml.safe_load(text)
    assert ended(runs / "more" / "earlier", "1") == old
    assert len(list((aside / "checkpoints").iterdir())) == 4 - number
    # The page draws the trainings of this recipe alone.
    drawn = re.findall(r"<summary>(\d+\. \w+)</summary>", (runs / "more" / "report.html").read_text())
    assert sorted(drawn) == ["1. train", f"{text.count('epochs')}. distill"]
    # And the way back is as short.
    trained.clear()
    runner.run(write(tmp_path, text), folder=runs)
    assert trained == [] and ended(runs) == old


def test_guards_alone_change_no_result(tmp_path, trained):
    runner.run(write(tmp_path), folder=tmp_path)
    trained.clear()
    changes = {"stages.0.at_least": 1, "allow_untrained": True}
    runner.run(write(tmp_path), changes, folder=tmp_path)
    assert trained == [] and not (tmp_path / "more" / "earlier").exists()
    with pytest.raises(
        Untrained, match=r"stages\[1\].at_least: the student has .*; at_least asks for 99.5 %"
    ):
        runner.run(write(tmp_path), {"stages.1.at_least": 99.5}, folder=tmp_path)


def test_the_kept_recipe_may_be_edited_in_its_place(tmp_path, trained):
    runner.run(write(tmp_path), folder=tmp_path)
    trained.clear()
    mine = tmp_path / "more" / "recipe.yaml"
    mine.write_text(RECIPE.replace("sensitivity: 1", "sensitivity: 0.5"))
    runner.run(mine, folder=tmp_path)
    assert trained == [] and ended(tmp_path) == undisturbed(tmp_path, RECIPE, {"stages.2.sensitivity": 0.5})
    [aside] = (tmp_path / "more" / "earlier").iterdir()
    assert yaml.safe_load((aside / "recipe.yaml").read_text()) == yaml.safe_load(RECIPE)


def test_a_damaged_kept_recipe_is_kept_aside_as_it_was_run(tmp_path, trained):
    runner.run(write(tmp_path), folder=tmp_path)
    trained.clear()
    (tmp_path / "more" / "recipe.yaml").write_text("{")
    runner.run(write(tmp_path), {"stages.2.sensitivity": 0.5}, folder=tmp_path)
    assert trained == []
    aside = tmp_path / "more" / "earlier" / "1" / "recipe.yaml"
    assert yaml.safe_load(aside.read_text()) == yaml.safe_load(RECIPE)


class Killed(BaseException):
    pass


def killed_in_the_middle(patch, path, folder, changes=None):
    """Runs a recipe up to the first checkpoint in the middle of its second training."""
    real = Progress.save

    def save(self, step, tally):
        real(self, step, tally)
        if self.run.stage == 1:
            raise Killed

    with patch.context() as inner:
        inner.setattr(fit, "CHECKPOINT_SECONDS", -1.0)
        inner.setattr(fit, "LOG_STEPS", 1)
        inner.setattr(Progress, "save", save)
        with pytest.raises(Killed):
            runner.run(path, changes, folder=folder)


def test_an_interrupted_training_goes_on_where_a_later_stage_changes(tmp_path, monkeypatch, trained):
    killed_in_the_middle(monkeypatch, write(tmp_path), tmp_path)
    loaded = []
    real = Progress.load
    monkeypatch.setattr(Progress, "load", lambda self: loaded.append(real(self)) or loaded[-1])
    trained.clear()
    runner.run(write(tmp_path), {"stages.2.sensitivity": 0.5}, folder=tmp_path)
    assert trained == ["1 distill"] and loaded[0][0] == 1  # one step was done
    assert ended(tmp_path) == undisturbed(tmp_path, RECIPE, {"stages.2.sensitivity": 0.5})


@pytest.mark.parametrize("lost", [True, False])
def test_answers_that_are_gone_in_the_middle_of_a_stage_are_told(tmp_path, monkeypatch, capsys, lost):
    killed_in_the_middle(monkeypatch, write(tmp_path), tmp_path)
    [answers] = (tmp_path / "more" / "views").iterdir()
    if lost:
        shutil.rmtree(answers)
    capsys.readouterr()
    runner.run(write(tmp_path), folder=tmp_path)
    told = f"{answers}: the answers that stage 2 has learnt from are gone" in capsys.readouterr().err
    assert told is lost
    assert ended(tmp_path) == undisturbed(tmp_path, RECIPE, {})


# another name


def test_equal_stages_of_finished_runs_are_taken_over(tmp_path, trained, capsys, monkeypatch):
    runner.run(write(tmp_path), folder=tmp_path)
    expected = ended(tmp_path)
    trained.clear(), capsys.readouterr()
    runner.run(write(tmp_path), {"name": "same"}, folder=tmp_path)
    told = f"same: the first 4 stages are taken over from {tmp_path}/more, as equal in settings and inputs\n"
    assert trained == [] and told in capsys.readouterr().out
    assert ended(tmp_path, "same") == expected
    # A run without a report does not count, and neither does one whose file is gone.
    (tmp_path / "more" / "report.json").unlink()
    (tmp_path / "same" / "student.tiny").write_bytes(b"")
    changes = {"name": "third", "student.hidden": [3]}
    runner.run(write(tmp_path), changes, folder=tmp_path)
    told = f"third: the first 3 stages are taken over from {tmp_path}/same, "
    assert trained == [] and told in capsys.readouterr().out
    assert ended(tmp_path, "third") == expected
    # Nor does one whose file has another byte.
    (tmp_path / "same" / "report.json").unlink()
    file = tmp_path / "third" / "student.tiny"
    data = file.read_bytes()
    file.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    capsys.readouterr()
    runner.run(write(tmp_path), {"name": "fourth"}, folder=tmp_path)
    told = f"fourth: the first 3 stages are taken over from {tmp_path}/third, "
    assert trained == [] and told in capsys.readouterr().out
    assert ended(tmp_path, "fourth") == expected


def test_a_damaged_checkpoint_is_not_taken_over(tmp_path, trained, caplog):
    runner.run(write(tmp_path), folder=tmp_path)
    expected = ended(tmp_path)
    trained.clear()
    for number, name in ((1, "distill"), (2, "prune"), (3, "pack")):
        path = tmp_path / "more" / "checkpoints" / f"{number:02d}-{name}" / "00000000" / "student.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    runner.run(write(tmp_path), {"name": "other"}, folder=tmp_path)
    assert trained == ["1 distill"] and "skipped a damaged checkpoint" in caplog.text
    assert ended(tmp_path, "other") == expected


# on demand


def test_from_a_stage_and_fresh(tmp_path, trained, capsys):
    path, at = str(write(tmp_path)), ["--folder", str(tmp_path)]
    assert cli.main(["run", path, *at]) == 0
    expected = ended(tmp_path)
    for words, anew in (
        (["--from", "distill"], ["1 distill"]),
        (["--from", "2"], []),
        (["--fresh"], ["0 train", "1 distill"]),
        (["--fresh", "--name", "other"], ["0 train", "1 distill"]),
    ):
        trained.clear()
        assert cli.main(["run", path, *at, *words]) == 0
        assert trained == anew and ended(tmp_path) == expected
    assert sorted(os.listdir(tmp_path / "more" / "earlier")) == ["1", "2", "3"]
    capsys.readouterr()
    for words, said in (
        (
            ["--from", "share"],
            "--from share: no stage has that name; allowed: 0 train, 1 distill, 2 prune, 3 pack",
        ),
        (["--from", "9"], "--from 9: no stage has that name"),
        (["--from", "1", "--fresh"], "--from has no effect with --fresh"),
    ):
        assert cli.main(["run", path, *at, *words]) == 2
        assert said in capsys.readouterr().err


def test_what_is_run_anew_and_interrupted_goes_on_anew(tmp_path, trained, monkeypatch):
    runner.run(write(tmp_path), folder=tmp_path)
    expected = ended(tmp_path)
    trained.clear()
    with monkeypatch.context() as patch:
        patch.setattr(distill, "Objective", None)
        with pytest.raises(TypeError):
            runner.run(write(tmp_path), folder=tmp_path, from_stage="distill")
    runner.run(write(tmp_path), folder=tmp_path)
    assert trained == ["1 distill"] and ended(tmp_path) == expected


# kills


class Kills:
    """Raises Killed at the operation of a given number: renaming, replacing, linking."""

    def __init__(self, patch, at):
        self.left = at
        for name in ("rename", "replace", "link"):
            patch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, real):
        def operation(*given, **rest):
            self.left -= 1
            if self.left == 0:
                raise Killed
            done = real(*given, **rest)
            return done

        return operation


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_kill_between_any_two_operations_leaves_all_that_was_there(tmp_path, monkeypatch):
    begun = tmp_path / "begun"
    for number in range(4):
        rows = [{"index": 3, "file": "student.tiny", "file_bytes": 1}] if number == 3 else []
        checkpoint.save(begun / "checkpoints" / f"{number:02d}-s", {}, {"rows": rows})
    for name in (
        "done",
        "report.json",
        "report.md",
        "student.tiny",
        "weights.png",
        "mine.png",
        "recipe.yaml",
    ):
        (begun / name).write_text("![x](weights.png)" if name == "report.md" else name)
    whole = tmp_path / "whole"
    shutil.copytree(begun, whole)
    assert set_aside(whole, 1, b"old") == whole / "earlier" / "1"
    expected = tree(whole)
    assert {path for path in expected if "/" not in path} == {"mine.png", "recipe.yaml"}
    assert set_aside(whole, 1, b"old") is None and tree(whole) == expected
    contents = sorted(tree(begun).values())
    for at in itertools.count(1):
        here = tmp_path / f"killed-{at}"
        shutil.copytree(begun, here)
        with monkeypatch.context() as patch:
            kills = Kills(patch, at)
            try:
                set_aside(here, 1, b"old")
            except Killed:
                left = tree(here)
                assert (
                    sorted(data for path, data in left.items() if not path.endswith("1/recipe.yaml"))
                    == contents
                )
                folders = sorted(path.name for path in (here / "checkpoints").iterdir())
                assert folders == ["00-s", "01-s", "02-s", "03-s"][: len(folders)]
        set_aside(here, 1, b"old")
        assert tree(here) == expected
        if kills.left > 0:
            break
    assert at > 8


@pytest.mark.parametrize("name", ["more", "other"])
def test_the_same_command_goes_on_after_a_kill_at_any_operation(tmp_path, monkeypatch, trained, name):
    """The kills come one operation later each time, in one folder: moving, taking over, and all that follows."""
    runs = tmp_path / "runs"
    runner.run(write(tmp_path), folder=runs)
    old = ended(runs)
    trained.clear()
    changes = {"name": name, "stages.2.sensitivity": 0.5}
    num_killed = 0
    for at in itertools.count(1):
        with monkeypatch.context() as patch:
            Kills(patch, at)
            try:
                runner.run(write(tmp_path), changes, folder=runs)
                break
            except Killed:
                num_killed += 1
    assert num_killed > 5 and trained == []
    assert ended(runs, name) == undisturbed(tmp_path, RECIPE, changes)
    assert ended(runs / "more" / "earlier", "1") == old if name == "more" else ended(runs) == old


# the digests


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"name": "x", "allow_untrained": True, "stages.0.at_least": 3, "data.workers": 0}, 4),
        ({"seed": 1}, 0),
        ({"precision": "bf16"}, 0),
        ({"tf32": True}, 0),
        ({"cudnn_benchmark": True}, 0),
        ({"data.subset": 59}, 0),
        ({"data.augment": {"shift": 1}}, 0),
        ({"teacher.hidden": [7]}, 0),
        ({"stages.0.training.lr": 0.002}, 0),
        ({"stages.0.training.optimizer": "adam"}, 4),  # as it is by default
        ({"student.hidden": [4]}, 1),
        ({"student.from_teacher": "copy"}, 1),
        ({"stages.1.losses.0.weight": 0.5}, 1),
        ({"stages.1.losses.0.temperature": 2}, 1),
        ({"cache": "off"}, 1),
        ({"stages.2.training": {"epochs": 1}, "stages.2.losses": [{"loss": "kl"}]}, 2),
        # This loss's answers are kept from the second stage on, and a kept answer is rounded otherwise than a new one.
        ({"stages.2.training": {"epochs": 1}, "stages.2.losses": [{"loss": "correlation"}]}, 1),
        ({"stages.2.sensitivity": 0.9}, 2),
        ({"stages.3.tidy": True}, 3),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else None,
)
def test_what_the_result_of_a_stage_depends_on(tmp_path, changes, first):
    assert num_equal(digests(tmp_path), digests(tmp_path, changes)) == first


def digests(tmp_path, changes=None, text=RECIPE, allow_python=False):
    recipe, _ = read(write(tmp_path, text), changes or {}, allow_python)
    with Log(tmp_path / "log.jsonl") as log:
        return inputs_of(opening.make_run(recipe, tmp_path, Accelerator(cpu=True), log), recipe)


@pytest.mark.parametrize(
    ("edited", "first"),
    [
        ("datasets/digits", 0), ("models/lenet300", 0), ("stages/train", 0), ("stages/distill", 1), ("losses/kl", 1),
        ("stages/prune", 2), ("criteria/std", 2), ("stages/pack", 3), ("losses/hint", 4),
    ],
)  # fmt: skip
def test_stages_depend_on_the_shelf_files_that_they_name(tmp_path, monkeypatch, edited, first):
    before, real = digests(tmp_path), inputs._digest_of_file

    def digest(path):
        return "another" if str(path).endswith(f"trainer/{edited}.py") else real(path)

    monkeypatch.setattr(inputs, "_digest_of_file", digest)
    assert num_equal(before, digests(tmp_path)) == first


def test_a_stage_whose_own_loss_was_edited_is_not_taken_over(tmp_path, monkeypatch, trained):
    """Though a decorator, whose code is in another file, wraps it."""
    monkeypatch.syspath_prepend(tmp_path)
    own = tmp_path / "edited_loss.py"
    own.write_text(
        "import torch\n@torch.enable_grad()\ndef gap(student_logits, teacher_logits):\n"
        "    return (student_logits - teacher_logits).square().mean()\n"
    )
    text = RECIPE.replace("loss: kl", "loss: 'python:edited_loss:gap'")
    runner.run(write(tmp_path, text), folder=tmp_path, allow_python=True)
    trained.clear()
    runner.run(write(tmp_path, text), {"name": "same"}, folder=tmp_path, allow_python=True)
    assert trained == []
    own.write_text(own.read_text() + "# edited\n")
    runner.run(write(tmp_path, text), {"name": "other"}, folder=tmp_path, allow_python=True)
    assert trained == ["1 distill"]


def on_machine(monkeypatch, machine):
    monkeypatch.setattr(resuming, "machine_of", lambda run: machine)


def test_what_another_number_of_processes_has_trained_is_not_taken_over(tmp_path, monkeypatch, trained):
    runner.run(write(tmp_path), folder=tmp_path)
    trained.clear()
    on_machine(monkeypatch, "2 x cpu")
    runner.run(write(tmp_path), {"name": "two"}, folder=tmp_path)
    assert trained == ["0 train", "1 distill"]
    trained.clear()
    runner.run(write(tmp_path), {"name": "again"}, folder=tmp_path)
    assert trained == []


def test_a_run_goes_on_with_another_number_of_processes_and_no_other_takes_over_the_mixture(
    tmp_path, monkeypatch, trained
):
    """Whether by the same command or by a changed recipe, it keeps its stages; those that follow are of both machines."""
    with runner.begun(write(tmp_path), 1, folder=tmp_path):
        pass
    on_machine(monkeypatch, "2 x cpu")
    trained.clear()
    runner.run(write(tmp_path), folder=tmp_path)
    runner.run(write(tmp_path), {"stages.2.sensitivity": 0.5}, folder=tmp_path)
    assert trained == ["1 distill"]
    for machine, anew in (("2 x cpu", ["0 train", "1 distill"]), ("1 x cpu", ["1 distill"])):
        trained.clear()
        on_machine(monkeypatch, machine)
        runner.run(write(tmp_path), {"name": machine[0]}, folder=tmp_path)
        assert trained == anew


def test_a_run_that_goes_on_on_another_device_says_so(tmp_path, monkeypatch, trained, capsys):
    on_machine(monkeypatch, "1 x cuda")
    with runner.begun(write(tmp_path), 1, folder=tmp_path):
        pass
    on_machine(monkeypatch, "2 x cuda")  # of another number the training says it
    with runner.begun(write(tmp_path), 1, folder=tmp_path):
        pass
    assert "goes on on" not in capsys.readouterr().err
    on_machine(monkeypatch, "1 x cpu")
    runner.run(write(tmp_path), folder=tmp_path)
    assert (
        capsys.readouterr().err.count("began on 2 x cuda and goes on on 1 x cpu: rounding depends on it") == 1
    )


def other_settings(value):
    """Yields (path, copy) for each setting of a stage and of what stands in it, in which that setting has another value."""
    if isinstance(value, BaseModel):
        for key in type(value).model_fields:
            yield (key,), value.model_copy(update={key: "another"})
            for path, other in other_settings(getattr(value, key)):
                yield (key, *path), value.model_copy(update={key: other})
    elif isinstance(value, list):
        for number, item in enumerate(value):
            for path, other in other_settings(item):
                yield (number, *path), [*value[:number], other, *value[number + 1 :]]


def test_no_setting_of_a_stage_is_left_out(tmp_path):
    """A loss's own were: the recipe with another temperature went on with the student of the old one."""
    stages = []
    for path in Path(__file__).parents[2].glob("recipes/**/*.yaml"):
        with contextlib.suppress(RecipeError):  # its teacher's file is not here
            stages += read(path)[0].stages
    for loss in shelves.names("loss"):
        # Labels alone are no distillation.
        both = [{"loss": loss}, {"loss": "hint" if loss == "kl" else "kl"}]
        stages += read(write(tmp_path), {"stages.1.losses": both})[0].stages[1:2]
    found = set()
    for stage in stages:
        kept = json.dumps(inputs._plain(stage), default=str)
        for path, other in other_settings(stage):
            found.add(path[-1])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pydantic: the other value is of another type
                differs = json.dumps(inputs._plain(other), default=str) != kept
            assert differs is (path[0] not in inputs.WITHOUT_EFFECT), (stage, path)
    assert {"temperature", "beta", "margin", "sensitivity", "bits", "lr", "to", "at_least"} <= found


def test_a_file_that_a_stage_reads_is_part_of_its_inputs(tmp_path, trained):
    runner.run(write(tmp_path), folder=tmp_path)
    weights = next((tmp_path / "more" / "checkpoints" / "01-distill").glob("*/student.safetensors"))
    shutil.copy(weights, tmp_path / "mine.safetensors")
    text = f"""
name: loaded
data: {{dataset: digits, subset: 60, validation: 60}}
student: {{model: lenet300, hidden: [3]}}
stages:
  - {{stage: train, checkpoint: {tmp_path / "mine.safetensors"}}}
  - {{stage: pack}}
"""
    runner.run(write(tmp_path, text), folder=tmp_path)
    other = next((tmp_path / "more" / "checkpoints" / "00-train").glob("*/student.safetensors"))
    shutil.copy(other, tmp_path / "mine.safetensors")
    runner.run(write(tmp_path, text), {"name": "again"}, folder=tmp_path)
    assert ended(tmp_path, "again")[0] != ended(tmp_path, "loaded")[0]


def test_a_name_is_known_or_refused(tmp_path):
    recipe, _ = read(write(tmp_path, STUDENT_FIRST))
    from trainer.runs.resuming import stage_number

    assert stage_number(recipe, "distill") == stage_number(recipe, "2") == 2
    with pytest.raises(
        Mistake, match="--from train: several stages have that name; allowed: 0 train, 1 train, 2"
    ):
        stage_number(recipe, "train")
