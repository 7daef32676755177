"""Recipes: every fault at once, with the line it stands on; and what YAML can do to us."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import trainer
from trainer.recipe import recipe, shelves
from trainer.recipe.keys import DataKeys, Recipe, StageKeys, StudentKeys, TermKeys
from trainer.recipe.targets import ExportKeys
from trainer.recipe.text import RecipeError, dump, parse
from trainer.recipe.text import value as read_value

SHIPPED = sorted((Path(trainer.__file__).parents[1] / "recipes").rglob("*.yaml"))
GOOD = """\
name: good
data: {dataset: digits, size: 16}
teacher: {model: lenet5, width: 4}
student: {model: lenet5, width: 2}
stages:
  - {stage: train, who: teacher, training: {epochs: 1}}
  - stage: distill
    training: {epochs: 1, lr: 2e-3}
    losses: &taught
      - {loss: kl, temperature: 2}
      - {loss: hint, at: auto}
  - {stage: prune, sensitivity: 1, training: {epochs: 1}, losses: *taught}
  - {stage: share, bits: 4}
  - {stage: pack}
"""


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """The faults of a recipe's text, as 'line: place: message'."""
    monkeypatch.chdir(tmp_path)

    def read(text: str | bytes, changes: dict | None = None) -> list[str]:
        path = tmp_path / "x.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(RecipeError) as caught:
            recipe.read(path, changes)
        return str(caught.value).replace(f"{path}:", "").splitlines()

    return read


def without(line: str) -> str:
    return "".join(kept for kept in GOOD.splitlines(keepends=True) if not kept.startswith(line))


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def written(tmp_path, text: str) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return path


def test_a_good_recipe(tmp_path):
    read, plain = recipe.read(written(tmp_path, GOOD))
    assert read.stages[1].training.lr == 0.002 == plain["stages"][1]["training"]["lr"]
    assert read.stages[2].losses[0].temperature == 2 and read.stages[2].losses[1].at == "auto"
    assert [stage.stage for stage in read.stages] == ["train", "distill", "prune", "share", "pack"]
    assert read.precision == "no" and read.teacher_entries == [read.teacher]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_shipped_recipes_are_good(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for taught in re.findall(r"checkpoint: (runs/(\w+)/[^},\s]+)", path.read_text()):
        # Its teacher is what another shipped recipe leaves in its run's folder.
        assert taught[1] in {shipped.stem for shipped in SHIPPED}
        Path(taught[0]).parent.mkdir(parents=True)
        Path(taught[0]).touch()
    read, plain = recipe.read(path)
    assert read.name == path.stem and read_value(dump(plain)) == plain


BAD = {
    # unknown keys, at every depth
    "top": (changed("name: good", "nme: good"), ["1: nme: is no key here (did you mean 'name'?)"]),
    "data": (changed("size: 16", "sise: 16"), ["2: data.sise: is no key here (did you mean 'size'?)"]),
    "augment": (
        changed("size: 16", "augment: {shft: 1}"),
        ["2: data.augment.shft: is no key here (did you mean 'shift'?)"],
    ),
    "model": (changed("width: 4", "widht: 4"), ["3: teacher.widht: is no key here (did you mean 'width'?)"]),
    "teachers": (
        changed(
            "teacher: {model: lenet5, width: 4}",
            "teachers:\n  - {model: lenet5, checkpint: a.pth}\n  - {model: lenet5}",
        ),
        ["4: teachers[0].checkpint: is no key here (did you mean 'checkpoint'?)"],
    ),
    "stage": (
        changed("sensitivity: 1", "sensitivity: 1, sparsty: 2"),
        [
            "12: stages[2].sparsty: is no key with method 'std' (did you mean 'sparsity'?); with channels, lamp, "
        ],
    ),
    "training": (
        changed("lr: 2e-3", "learning_rate: 2e-3"),
        ["8: stages[1].training.learning_rate: is no key here; there are: "],
    ),
    "misspelt and required": (
        changed("epochs: 1, lr", "epoch: 1, lr"),
        ["8: stages[1].training.epoch: is no key here (did you mean 'epochs'?)"],
    ),
    "loss": (
        changed("temperature: 2", "temprature: 2"),
        ["10: stages[1].losses[0].temprature: is no key here (did you mean 'temperature'?)"],
    ),
    "schedule": (
        changed("temperature: 2", "weight: {value: 1, schedule: linear, epoch: 3}"),
        ["10: stages[1].losses[0].weight.epoch: is no key here (did you mean 'epochs'?)"],
    ),
    # unknown names
    "no dataset": (
        changed("dataset: digits", "dataset: digit"),
        ["2: data.dataset: there is no dataset 'digit' (did you mean 'digits'?)"],
    ),
    "no model": (
        changed("student: {model: lenet5", "student: {model: lenet6"),
        ["4: student.model: there is no model 'lenet6' (did you mean 'lenet5'?)"],
    ),
    "no stage": (
        changed("stage: pack", "stage: pak"),
        ["14: stages[4].stage: there is no stage 'pak' (did you mean 'pack'?)"],
    ),
    "no loss": (
        changed("loss: kl", "loss: lk"),
        ["10: stages[1].losses[0].loss: there is no loss 'lk'; there are: "],
    ),
    "a path for a loss": (
        changed("loss: kl", "loss: ../kl"),
        ["10: stages[1].losses[0].loss: there is no loss '../kl'"],
    ),
    "unknown name and more": (
        changed("loss: kl, temperature: 2", "loss: klu, weight: -1"),
        [
            "10: stages[1].losses[0].loss: there is no loss 'klu' (did you mean 'kl'?)",
            "10: stages[1].losses[0].weight: got -1; it should be greater than or equal to 0",
        ],
    ),
    # types and ranges
    "a word for a number": (
        changed("lr: 2e-3", "lr: fast"),
        ["8: stages[1].training.lr: got 'fast'; it should be a valid number"],
    ),
    "epochs beyond all": (
        changed("epochs: 1, lr", "epochs: 3000000000, batch_size: 1" + "0" * 400 + ", lr"),
        [
            "8: stages[1].training.epochs: got 3000000000; it should be less than 2147483648",
            "8: stages[1].training.batch_size: got 1",
        ],
    ),
    "half an epoch": (
        changed("epochs: 1, lr", "epochs: 1.5, lr"),
        ["8: stages[1].training.epochs: got 1.5; it should be a valid integer"],
    ),
    "a text that Python reads as 2e-30": (
        changed("lr: 2e-3", "lr: 2e-3_0"),
        ["8: stages[1].training.lr: got '2e-3_0'; it should be a valid number"],
    ),
    "a text that Python reads as 10": (
        changed("epochs: 1, lr", "epochs: 1_0, lr"),
        ["8: stages[1].training.epochs: got '1_0'; it should be a valid number"],
    ),
    "such a text in augment": (
        changed("size: 16", "augment: {shift: 1_0, rotate: ' 3'}"),
        [
            "2: data.augment.shift: got '1_0'; it should be a valid number",
            "2: data.augment.rotate: got ' 3'; it should be a valid number",
        ],
    ),
    "such a text where a folder may be named": (
        changed("size: 16", "validation: 0_1"),
        ["2: data.validation: got '0_1'; a number has no quotes and no _ (a folder: ./0_1)"],
    ),
    "a number in quotes where a folder may be named": (
        changed("size: 16", "validation: '0.1'"),
        ["2: data.validation: got '0.1'; a number has no quotes and no _ (a folder: ./0.1)"],
    ),
    "a number of base sixty": (
        changed("epochs: 1, lr", "epochs: 1:30, lr"),
        ["8: stages[1].training.epochs: got '1:30'; it should be a valid integer"],
    ),
    "a binary number": (
        changed("epochs: 1, lr", "epochs: 0b11, lr"),
        ["8: stages[1].training.epochs: got '0b11'; it should be a valid integer"],
    ),
    "infinity in quotes": (
        changed("lr: 2e-3", "lr: ' .inf'"),
        ["8: stages[1].training.lr: got ' .inf'; it should be a valid number"],
    ),
    "digits of another script": (
        changed("epochs: 1, lr", "epochs: ３, lr"),
        ["8: stages[1].training.epochs: got '３'; it should be a valid integer"],
    ),
    "a key without a space after its colon": (
        changed("size: 16", "size:16"),
        ["2: data.size:16: is no key here: a space is missing after the colon of 'size'"],
    ),
    "such a text within": (
        changed("sensitivity: 1", "sensitivity: {fc1: 1_0}"),
        ["12: stages[2].sensitivity.fc1: got '1_0'; it should be a valid number"],
    ),
    # settings that have no effect in so few epochs
    "milestones at the end": (
        changed("epochs: 1, lr", "epochs: 9, schedule: step, milestones: [3, 9], lr"),
        ["8: stages[1].training: milestones has 9, which is never reached: there are 9 epochs"],
    ),
    "patience until the end": (
        changed("epochs: 1, lr", "epochs: 9, patience: 8, lr"),
        [
            "8: stages[1].training: patience 8 has no effect: it can stop after epoch 9 at the earliest, and there are 9"
        ],
    ),
    "patience between two validations": (
        changed("epochs: 1, lr", "epochs: 9, patience: 4, validate_every: 3, lr"),
        ["8: stages[1].training: patience 4 has no effect: it can stop after epoch 9 at the earliest"],
    ),
    "true for a number": (
        changed("lr: 2e-3", "lr: true"),
        ["8: stages[1].training.lr: got true; it should be a valid number"],
    ),
    "true within": (
        changed("sensitivity: 1", "sensitivity: {fc1: true}"),
        ["12: stages[2].sensitivity.fc1: got true; it should be a valid number"],
    ),
    "true in augment": (
        changed("size: 16", "augment: {shift: true, flip: true}"),
        ["2: data.augment.shift: got true; it should be a valid number"],
    ),
    "true for a weight": (
        changed("temperature: 2", "weight: true"),
        ["10: stages[1].losses[0].weight: got true; it should be a valid number"],
    ),
    "infinite": (
        changed("lr: 2e-3", "lr: .inf"),
        ["8: stages[1].training.lr: got inf; it should be a finite number"],
    ),
    "not a number": (
        changed("lr: 2e-3", "lr: .nan"),
        ["8: stages[1].training.lr: got nan; it should be a finite number"],
    ),
    "no mapping": (
        changed("training: {epochs: 1, lr: 2e-3}", "training: 3"),
        ["8: stages[1].training: got 3; it should be a mapping"],
    ),
    "nothing": (
        changed("{epochs: 1, lr: 2e-3}", ""),
        ["8: stages[1].training: got nothing; it should be a mapping"],
    ),
    "one loss, no list": (
        changed("losses: *taught", "losses: {loss: kl}"),
        ["12: stages[2].losses: got {'loss': 'kl'}; it should be a list"],
    ),
    "a bare loss": (
        changed("{loss: kl, temperature: 2}", "kl"),
        ["10: stages[1].losses[0]: got 'kl'; it should be a mapping with the key 'loss'"],
    ),
    "a number for a loss": (
        changed("loss: kl", "loss: 5"),
        ["10: stages[1].losses[0].loss: got 5; it should be the name of a loss"],
    ),
    "a bare model": (
        changed("{model: lenet5, width: 2}", "lenet5"),
        ["4: student: got 'lenet5'; it should be a mapping with the key 'model'"],
    ),
    "range": (changed("width: 2", "width: 0"), ["4: student.width: got 0; it should be greater than 0"]),
    "range of one kind of two": (
        changed("bits: 4", "bits: 17"),
        ["13: stages[3].bits: got 17; it should be less than or equal to 16"],
    ),
    "range within": (
        changed("bits: 4", "bits: {fc1: 17}"),
        ["13: stages[3].bits.fc1: got 17; it should be less than or equal to 16"],
    ),
    "choice": (
        changed("stage: pack", "stage: train, who: me, training: {epochs: 1}"),
        ["14: stages[4].who: got 'me'; it should be 'teacher' or 'student'"],
    ),
    "several kinds": (
        changed("at: auto", "at: middle"),
        [
            "11: stages[1].losses[1].at: got 'middle'; it should be 'auto' or 'last' or be a list or be a mapping"
        ],
    ),
    "the kind that was meant": (
        changed("at: auto", "at: [conv1, 1.5]"),
        ["11: stages[1].losses[1].at[1]: got 1.5; it should be a valid string or be a valid integer"],
    ),
    "a number for a layer": (
        changed("bits: 4", "bits: {1: 4}"),
        ["13: stages[3].bits[1]: got 1 as a key; a name is allowed (in quotes if need be)"],
    ),
    "name": (changed("name: good", "name: ../good"), ["1: name: got '../good'; it should match pattern "]),
    "seed": (
        changed("name: good", "name: good\nseed: 99999999999"),
        ["2: seed: got 99999999999; it should be less than 4294967296"],
    ),
    "no stages": (
        GOOD.partition("stages:")[0] + "stages: []\n",
        ["5: stages: got []; it should have at least 1 item"],
    ),
    "one of several teachers": (
        changed("teacher: {model: lenet5, width: 4}", "teachers: [{model: lenet5}]"),
        ["3: teachers: got [{'model': 'lenet5'}]; it should have at least 2 items"],
    ),
    # what is missing
    "no name": (without("name"), ["1: name: is missing, and required"]),
    "no student": (without("student"), ["1: student: is missing, and required"]),
    "no epochs": (
        changed("{epochs: 1, lr: 2e-3}", "{lr: 2e-3}"),
        ["8: stages[1].training.epochs: is missing, and required"],
    ),
    "no key of the shelf": (
        changed("loss: kl, ", ""),
        ["10: stages[1].losses[0].loss: is missing, and required"],
    ),
    "key of the shelf misspelt": (
        changed("loss: kl", "los: kl"),
        ["10: stages[1].losses[0].los: is no key here (did you mean 'loss'?)"],
    ),
    # no effect, and what does not go together
    "momentum": (
        changed("lr: 2e-3", "\n      momentum: 0.9").replace(
            "{epochs: 1, \n      momentum: 0.9}", "\n      epochs: 1\n      momentum: 0.9"
        ),
        [
            "10: stages[1].training: momentum and nesterov have no effect with optimizer 'adam'; 'sgd' has them"
        ],
    ),
    "sparsity with std": (
        changed("sensitivity: 1", "sensitivity: 1, sparsity: 0.5"),
        ["12: stages[2].sparsity: is no key with method 'std'; with channels, "],
    ),
    "losses without training": (
        changed("bits: 4", "bits: 4, losses: *taught"),
        ["13: stages[3]: losses have no effect without training"],
    ),
    "views": (
        changed("size: 16", "views: 3"),
        ["2: data.views: has no effect without augment: every view is the same"],
    ),
    "endless views kept": (
        changed("size: 16", "keep_views: true, augment: {shift: 1}"),
        ["2: data.keep_views: has no effect on endless views: give data.views"],
    ),
    "images as they are kept": (
        changed("size: 16", "keep_views: true"),
        ["2: data.keep_views: has no effect without augment"],
    ),
    "mixed views kept": (
        changed("size: 16", "keep_views: true, mixup: 1, augment: {shift: 1}"),
        ["2: data.keep_views: has no effect with mixup or cutmix"],
    ),
    "no mean": (changed("size: 16", "mean: []"), ["2: data.mean: "]),
    "a whole validation": (changed("size: 16", "validation: 1.0"), ["2: data.validation: "]),
    "views and mixup": (
        changed("size: 16", "views: 3, mixup: 1, augment: {shift: 1}"),
        ["2: data.views: has no effect with mixup or cutmix"],
    ),
    "at on logits": (
        changed("temperature: 2", "at: last"),
        [
            "10: stages[1].losses[0].at: loss 'kl' looks at no layers (it wants student_logits, teacher_logits)"
        ],
    ),
    "warm up to": (
        changed("temperature: 2", "weight: {value: 1, schedule: warm_up, to: 2}"),
        ["10: stages[1].losses[0].weight: to has no effect with schedule 'warm_up'"],
    ),
    "constant for epochs": (
        changed("temperature: 2", "weight: {value: 1, schedule: constant, epochs: 2}"),
        ["10: stages[1].losses[0].weight: epochs has no effect with schedule 'constant'"],
    ),
    "from here to here": (
        changed("temperature: 2", "weight: {value: 1, schedule: cosine, to: 1}"),
        [
            "10: stages[1].losses[0].weight: schedule 'cosine' has no effect: value and where it goes are both 1.0"
        ],
    ),
    "value and ratio": (
        changed("temperature: 2", "weight: {value: 1, ratio: 1}"),
        ["10: stages[1].losses[0].weight: exactly one of value and ratio is needed"],
    ),
    "value without schedule": (
        changed("temperature: 2", "weight: {value: 1}"),
        ["10: stages[1].losses[0].weight: value has no schedule; a weight that does not change is a number"],
    ),
    "a word for a weight": (
        changed("temperature: 2", "weight: much"),
        ["10: stages[1].losses[0].weight: got 'much'; it should be a valid number or be 'auto'"],
    ),
    "ratio below zero": (
        changed("temperature: 2", "weight: {ratio: -1}"),
        ["10: stages[1].losses[0].weight.ratio: got -1; it should be greater than 0"],
    ),
    "combine": (
        changed("name: good", "name: good\ncombine: logits"),
        ["2: combine: has no effect without teachers"],
    ),
    "weight of one": (
        changed("width: 4", "weight: 2"),
        ["3: teacher.weight: has no effect with one teacher"],
    ),
    "pack twice": (
        GOOD + "  - {stage: pack}\n",
        ["15: stages[5]: has no effect: the student is packed already"],
    ),
    "pretrained and checkpoint": (
        changed("{model: lenet5, width: 4}", "{model: hf-hub:a/b, pretrained: true, checkpoint: x.yaml}"),
        ["3: teacher.pretrained: has no effect with checkpoint, which replaces all weights"],
    ),
    "teacher and teachers": (
        changed("name: good", "name: good\nteachers: [{model: lenet5}, {model: lenet5}]"),
        ["2: teachers: teacher and teachers are both given; one of them is allowed"],
    ),
    "mean alone": (
        changed("width: 4", "mean: [0.5]"),
        ["3: teacher.mean: mean and std go together: give both or neither"],
    ),
    "mean and std": (
        changed("width: 4", "mean: [0.5], std: [1, 1]"),
        ["3: teacher.std: got 2 values, and mean has 1"],
    ),
    "prune after share": (
        GOOD.replace("stage: pack", "stage: prune, sensitivity: 1"),
        ["14: stages[4]: prunes after sharing"],
    ),
    "train after pack": (
        GOOD + "  - {stage: train, training: {epochs: 1}}\n",
        ["15: stages[5]: changes the student after it was packed"],
    ),
    "no checkpoint": (
        changed("width: 2", "checkpoint: no.pth"),
        ["4: student.checkpoint: there is no file 'no.pth' in "],
    ),
    "no checkpoint to train from": (
        changed("stage: pack", "stage: train, checkpoint: no.pth"),
        [
            "14: stages[4].checkpoint: there is no file 'no.pth' in ",
            "14: stages[4].checkpoint: replaces what the stages before have made of the student",
        ],
    ),
    "copy over a checkpoint": (
        changed("width: 2", "from_teacher: copy, checkpoint: x.yaml"),
        ["4: student.from_teacher: overwrites what checkpoint loads; one of them is allowed"],
    ),
    "the last layer anew": (
        changed("bits: 4", "bits: 4, training: {epochs: 1}, losses: [{loss: reuse_classifier}]"),
        ["13: stages[3].losses[0]: loss 'reuse_classifier' sets the last layer anew"],
    ),
    "mixed samples by index": (
        changed("size: 16", "mixup: 1").replace("loss: kl, temperature: 2", "loss: contrastive"),
        ["10: stages[1].losses[0]: loss 'contrastive' knows samples by index: not with mixup, cutmix"],
    ),
    # teachers that are not there, or know nothing
    "no teacher": (
        without("teacher"),
        [
            "5: stages[0]: trains the teacher, and there is no teacher in this recipe",
            "9: stages[1].losses[0]: loss 'kl' needs a teacher, and there is none",
            "10: stages[1].losses[1]: loss 'hint' needs a teacher, and there is none",
        ],
    ),
    "copy of no teacher": (
        without("teacher").replace("width: 2", "from_teacher: copy")[:90] + "stages: [{stage: pack}]\n",
        ["3: student.from_teacher: there is no teacher in this recipe"],
    ),
    "ignorant teacher": (
        without("  - {stage: train"),
        ["3: teacher: knows nothing: give it checkpoint, pretrained: true, or a stage train"],
    ),
    "ignorant teacher of a hub": (
        without("  - {stage: train").replace("{model: lenet5, width: 4}", "{model: 'hf-hub:a/b'}"),
        ["3: teacher: knows nothing: give it checkpoint, pretrained: true, or a stage train"],
    ),
    "weights of 0": (
        changed("temperature: 2", "temperature: 2, weight: 0").replace("loss: hint", "loss: hint, weight: 0"),
        [
            "9: stages[1].losses: have no effect: all weights are 0",
            "12: stages[2].losses: have no effect: all weights are 0",
        ],
    ),
    "taught too late": (
        without("  - {stage: train") + "  - {stage: train, who: teacher, training: {epochs: 1}}\n",
        [
            "6: stages[0]: asks a teacher that is taught only later, in stages[4]",
            "11: stages[1]: asks a teacher that is taught only later, in stages[4]",
        ],
    ),
    "a teacher's loss in train": (
        changed("who: teacher, training: {epochs: 1}", "training: {epochs: 1}, losses: [{loss: kl}]"),
        ["6: stages[0]: loss 'kl' needs a teacher: use stage distill"],
    ),
    # models from elsewhere
    "timm without a name": (
        changed("{model: lenet5, width: 2}", "{model: timm}"),
        ["4: student.model: got 'timm'; timm/NAME is allowed"],
    ),
    "python without a name": (
        changed("{model: lenet5, width: 2}", "{model: python}"),
        ["4: student.model: got 'python'; python:module:function is allowed"],
    ),
    "python without a function": (
        changed("{model: lenet5, width: 2}", "{model: 'python:json'}"),
        ["4: student.model: 'python:json': it runs the code of that module: allow it by --allow-python"],
    ),
    "no module": (
        changed("{model: lenet5, width: 2}", "{model: 'python:no_such.module:f'}"),
        [
            "4: student.model: 'python:no_such.module:f': it runs the code of that module: allow it by --allow-python"
        ],
    ),
    # keys
    "twice": (changed("size: 16", "size: 16, size: 17"), ["2: data.size: is given twice, first on line 2"]),
    "true as a key": (
        changed("name: good", "name: good\ntrue: 3\n[a]: 4\n1.5: 3\n~: 3"),
        [
            "2: recipe: got true as a key; a name is allowed (in quotes if need be)",
            "3: recipe: got a list or a mapping as a key",
            "4: recipe: got 1.5 as a key",
            "5: recipe: got nothing as a key",
        ],
    ),
    "a number as a key": (changed("name: good", "name: good\n3: 3"), ["2: [3]: is no key here; there are: "]),
    "merging a word": (
        changed("  - {stage: pack}", "  - {<<: 3, stage: pack}"),
        ["14: stages[4].<<: a mapping, or a list of mappings, is allowed"],
    ),
    "merging twice": (
        changed("  - {stage: pack}", "  - {<<: &a {stage: pack}, <<: *a}"),
        ["14: stages[4].<<: is given twice, first on line 14"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_every_fault_is_told_with_its_line(case, faults):
    text, wanted = BAD[case]
    found = faults(text)
    assert len(found) == len(wanted), "\n".join(found)
    for line, start in zip(found, wanted, strict=True):
        assert line.startswith(start), f"\n{line}\nis not\n{start}"


def test_numbers_are_read_as_yaml_has_them(tmp_path, monkeypatch):
    """YAML 1.2, as editors read it: 017 is 17, 0o17 is 15; a number in quotes is that number."""
    monkeypatch.chdir(tmp_path)
    for written_as, number in {
        "0x10": 16,
        "0o17": 15,
        "017": 17,
        "+3": 3,
        "'3'": 3,
        "3.0": 3,
        "1e1": 10,
    }.items():
        path = written(tmp_path, changed("epochs: 1, lr", f"epochs: {written_as}, lr"))
        assert recipe.read(path)[0].stages[1].training.epochs == number
        by_change = recipe.read(written(tmp_path, GOOD), {"stages.1.training.epochs": read_value(written_as)})
        assert by_change[0].stages[1].training.epochs == number
    path = written(
        tmp_path, changed("lr: 2e-3", "lr: 2e-3, patience: 7").replace("epochs: 1, lr", "epochs: 9, lr")
    )
    assert recipe.read(path)[0].stages[1].training.patience == 7


def test_all_faults_at_once(faults):
    """Nearly all is wrong: one line each, in the order of the file; sound parts are checked too."""
    found = faults("""\
name: a b
data: {dataset: digits, views: 3, mixup: -1}
teacher: {model: lenet6}
student: {model: lenet5, width: x, from_teacher: copy}
precison: no
stages:
  - {stage: train, who: teacher, training: {epochs: 0, lr: .inf, nesterov: 3}}
  - {stage: distil}
  - {stage: share, bits: 99}
  - {stage: pack}
  - {stage: prune, sensitivity: 1, keep: 3}
  - {stage: pack, fil: x}
  - {stage: pack}
""")
    assert [line.partition(": ")[0] + " " + line.split(": ")[1] for line in found] == [
        "1 name",
        "2 data.mixup",
        "3 teacher.model",
        "4 student.width",
        "5 precison",
        "7 stages[0].training.epochs",
        "7 stages[0].training.lr",
        "7 stages[0].training.nesterov",
        "8 stages[1].stage",
        "9 stages[2].bits",
        "11 stages[4].exclude",
        "12 stages[5].fil",
        "13 stages[6]",
    ]
    assert found[-1] == "13: stages[6]: has no effect: the student is packed already"


def test_what_is_wrong_together_is_told_beside_what_is_wrong_alone(faults):
    found = faults(
        without("teacher")
        .replace("size: 16", "size: no")
        .replace("name: good", "name: good\ncombine: logits")
    )
    assert [line.split(": ")[1] for line in found] == [
        "combine",
        "data.size",
        "stages[0]",
        "stages[1].losses[0]",
        "stages[1].losses[1]",
    ]


def test_a_fault_of_an_anchor_is_told_once_and_where_it_stands(faults):
    assert faults(changed("temperature: 2", "temperature: 0")) == [
        "10: stages[1].losses[0].temperature: got 0; it should be greater than 0"
    ]
    merged = changed(
        "{stage: share, bits: 4}", "{stage: share, bits: 4, training: {<<: *how, lr: 0}}"
    ).replace("training: {epochs: 1, lr: 2e-3}", "training: &how\n      epochs: 1\n      clip: 0")
    assert faults(merged) == [
        "10: stages[1].training.clip: got 0; it should be greater than 0",
        "15: stages[3].training.lr: got 0; it should be greater than 0",
    ]


def test_merging_follows_yaml(tmp_path):
    text = """
a: &a {x: 1, y: 1, z: {p: 1}}
b: &b {x: 2, w: 2}
c: {x: 3, <<: [*a, *b]}
"""
    path = written(tmp_path, text)
    assert parse(path).plain == yaml.safe_load(text)
    assert parse(path).plain["c"] == {"x": 3, "y": 1, "z": {"p": 1}, "w": 2}


@pytest.mark.parametrize(
    ("text", "told"),
    {
        "": "1: a recipe is a mapping (name: ..., data: ..., stages: ...); got nothing",
        "# only words\n": "1: a recipe is a mapping (name: ..., data: ..., stages: ...); got nothing",
        "- a\n- b\n": "1: a recipe is a mapping (name: ..., data: ..., stages: ...); got a list",
        "\n\nword\n": "3: a recipe is a mapping (name: ..., data: ..., stages: ...); got 'word'",
        "name: a\n\tdata: 3\n": "2: is not YAML: a tab: YAML is indented by spaces",
        "name: a\ndata: {x: 3\nseed: 1\n": "3: is not YAML: a comma is missing in 'seed: 1', or the bracket { of line 2 is not closed",
        "name: a: b\n": "1: is not YAML: a second 'key: value' on one line: begin a new line, or",
        "name: a\n---\nname: b\n": "2: is not YAML: a second document begins here; one is allowed",
        "name: a\nx: \0\n": "2: is not YAML: character 0x0000 is not allowed",
        "name: *a\n": "1: is not YAML: there is no anchor &a above",
        "name: a\nx: !!python/object/apply:os.getcwd []\n": "2: x: the tag !!python/object/apply:os.getcwd is not known here",
        "name: !mine a\n": "1: name: cannot be read: 'a' is no !mine that is known here",
        "name: !!bool a\n": "1: name: cannot be read: 'a' is no !!bool that is known here",
        "name: !!map [a]\n": "1: name: the tag !!map is not known here",
        "seed: " + "9" * 5000: "1: seed: cannot be read: '9999999",
        "a: &a\n  b: *a\n": "1: a.b: the anchor holds itself",
        "a: " + "[" * 60 + "]" * 60: "1: is nested too deep: that is no recipe",
        b"\x89PNG\r\n\x1a\n\0": "1: is no text: byte 0x89 is not UTF-8",
        "name: a".encode("utf-16"): "1: is no text: byte 0xff is not UTF-8",
    }.items(),
    ids=range(19),
)
def test_what_is_no_recipe_at_all(text, told, faults):
    (found,) = faults(text)
    assert found.startswith(told), found


def test_bombs_are_refused(faults):
    names = [f"a{i}" for i in range(12)]
    lists = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in pairwise(names)
    )
    merges = "a0: &a0 {x: 1}\n" + "".join(
        f"{new}: &{new} {{<<: [{', '.join(['*' + old] * 9)}]}}\n" for old, new in pairwise(names)
    )
    for bomb in (lists, merges):
        assert "more than 10,000 values once its anchors are unfolded" in faults(bomb)[0]
    assert faults("a: " + "[" * 2000) == [" is nested too deep: that is no recipe"]
    assert faults("name: " + "é" * 150_000) == [" is longer than 262,144 bytes: that is no recipe"]


def test_files_that_cannot_be_read(tmp_path):
    for path, told in ((tmp_path, "Is a directory"), (tmp_path / "no.yaml", "No such file or directory")):
        with pytest.raises(RecipeError, match=re.escape(f"{path}: cannot be read: {told}")):
            recipe.read(path)


def test_a_byte_order_mark_and_windows_lines_do_no_harm(tmp_path, faults):
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert recipe.read(path)[1] == yaml.load(GOOD.replace("2e-3", "0.002"), yaml.SafeLoader)
    assert faults(changed("size: 16", "sise: 16").replace("\n", "\r\n"))[0].startswith("2: data.sise")


@pytest.mark.parametrize(
    ("text", "value"),
    {
        "2e-3": 0.002,
        "1.": 1.0,
        "-.5": -0.5,
        "010": 10,
        "0x1f": 31,
        "0o17": 15,
        "+3": 3,
        "no": "no",
        "on": "on",
        "true": True,
        "~": None,
        "": None,
        "1:30": "1:30",
        "2024-01-01": "2024-01-01",
        "[1, 2e3]": [1, 2000.0],
        "'2e3'": "2e3",
        "{a: 1}": {"a": 1},
    }.items(),
)
def test_values_are_read_as_yaml_1_2_and_written_so_that_all_read_them_the_same(text, value):
    assert read_value(text) == value and type(read_value(text)) is type(value)
    kept = dump({"a": value, "b": text})
    assert read_value(kept) == yaml.safe_load(kept) == {"a": value, "b": text}


def test_timm_names(faults):
    def model(words: str) -> list[str]:
        return faults(changed("{model: lenet5, width: 2}", f"{{model: {words}}}"))

    assert model("timm/resnet81") == [
        "4: student.model: timm has no model 'resnet81' (did you mean 'resnet18'?)"
    ]
    assert model("timm/zzzzzzzz") == ["4: student.model: timm has no model 'zzzzzzzz'"]
    assert model("timm/resnet18.a1_in1q, pretrained: true") == [
        "4: student.model: timm has no weights 'resnet18.a1_in1q' (did you mean 'resnet18.a1_in1k'?)"
    ]
    assert model("timm/test_vit9, img_sise: 3") == [
        "4: student.img_sise: is no key here (did you mean 'img_size'?)"
    ]


# Changes from outside


def test_changes(tmp_path):
    path = written(tmp_path, GOOD)
    read, plain = recipe.read(
        path,
        {
            "name": "other",
            "stages.1.training.epochs": 7,
            "stages[2].losses[0].temperature": 3,
            "data.augment.shift": 1,
            "seed": 4,
        },
    )
    assert (read.name, read.seed, read.stages[1].training.epochs, read.data.augment.shift) == (
        "other",
        4,
        7,
        1,
    )
    # The losses of stages 1 and 2 come from one anchor: a change to one place changes no other.
    assert [stage["losses"][0]["temperature"] for stage in plain["stages"][1:3]] == [2, 3]
    assert path.read_text() == GOOD


def test_faulty_changes(faults):
    assert faults(GOOD, {"seed": -1}) == ["changes: seed: got -1; it should be greater than or equal to 0"]
    assert faults(GOOD, {"stage.1.lr": 1}) == ["changes: stage: is no key here (did you mean 'stages'?)"]
    assert faults(GOOD, {"stages.1.training.momentum": 0.9})[0].startswith(
        "changes: stages[1].training: momentum and nesterov have"
    )
    assert faults(GOOD, {"stages.9.training.epochs": 1}) == [
        "changes: stages.9.training.epochs: stages has no entry '9'; it has 5, from 0 on"
    ]
    assert faults(GOOD, {"name.x": 1}) == ["changes: name.x: name is 'good', which holds no 'x'"]
    assert faults(GOOD, {"..": 1}) == ["changes: '..' is no path; 'stages.1.training.epochs' is one"]
    # A fault of the file keeps its line.
    assert faults(changed("width: 2", "width: 0"), {"stages.3.bits": 0}) == [
        "changes: stages[3].bits: got 0; it should be greater than or equal to 1",
        "4: student.width: got 0; it should be greater than 0",
    ]


def test_places_of_a_recipe_that_was_read(tmp_path):
    """What only the networks know is told like any other fault."""
    read, _ = recipe.read(path := written(tmp_path, GOOD), {"stages.3.bits": {"fc9": 4}})
    assert (
        read.fault(("stages", 1, "losses", 1), "at: there is no layer 'x'")
        == f"{path}:11: stages[1].losses[1].at: there is no layer 'x'"
    )
    assert read.fault(("stages", 1, "losses", 0), "at: x") == f"{path}:10: stages[1].losses[0]: at: x"
    assert read.fault(("stages", 3, "bits", "fc9"), "x") == "changes: stages[3].bits.fc9: x"
    assert Recipe.model_construct().fault(("stages", 1), "x") == "stages[1]: x"


# The schema


def conforms(value, schema: dict, top: dict) -> bool:
    """Whether a plain value is what a JSON Schema allows; as much of the standard as pydantic writes."""
    if "$ref" in schema:
        return conforms(value, top["$defs"][schema["$ref"].removeprefix("#/$defs/")], top)
    if "oneOf" in schema and sum(conforms(value, one, top) for one in schema["oneOf"]) != 1:
        return False
    if "anyOf" in schema and not any(conforms(value, one, top) for one in schema["anyOf"]):
        return False
    if "const" in schema and value != schema["const"] or "enum" in schema and value not in schema["enum"]:
        return False
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
        "null": type(None),
    }
    if "type" in schema:
        if (
            not isinstance(value, kinds[schema["type"]])
            or isinstance(value, bool)
            and schema["type"] != "boolean"
        ):
            return False
    if isinstance(value, (int, float)):
        return not (
            value < schema.get("minimum", value)
            or value > schema.get("maximum", value)
            or "exclusiveMinimum" in schema
            and value <= schema["exclusiveMinimum"]
            or "exclusiveMaximum" in schema
            and value >= schema["exclusiveMaximum"]
        )
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        return (
            len(value) >= schema.get("minItems", 0)
            and len(value) <= schema.get("maxItems", len(value))
            and all(
                conforms(item, first[i] if i < len(first) else schema.get("items", {}), top)
                for i, item in enumerate(value)
            )
        )
    if isinstance(value, dict):
        known = schema.get("properties", {})
        more = schema.get("additionalProperties", True)
        return set(schema.get("required", [])) <= set(value) and all(
            conforms(item, known[key], top)
            if key in known
            else more
            if isinstance(more, bool)
            else conforms(item, more, top)
            for key, item in value.items()
        )
    return True


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads(json.dumps(recipe.schema()))


def test_recipes_conform_to_the_schema(schema, tmp_path):
    for path in SHIPPED:
        assert conforms(parse(path).plain, schema, schema), path
    assert conforms(yaml.safe_load(changed("2e-3", "0.002")), schema, schema)


@pytest.mark.parametrize(
    "case",
    [
        "top",
        "data",
        "augment",
        "model",
        "stage",
        "training",
        "loss",
        "schedule",
        "no dataset",
        "no model",
        "no stage",
        "no loss",
        "a word for a number",
        "no mapping",
        "range",
        "range within",
        "choice",
        "several kinds",
        "name",
        "no stages",
        "no name",
        "no epochs",
        "no key of the shelf",
    ],
)
def test_faulty_recipes_do_not(case, schema, tmp_path):
    assert not conforms(parse(written(tmp_path, BAD[case][0])).plain, schema, schema)


def test_the_schema_knows_every_file_and_key_of_the_shelves(schema):
    bases = {
        "stage": StageKeys,
        "loss": TermKeys,
        "dataset": DataKeys,
        "model": StudentKeys,
        "to": ExportKeys,
    }
    for key, base in bases.items():
        alternatives = schema["$defs"][base.__name__]["oneOf"]
        alternatives = [
            entry for entry in alternatives if "title" in entry
        ]  # the last one stands for python:...
        chosen = [
            (name, tuple((argument, other) for argument, _, other in choice))
            for name in shelves.names(key)
            for choice in recipe._choices(shelves.find(key, name))
        ]
        assert len(chosen) == len(alternatives) >= len(shelves.names(key))
        for (name, choice), alternative in zip(chosen, alternatives, strict=True):
            function = shelves.find(key, name)
            assert set(alternative["properties"]) == set(shelves.checker(function, base, choice).model_fields)
            assert (
                alternative["additionalProperties"] is (name == "python") and key in alternative["required"]
            )
            assert alternative["description"].splitlines()[0] == function.__doc__.strip().splitlines()[0]
    assert (
        "const"
        not in schema["$defs"]["TeacherKeys"]["oneOf"][shelves.names("model").index("timm")]["properties"][
            "model"
        ]
    )


def test_the_schema_of_targets_takes_names_and_mappings(schema):
    entry = {"$ref": "#/$defs/ExportKeys"}
    for right in ("onnx", "python:m:t", {"to": "onnx"}, {"to": "onnx", "compressed": False, "folder": "x"}):
        assert conforms(right, entry, schema), right
    for wrong in (
        "onix",
        3,
        {"to": "onnx", "compressed": "so"},
        {"compressed": True},
        {"to": "onnx", "odd": 1},
    ):
        assert not conforms(wrong, entry, schema), wrong
