"""A teacher of larger images sees the same views as the student, read from the pictures themselves."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from trainer.data.batches import make_data
from trainer.data.views import Views
from trainer.distillation.answer_space import size_text
from trainer.distillation.answers import Answers
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.recipe import shelves
from trainer.recipe.keys import CacheKeys, DataKeys, TeacherKeys, TermKeys
from trainer.runs import runner
from trainer.runs.dry_run import dry_run, store_bytes

SMALL, LARGE = 16, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of smooth pictures of 64 x 64, and in each a fine texture that 16 x 16 pixels cannot show."""
    root = tmp_path_factory.mktemp("smooth")
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:LARGE, 0:LARGE] / LARGE
    for part, count in (("train", 10), ("test", 2)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                waves = [np.sin(2 * np.pi * (random.random() + random.integers(1, 3) * c)) for c in (x, y)]
                picture = np.stack([waves[0], waves[1], waves[0] * waves[1]], 2) * 60 + 120
                picture += 30 * np.cos(np.pi * np.arange(LARGE) * (1 if name == "a" else 0.9))[:, None, None]
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(
                    root / part / name / f"{number}.png"
                )
    return root


def data_of(folder, **more):
    keys = shelves.checker(shelves.find("dataset", "image_folder"), DataKeys)
    settings = {"dataset": "image_folder", "folder": folder, "size": SMALL, "workers": 0, "validation": 4}
    return make_data(keys.model_validate(settings | more), torch.device("cpu"))


def test_the_data_at_a_size_are_its_own_pictures_at_that_size(folder):
    data = data_of(folder)
    large = data.at_size(LARGE)
    assert large.shape == (3, LARGE, LARGE) and large.zoom == 4 and data.shape == (3, SMALL, SMALL)
    for part in ("train", "validation", "test"):
        one, other = getattr(data, part), getattr(large, part)
        assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
        position = int(one.ids[0])
        picture = np.array(Image.open(one.images.files[position]).convert("RGB"))
        assert torch.equal(other.__getitems__([0])[0][0], torch.from_numpy(picture).permute(2, 0, 1))
    assert data.at_size(SMALL) is data and data.at_size(None) is data


def test_images_without_pictures_stay_as_they_are():
    keys = shelves.checker(shelves.find("dataset", "digits"), DataKeys)
    data = make_data(keys.model_validate({"dataset": "digits"}), torch.device("cpu"))
    assert data.at_size(32) is data


GEOMETRY = [
    {"flip": True, "shift": 3},
    {"rotate": 20, "scale": 0.1, "shear": 10},
    {"elastic": 1.5, "shift": 2},
    {"brightness": 0.3, "contrast": 0.3},
    {"random_resized_crop": {}, "flip": True, "shift": 1},
    {"saturation": 0.5, "hue": 0.2, "grayscale": 0.3, "blur": 1},
]


@pytest.mark.parametrize("augment", GEOMETRY, ids=["moved", "turned", "warped", "light", "cut", "colour"])
def test_a_view_shows_the_same_at_two_sizes(folder, augment):
    data = data_of(folder, augment=augment)
    index = data.train.ids
    small, large = Views(data).of(index, 3), Views(data.at_size(LARGE)).of(index, 3)
    shown = functional.interpolate(large, size=(SMALL, SMALL), mode="bilinear", antialias=True)
    other = Views(data).of(index, 4)
    apart, views_apart = (shown - small).abs().mean(), (other - small).abs().mean()
    assert apart < 0.025 < views_apart / 2  # stored pictures are smaller than the originals


def test_the_erased_rectangle_is_the_same_at_two_sizes(folder):
    data = data_of(folder, augment={"erase": 1.0})
    small, large = (Views(d).of(d.train.ids, 0) == 0 for d in (data, data.at_size(LARGE)))
    areas = [erased.all(1).double().mean((1, 2)) for erased in (small, large)]
    assert (areas[0] - areas[1]).abs().max() < 0.08 and areas[1].min() > 0.01


class Seeing(nn.Module):
    """A teacher that notes what it is shown."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.shown = []

    def forward(self, x):
        self.shown.append(x.detach().clone())
        return self.fc(x.mean((2, 3)))


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * SMALL**2, 2)

    def forward(self, x):
        return self.fc(x.flatten(1))


def teacher_of(data, network, size=LARGE):
    keys = TeacherKeys(model="python:x:y", resize=size, mean=[0, 0, 0], std=[1, 1, 1])
    return Teacher([network], [keys], data.mean, data.std, specs=[{}], shape=data.shape)


@pytest.mark.parametrize("kept", [False, True], ids=["live", "kept"])
def test_the_teacher_of_a_training_is_shown_the_pictures(folder, tmp_path, kept):
    data = data_of(folder, augment={"flip": True, "shift": 2}, views=2)
    network = Seeing()
    teacher = teacher_of(data, network)
    cache = Answers(teacher, data, tmp_path, CacheKeys()) if kept else None
    objective = Objective(Student(), [TermKeys(loss="kl")], data, teacher, cache=cache)
    images, labels, index = data.train.__getitems__(torch.arange(5))
    expected = Views(data.at_size(LARGE)).of(index, 1)
    network.shown.clear()
    for _ in range(2):
        objective(Views(data).augmented(images, index, 1), labels, index, 1)
    assert len(network.shown) == (1 if kept else 2)
    assert all(torch.equal(shown, expected) for shown in network.shown)
    if cache is not None:
        assert cache.check() == 5


def test_kept_answers_to_enlarged_pixels_are_not_taken_for_those_to_pictures(folder, tmp_path, monkeypatch):
    data = data_of(folder)
    teacher = teacher_of(data, Seeing())
    with monkeypatch.context() as patch:
        patch.setattr(type(data), "at_size", lambda self, *_: self)
        before = Answers(teacher, data, tmp_path, CacheKeys())
    after = Answers(teacher, data, tmp_path, CacheKeys())
    assert before.file.folder != after.file.folder


def test_kept_answers_to_pictures_that_were_changed_in_place_are_not_taken(folder, tmp_path):
    """Of equal size, so that only the time of change tells; and one of the sample by its pixels, whatever the time."""
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    for path in own.rglob("*.png"):  # of one size, whatever the pixels
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()

    def answers(**more):
        data = data_of(own, **more)
        return Answers(teacher_of(data, network), data, tmp_path / "kept", CacheKeys()).file.folder.name

    network, path = Seeing(), own / "train" / "a" / "3.bmp"
    before, time = answers(), path.stat().st_mtime
    assert answers() == answers(subset=8) == before
    os.utime(path, (time + 5, time + 5))
    touched = answers()
    Image.new("RGB", (LARGE, LARGE), "red").save(path)
    os.utime(path, (time, time))
    assert len({before, touched, answers()}) == 3


def test_a_network_without_resize_beside_a_larger_one_sees_the_data_s_size(folder):
    data = data_of(folder)
    networks = [Seeing(), Seeing()]
    keys = [
        TeacherKeys(model="python:x:y", resize=size, mean=[0, 0, 0], std=[1, 1, 1]) for size in (LARGE, None)
    ]
    teacher = Teacher(networks, keys, data.mean, data.std, specs=[{}, {}], shape=data.shape)
    assert teacher.size == LARGE
    teacher.see(Views(data.at_size(LARGE)).of(data.train.ids[:3], 0))
    assert [network.shown[-1].shape[-1] for network in networks] == [LARGE, SMALL]


RECIPE = """name: x
data: {{dataset: image_folder, folder: {folder}, size: 16, workers: 0, validation: 4{more}}}
teacher: {{model: "python:tests.distillation.test_pictures:seeing", resize: 64, mean: [0, 0, 0], std: [1, 1, 1]}}
student: {{model: lenet5, width: 2}}
stages:
  - {{stage: train, who: teacher, training: {{epochs: 1, batch_size: 8, lr: 1e-9}}}}
  - {{stage: distill, training: {{epochs: 1, batch_size: 8}}, losses: [{{loss: kl}}]}}
allow_untrained: true
"""


def seeing(input_shape, num_classes) -> nn.Module:
    """A teacher that notes what it is shown; the last one made is `seeing.last`."""
    seeing.last = Seeing()
    return seeing.last


@pytest.mark.parametrize("more", ["", ", mixup: 1.0", ", cutmix: 1.0"], ids=["plain", "mixup", "cutmix"])
def test_a_run_shows_it_to_the_teacher_wherever_it_looks(folder, tmp_path, monkeypatch, more):
    """Fine texture tells the classes, and is not in the student's pixels, so enlarged ones lack it."""
    from tests import making

    making.leave_plots_out(monkeypatch)
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE.format(folder=folder, more=more))
    runner.run(path, folder=tmp_path, allow_python=True)
    # Without the rehearsals, whose images are few or black.
    shown = [images for images in seeing.last.shown if len(images) >= 4 and images.any()]
    assert len(shown) >= 6  # two batches, the validation, the test, and as the teacher of the next stage
    for images in shown:
        assert images.shape[1:] == (3, LARGE, LARGE)
        texture = (images[:, :, 1:] - images[:, :, :-1]).abs().mean()
        assert texture > 0.05


def test_mixed_batches_are_mixed_alike_at_two_sizes(folder, tmp_path, monkeypatch):
    from trainer.training import fit as fitting

    seen = []
    real = fitting._mixed_alike

    def watched(*arguments):
        before = torch.get_rng_state()
        seen.append(real(*arguments))
        assert torch.equal(torch.get_rng_state(), before)
        return seen[-1]

    monkeypatch.setattr(fitting, "_mixed_alike", watched)
    forward = Objective.forward
    batches = []

    def noting(self, images, *rest):
        if self.pictures is not None and self.mixed_pictures is not None:
            batches.append(images.clone())
        return forward(self, images, *rest)

    monkeypatch.setattr(Objective, "forward", noting)
    from tests import making

    making.leave_plots_out(monkeypatch)
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE.format(folder=folder, more=", mixup: 1.0"))
    runner.run(path, folder=tmp_path, allow_python=True)
    assert len(seen) == 3 and len(batches) == 2  # the first batch is weighed too
    assert torch.equal(seen[0], seen[1])
    seen = seen[1:]
    for large, small in zip(seen, batches, strict=True):
        shown = functional.interpolate(large, size=(SMALL, SMALL), mode="bilinear", antialias=True)
        assert (shown - small).abs().mean() < 0.03 < (shown.flip(0) - small).abs().mean()


TAUGHT = """name: {name}
data: {{dataset: image_folder, folder: {folder}, size: 16, workers: 0, validation: 4}}
teacher: {{model: lenet5, width: 2{teacher}}}
student: {{model: lenet5, width: 2}}
stages: [{stages}]
allow_untrained: true
"""


def test_the_size_that_a_checkpoint_recorded_is_the_teacher_s(folder, tmp_path, monkeypatch):
    from tests import making

    making.leave_plots_out(monkeypatch)
    distil = "{stage: distill, training: {epochs: 1}, losses: [{loss: kl}]}"
    teach = "{stage: train, who: teacher, training: {epochs: 40, batch_size: 8, lr: 5e-3}}"
    rows, notes = [], []
    for name, teacher, stages in (
        ("first", ", resize: 64", f"{teach}, {distil}"),
        ("second", ", checkpoint: {file}", distil),
    ):
        file = next(tmp_path.glob("first/checkpoints/01-distill/*/teacher-0.safetensors"), None)
        path = tmp_path / f"{name}.yaml"
        given = teacher.format(file=file)
        path.write_text(TAUGHT.format(name=name, folder=folder, teacher=given, stages=stages))
        report = runner.run(path, folder=tmp_path)
        rows.append([row["top1"] for row in report["rows"] if row["stage"] == "teacher"])
        notes = report["data"]
    assert rows[0] == rows[1] == [100.0]
    assert (
        "teacher lenet5: sees images of 64 x 64 pixels, as it was trained on (resize in the recipe decides)"
        in notes
    )


def test_stretched_pictures_are_told_and_the_teachers_store_is_counted(folder, tmp_path):
    path = tmp_path / "x.yaml"
    stages = "{stage: train, who: teacher, training: {epochs: 1}}"
    for size, stretched in (("[16, 12]", True), ("16", False)):
        text = TAUGHT.format(name="x", folder=folder, teacher=", resize: 64", stages=stages)
        path.write_text(text.replace(" size: 16,", f" size: {size},"))
        with runner.begun(path, 0, {}, tmp_path / size) as run:
            told = "teacher lenet5: sees the pictures stretched to 64 x 64, because the student's are 16 high and 12 wide"
            assert (told in run.data.notes) == stretched
            own, larger = store_bytes(run.data), store_bytes(run.teacher.images_of(run.data))
    assert larger > 4 * own > 0
    assert f"the store of decoded pictures takes about {size_text(own + larger)} on disk" in dry_run(path)
