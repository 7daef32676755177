"""The views of training images that `trainer show` and a report show."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from trainer import cli
from trainer.data.batches import make_data
from trainer.data.views import Views
from trainer.distillation.teacher import Teacher
from trainer.recipe import shelves
from trainer.recipe.keys import DataKeys, TeacherKeys
from trainer.runs.showing import Shown, picture_of, said, some_views


class ByBrightness(nn.Module):
    """A teacher whose first two classes are dark and bright."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes, self.shown = num_classes, []
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        self.shown.append(x.shape[1:])
        bright = x.mean((1, 2, 3))
        rest = [torch.full_like(bright, -9.0)] * (self.num_classes - 2)
        return torch.stack([10 * (0.35 - bright), 10 * (bright - 0.35), *rest], 1)


def data_of(dataset="digits", **more):
    keys = shelves.checker(shelves.find("dataset", dataset), DataKeys)
    return make_data(keys.model_validate({"dataset": dataset, **more}), torch.device("cpu"))


def teacher_of(data, size=None):
    keys = TeacherKeys(model="python:x:y", mean=[0] * data.shape[0], std=[1] * data.shape[0], resize=size)
    network = ByBrightness(len(data.classes))
    return Teacher([network], [keys], data.mean, data.std, specs=[{}], shape=data.shape), network


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [({}, [0]), ({"augment": {"shift": 1}, "views": 2}, [0, 1]), ({"augment": {"shift": 1}}, [0, 1, 2])],
    ids=["as they are", "two views", "endless views"],
)
def test_twelve_views_with_what_the_teacher_says_of_each(settings, numbers):
    data = data_of(**settings)
    teacher, _ = teacher_of(data)
    shown = some_views(data, teacher)
    assert len(shown) == 12
    chosen = torch.linspace(0, len(data.train) - 1, 12 // len(numbers)).long()
    expected = [Views(data).of(data.train.ids[[at]], view) for at in chosen.tolist() for view in numbers]
    labels = data.train.labels[chosen].repeat_interleave(len(numbers)).tolist()
    for one, view, label in zip(shown, expected, labels, strict=True):
        assert torch.equal(one.picture, (view[0] * 255).round().byte()) and one.label == data.classes[label]
        shares = teacher.see(view).logits.softmax(1)[0]
        assert one.answer == data.classes[int(shares.argmax())] and one.share == pytest.approx(
            shares.max().item()
        )
    assert len({one.answer for one in shown}) > 1


def test_the_teacher_sees_them_in_its_own_size(tmp_path):
    random = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / ("test" if number < 4 else "train") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    data = data_of("image_folder", folder=tmp_path, size=16, validation=2, workers=0, augment="light")
    teacher, network = teacher_of(data, 32)
    shown = some_views(data, teacher)
    assert len(shown) == 12 and {one.picture.shape for one in shown} == {(3, 16, 16)}
    assert set(network.shown) == {(3, 32, 32)}


def test_few_images_without_a_teacher():
    data = data_of(subset=3)
    shown = some_views(data, None)
    assert len(shown) == 3 and all(one.answer is None and one.label is not None for one in shown)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 5, 12])
def test_the_picture(channels, number):
    shown = [Shown(torch.zeros(channels, 8, 6, dtype=torch.uint8), "cat", "dog", 0.876)] * number
    image = Image.open(io.BytesIO(picture_of(shown, "x")))
    assert (
        image.width > 100 and np.asarray(image.convert("L")).min() < 60 < np.asarray(image.convert("L")).max()
    )


def test_what_is_said_below_a_view():
    assert said(Shown(torch.zeros(1, 1, 1), "cat", "dog", 0.876)) == "cat\nteacher: dog 88 %"
    assert said(Shown(torch.zeros(1, 1, 1), None, None, None)) == "unlabelled"
    assert len(said(Shown(torch.zeros(1, 1, 1), "a" * 300, None, None))) == 24


RECIPE = """name: x
data: {dataset: digits, augment: {shift: 1}}
student: {model: lenet5, width: 2}
"""
TAUGHT = """teacher: {model: lenet5, width: 4}
stages:
  - {stage: train, who: teacher, training: {epochs: 1}}
  - {stage: distill, training: {epochs: 1}, losses: [{loss: kl}]}
"""
LABELS = "stages: [{stage: train, training: {epochs: 1}}]\n"


@pytest.mark.parametrize(
    ("rest", "reason"), [(TAUGHT, "the recipe trains its teacher: "), (LABELS, "the recipe has no teacher")]
)
def test_the_command(tmp_path, monkeypatch, capsys, rest, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(RECIPE + rest)
    assert cli.main(["show", "x.yaml"]) == 0
    assert f"views.png (without a teacher's answers: {reason}" in capsys.readouterr().out
    assert (tmp_path / "views.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["show", "x.yaml", "--output", "y/z.png", "--set", "data.augment.shift=9"]) == 2
    assert cli.main(["show", "x.yaml", "--output", "y/z.png"]) == 0 and (tmp_path / "y" / "z.png").exists()
