"""`trainer run RECIPE --dry-run`: a few steps of every stage, the plan of the whole, and nothing left behind."""

import json
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.datasets.files import small_image_folder
from trainer.cli import main
from trainer.data.batches import make_data
from trainer.datasets.image_folder import image_folder
from trainer.recipe import shelves, shipped
from trainer.recipe.keys import DataKeys
from trainer.recipe.recipe import read
from trainer.reporting.tables import duration
from trainer.runs import dry_run
from trainer.runs.dry_run import STEPS, Timed, chosen_images, learning_seconds, store_bytes

LOSSES = [{"loss": "kl"}]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))

    def write(**changes):
        content = {
            "name": "plan",
            "data": {"dataset": "digits", "augment": {"shift": 1}, "views": 3, "subset": 400},
            "teacher": {"model": "lenet300", "hidden": [20]},
            "student": {"model": "lenet300", "hidden": [5]},
            "stages": [
                {"stage": "train", "who": "teacher", "training": {"epochs": 7, "batch_size": 50}},
                {
                    "stage": "distill",
                    "training": {"epochs": 400, "batch_size": 50, "warmup": 5},
                    "losses": LOSSES,
                },
                {"stage": "prune", "method": "magnitude", "sparsity": 0.5},
                {"stage": "pack"},
            ],
        } | changes
        (tmp_path / "plan.yaml").write_text(json.dumps(content))
        return "plan.yaml"

    return write


def test_the_plan_has_a_row_for_each_stage_and_nothing_stays(recipe, tmp_path, capsys):
    for cache in ("disk", None):
        name = recipe(**({"cache": cache} if cache else {}))
        before = sorted(tmp_path.rglob("*"))
        assert main(["run", name, "--dry-run"]) == 0
        said = capsys.readouterr()
        rows = {line.split()[0]: line for line in said.out.splitlines() if line}
        assert list(rows)[2:8] == ["opening", "train", "distill", "prune", "pack", "all"]
        assert " 7 " in rows["train"] and " 400 " in rows["distill"]
        assert "400 training, 144 validation and 360 test images" in said.out
        assert f"the teacher's answers take 0.2 MiB {'on disk' if cache else 'in memory'}" in said.out
        assert "top-1" not in said.out + said.err and "timing stage 2/4: distill" in said.err
        assert sorted(tmp_path.rglob("*")) == before


def test_the_time_of_new_and_kept_answers_adds_up():
    assert learning_seconds(1000, 10, 100.0, 500.0, 4) == pytest.approx(4 * 10 + 6 * 2)
    assert learning_seconds(1000, 3, 100.0, 500.0, 4) == pytest.approx(30)


@pytest.mark.parametrize("labelled", [[1], [1, 2, 5], range(0, 1000, 2), range(1, 1000)])
def test_of_partly_labelled_images_both_kinds_are_timed(labelled):
    labels = torch.full((1000,), -1)
    labels[list(labelled)] = 3
    chosen = chosen_images(labels, STEPS * 8)
    num_labelled = int((labels[chosen] >= 0).sum())
    assert len(chosen.unique()) == len(chosen) == STEPS * 8
    assert min(8, len(labelled)) <= num_labelled < len(chosen)


@pytest.mark.parametrize("label", [-1, 0])
def test_of_images_that_are_alike_evenly_spaced_ones_are_timed(label):
    assert chosen_images(torch.full((9,), label), 3).tolist() == [0, 4, 8]
    assert chosen_images(torch.full((9,), label), 30).tolist() == list(range(9))


def test_a_stage_train_takes_as_long_as_its_labelled_images(recipe, monkeypatch):
    """20 of 400 images have labels, and one is learnt in a second."""
    training = {"epochs": 2, "batch_size": 50}
    name = recipe(
        data={"dataset": "digits", "subset": 400, "labelled": 20},
        stages=[
            {"stage": "train", "who": "teacher", "training": training},
            {"stage": "train", "training": training},
            {"stage": "distill", "training": training, "losses": LOSSES},
        ],
    )
    keys, _ = read(name)
    data = make_data(keys.data, torch.device("cpu"))
    timed = [Timed(1, 1.0, 1.0, 0.0, 0, 1e9, 0)] * 3
    rows = dry_run._plan(keys, data, 0.0, timed, 0, 0).splitlines()[3:6]
    for row, seconds in zip(rows, (40, 40, 800), strict=True):
        assert f" {duration(seconds)} " in row

    # Of 0.2 s the labelled images' three epochs take 0.06; all images' would take 1.2, and nothing would be left.
    logs = iter([[], [{"epoch": n, "images_per_second": 1000.0} for n in range(3)]])
    monkeypatch.setattr(dry_run, "read_log", lambda _: next(logs))
    monkeypatch.setattr(dry_run, "find", lambda *_: lambda *_, **__: time.sleep(0.2))
    monkeypatch.setattr(dry_run, "answered", lambda *_: (torch.zeros(1), None))
    run = types.SimpleNamespace(
        folder=Path(), rows=[], data=data, cache=None, num_fits=1, teacher=None,
        accelerator=types.SimpleNamespace(device=torch.device("cpu")), student=torch.nn.Identity(),
    )  # fmt: skip
    assert dry_run._timed(run, keys.stages[1]).rest_seconds > 0.1


def test_mistakes_are_told_as_in_a_run(recipe, capsys):
    name = recipe(student={"model": "lenet999"})
    assert main(["run", name, "--dry-run"]) == 2
    assert "lenet999" in capsys.readouterr().err
    assert main(["run", recipe(), "--dry-run", "--fresh"]) == 2
    assert "no effect with --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("augment", [{}, {"random_resized_crop": {}}])
def test_what_the_store_will_take(tmp_path, monkeypatch, augment):
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))
    settings = small_image_folder(None, tmp_path / "photos") | {
        "workers": 0,
        "validation": 3,
        "augment": augment,
    }
    for store, whole in (("off", 0), ({"short_side": 12}, 12 * 12 * 4 // 3)):
        keys = shelves.checker(image_folder, DataKeys).model_validate(
            settings | {"dataset": "image_folder", "store": store}
        )
        train = whole if augment else 8 * 8 * bool(whole)
        assert store_bytes(make_data(keys, torch.device("cpu"))) == 3 * (3 * train + 9 * 8 * 8 * bool(whole))


@pytest.mark.slow
def test_imagenets_shape_is_planned(tmp_path, monkeypatch, capsys):
    """The shipped recipe on 1,000 classes of three pictures, smaller networks without weights, in small batches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 1)):
        for number in range(1000):
            folder = tmp_path / "imagenet" / part / f"n{number:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    recipe = yaml.safe_load(shipped.find("imagenet_to_mobilenet").read_text())
    recipe["data"] |= {"size": 64, "workers": 0}
    recipe["teacher"] = {"model": "timm/resnet18", "pretrained": False}
    recipe["student"] = {"model": "timm/mobilenetv3_small_050"}
    recipe["precision"] = "no"
    recipe["stages"].insert(0, {"stage": "train", "who": "teacher", "training": {"epochs": 1}})
    for stage in recipe["stages"]:
        if "training" in stage:
            stage["training"]["batch_size"] = 8
    (tmp_path / "small.yaml").write_text(json.dumps(recipe))
    assert main(["run", "small.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2,000 training, 1,000 validation and 1,000 test images" in said and " 300 " in said
    assert "the store of decoded pictures takes about" in said


def test_a_gpu_is_waited_for_before_its_time_is_taken(recipe, monkeypatch):
    waited = []
    found = types.SimpleNamespace(cpu=lambda: waited.append(time.monotonic()))
    monkeypatch.setattr(dry_run, "answered", lambda *_: (found, None))
    dry_run.dry_run(recipe())
    assert len(waited) >= 2
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 7)
    assert dry_run._peak_bytes(torch.device("cpu")) > 7 and not asked  # on a machine with a GPU too
    assert dry_run._peak_bytes(torch.device("cuda")) == 7
