"""What was trained on other labels or pictures is neither taken over nor gone on with."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data.batches import make_data
from trainer.data.images import Data, InMemory, Part
from trainer.recipe.recipe import read
from trainer.runs import runner
from trainer.runs.inputs import measured_on
from trainer.training import fit
from trainer.training.progress import Progress

pytestmark = pytest.mark.usefixtures("taken_over")

RECIPE = """
name: {name}
data: {{dataset: image_folder, folder: {folder}/train.csv, test: {folder}/test.csv, size: 8, channels: 1}}
student: {{model: lenet300, hidden: [16]}}
stages:
  - {{stage: train, training: {{epochs: 2, batch_size: 25, lr: 1e-2}}}}
  - {{stage: prune, sensitivity: 0.5}}
"""


def labelled(folder, wrong=False, test_wrong=False, number=600):
    """Makes dark and light pictures and their tables; the first pictures are those that no sample is sure to hold."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    rows = []
    for at in range(number):
        if not (folder / f"{at}.png").exists():
            pixels = random.integers(0, 100, (8, 8), dtype=np.uint8) + np.uint8(100 * (at % 2))
            Image.fromarray(pixels).save(folder / f"{at}.png")
        rows.append((f"{at}.png", at % 2))
    for name, some, swapped in (("train", rows[:-100], wrong), ("test", rows[-100:], test_wrong)):
        lines = [f"{path},{('dark', 'light')[label ^ swapped]}" for path, label in some]
        (folder / f"{name}.csv").write_text("\n".join(["path,label", *lines]) + "\n")


def ran(tmp_path, name, capsys, folder=None, **more):
    path = tmp_path / f"{name}.yaml"
    path.write_text(RECIPE.format(name=name, folder=folder or tmp_path / "pictures"))
    report = runner.run(path, folder=tmp_path / "runs", **more)
    return report["rows"], capsys.readouterr().out


@pytest.mark.parametrize("changed", [{"wrong": True}, {"test_wrong": True}])
def test_stages_trained_or_measured_on_other_labels_are_not_taken_over(tmp_path, capsys, changed):
    labelled(tmp_path / "pictures", **changed)
    before, _ = ran(tmp_path, "one", capsys)
    _, said = ran(tmp_path, "two", capsys)
    assert "taken over" in said  # as it should be: nothing has changed
    labelled(tmp_path / "pictures")
    after, said = ran(tmp_path, "three", capsys)
    assert "taken over" not in said
    labelled(tmp_path / "elsewhere")
    anew, _ = ran(tmp_path, "four", capsys, folder=tmp_path / "elsewhere")
    assert [row["top1"] for row in after] == [row["top1"] for row in anew] != [row["top1"] for row in before]


@pytest.mark.parametrize("edit", ["another size", "the same size"])
def test_stages_trained_on_one_other_picture_are_not_taken_over(tmp_path, capsys, edit):
    labelled(tmp_path / "pictures", number=900)
    ran(tmp_path, "one", capsys)
    path = tmp_path / "pictures" / "7.png"
    if edit == "another size":
        Image.new("L", (8, 8), 3).save(path)
    else:
        status = path.stat()
        os.utime(path, (status.st_atime, status.st_mtime + 5))
    assert "taken over" not in ran(tmp_path, "two", capsys)[1]


def test_a_stage_run_anew_does_not_stand_on_other_labels(tmp_path, capsys):
    labelled(tmp_path / "pictures", wrong=True)
    ran(tmp_path, "one", capsys)
    _, said = ran(tmp_path, "one", capsys, from_stage="prune")
    assert "run anew from stage 2" in said  # as asked: nothing has changed
    labelled(tmp_path / "pictures")
    rows, said = ran(tmp_path, "one", capsys, from_stage="prune")
    assert "run anew from stage 1" in said and rows[0]["top1"] > 90


def test_kept_answers_are_of_these_pictures(tmp_path):
    def fingerprint():
        path = tmp_path / "r.yaml"
        path.write_text(RECIPE.format(name="r", folder=tmp_path / "pictures"))
        return make_data(read(path)[0].data, torch.device("cpu")).fingerprint

    labelled(tmp_path / "pictures", number=900)
    before = fingerprint()
    labelled(tmp_path / "pictures", wrong=True, number=900)
    assert fingerprint() == before  # answers do not depend on labels
    Image.new("L", (8, 8), 3).save(tmp_path / "pictures" / "7.png")
    assert fingerprint() != before


class Killed(Exception):
    pass


def killed(tmp_path, monkeypatch, capsys):
    """Begins the run `one`, and kills it in its first training."""

    def save(self, step, tally):
        real(self, step, tally)
        raise Killed

    real = Progress.save
    with monkeypatch.context() as inner:
        inner.setattr(fit, "CHECKPOINT_SECONDS", -1.0)
        inner.setattr(fit, "LOG_STEPS", 1)
        inner.setattr(Progress, "save", save)
        with pytest.raises(Killed):
            ran(tmp_path, "one", capsys)


def test_an_interrupted_training_does_not_go_on_with_other_labels(tmp_path, monkeypatch, capsys):
    labelled(tmp_path / "pictures", wrong=True)
    killed(tmp_path, monkeypatch, capsys)
    labelled(tmp_path / "pictures")
    with pytest.raises(
        ValueError, match="one: the images or their labels are not those that this run began with"
    ):
        ran(tmp_path, "one", capsys)
    labelled(tmp_path / "pictures", wrong=True)
    assert ran(tmp_path, "one", capsys)[0]


@pytest.mark.parametrize("edit", ["another size", "another name"])
def test_an_interrupted_run_does_not_go_on_with_other_test_images(tmp_path, monkeypatch, capsys, edit):
    """Its table would be of two test sets. The same images with other times, as of a copy, are no others."""
    folder = tmp_path / "pictures"
    labelled(folder)
    killed(tmp_path, monkeypatch, capsys)
    file, table = folder / "599.png", folder / "test.csv"
    pixels, text = file.read_bytes(), table.read_text()
    if edit == "another size":
        Image.new("L", (8, 8), 3).save(file)
    else:
        (folder / "renamed.png").write_bytes(pixels)
        table.write_text(text.replace("599.png", "renamed.png"))
    with pytest.raises(ValueError, match="one: the test images are not those that this run began with"):
        ran(tmp_path, "one", capsys)
    file.write_bytes(pixels), table.write_text(text)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert ran(tmp_path, "one", capsys)[0]


def test_images_in_memory_that_are_measured_on_count_by_all_their_pixels():
    def digests(value):
        images = torch.zeros(200, 1, 2, 2, dtype=torch.uint8)
        images[101] = value
        part, train = (Part(InMemory(images.clone(), torch.zeros(200)), torch.arange(200)) for _ in range(2))
        held_out = replace(train, ids=torch.arange(50))
        return measured_on(Data("d", train, held_out, part, ["a"], (0.0,), (1.0,), (1, 2, 2), 200, None))

    assert set(digests(0)) == {
        "test"
    }  # the fingerprint has the training images, which those held out are among
    assert digests(0) == digests(0) != digests(1)
