"""The teacher: where a student starts from it, what it must know, and what both are shown."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from trainer.data.batches import make_data
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher, copy_layers
from trainer.models.lenet5 import lenet5
from trainer.networks import features
from trainer.networks.build import build
from trainer.recipe.keys import TeacherKeys
from trainer.recipe.recipe import read
from trainer.recipe.text import RecipeError
from trainer.runs import opening, runner
from trainer.runs.answers import images_at_once
from trainer.runs.opening import make_teacher
from trainer.storage import checkpoint
from trainer.storage.weights_file import digest, read_file, save_file

DIGITS = "data: {dataset: digits, subset: 100, validation: 60"
DISTILL = (
    "stages: [{stage: distill, training: {epochs: 1, batch_size: 50}, losses: [{loss: kl}, {loss: hint}]}]"
)


def written(folder, text):
    path = folder / "given.yaml"
    path.write_text(text)
    return path


def a_teacher_of(model, shape, **settings):
    """A teacher of random weights."""
    own = {"model": model, **settings}
    torch.manual_seed(0)
    network = build(own, shape, 10)
    return Teacher([network], [TeacherKeys(model=model)], [0.4], [0.3], specs=[own], shape=shape)


# ---- the bits of an answer


@pytest.mark.parametrize(
    ("model", "settings", "layer"),
    [
        ("lenet300", {}, "fc1"),
        ("lenet5", {"width": 20, "batch_norm": True}, "conv2"),
        ("lstm", {}, None),
        ("timm/mobilenetv3_small_050", {}, "blocks.1"),
    ],
)
def test_an_answer_has_the_same_bits_in_whatever_batch_it_is_asked_for(model, settings, layer):
    guide = a_teacher_of(model, (1, 32, 32), **settings)
    images, layers = torch.rand(150, 1, 32, 32), [layer] if layer else []
    guide.at_once = 50
    whole = guide.see(images, layers, embedding=True)
    assert whole.logits.shape == (150, 10)
    for seed, count in enumerate([1, 7, 49, 50, 51, 99, 150]):
        some = torch.randperm(150, generator=torch.Generator().manual_seed(seed))[:count]
        seen = guide.see(images[some], layers, embedding=True)
        assert torch.equal(seen.logits, whole.logits[some])
        assert torch.equal(seen.embedding, whole.embedding[some])
        assert all(torch.equal(seen.maps[name], whole.maps[name][some]) for name in layers)
    guide.at_once = None  # as one batch: the same answers, with other roundings
    torch.testing.assert_close(guide.see(images).logits, whole.logits, rtol=1e-4, atol=1e-4)


def test_a_teacher_is_never_shown_more_or_fewer_than_it_sees_at_once(monkeypatch):
    guide = a_teacher_of("lenet300", (1, 28, 28))
    guide.at_once, real, shown = 20, features.see, []
    monkeypatch.setattr(
        features, "see", lambda n, x, *more, **k: shown.append(len(x)) or real(n, x, *more, **k)
    )
    for count in (1, 20, 21, 60):
        assert guide.see(torch.rand(count, 1, 28, 28)).logits.shape == (count, 10)
    assert shown == [20, 20, 20, 20, 20, 20, 20]


@pytest.mark.parametrize(
    ("batches", "num_processes", "device", "expected"),
    [
        # Of all stages that learn from the teacher: the same wherever a run goes on.
        ([50, 64], 1, "cpu", 64),
        ([128], 1, "cpu", 128),
        ([200, 32], 1, "cpu", 100),
        ([300], 1, "cpu", 100),
        ([64], 2, "cpu", 32),
        ([512], 1, "cuda", 512),
        ([512], 2, "cuda", 256),
    ],
)
def test_how_many_images_a_teacher_sees_at_once(tmp_path, batches, num_processes, device, expected):
    stages = [
        f"{{stage: distill, training: {{epochs: 1, batch_size: {size}}}, losses: [{{loss: kl}}]}}"
        for size in batches
    ]
    labels = "{stage: train, who: teacher, training: {epochs: 1, batch_size: 1000}}"
    text = f"name: x\n{DIGITS}}}\nteacher: {{model: lenet5}}\nstudent: {{model: lenet5}}\nstages: "
    recipe, _ = read(written(tmp_path, f"{text}[{', '.join([labels, *stages])}]\n"))
    assert images_at_once(recipe, num_processes, device) == expected


def test_a_recipe_that_teaches_nobody_asks_its_teacher_for_batches_as_they_come():
    recipe, _ = read(Path(__file__).parents[2] / "recipes/fashion_teacher.yaml")
    assert images_at_once(recipe, 1, "cpu") is None


# ---- a student that starts from the teacher


class Chain(nn.Sequential):
    """Convolutions of these widths, each with its normalisation, then a Linear."""

    def __init__(self, *widths: int, classes: int = 3) -> None:
        layers: list[nn.Module] = []
        for before, after in zip((1, *widths), widths):
            layers += [nn.Conv2d(before, after, 3), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def test_a_student_starts_from_evenly_spaced_layers_and_leading_channels():
    torch.manual_seed(0)
    guide, student = Chain(5, 6, 7, 8, 9), Chain(2, 3, 4)
    for norm in list(guide)[1::3]:
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
    before = student[-1].bias.clone()
    assert copy_layers(student, guide) == 3 * 2 + 3 * 5 + 2
    for mine, theirs in ((0, 0), (3, 6), (6, 12)):  # the first, the middle and the last of five
        ours, wanted = student[mine].weight, guide[theirs].weight
        assert torch.equal(ours, wanted[: ours.shape[0], : ours.shape[1]])
        assert torch.equal(student[mine].bias, guide[theirs].bias[: len(ours)])
        assert torch.equal(student[mine + 1].running_mean, guide[theirs + 1].running_mean[: len(ours)])
    assert torch.equal(student[-1].weight, guide[-1].weight[:, :4])
    assert torch.equal(student[-1].bias, guide[-1].bias) and not torch.equal(student[-1].bias, before)


def test_what_the_teacher_is_too_small_for_stays_as_it_was():
    torch.manual_seed(0)
    guide, student = Chain(2), Chain(4)
    before = student[0].weight.clone()
    copy_layers(student, guide)
    assert torch.equal(student[0].weight[:2], guide[0].weight) and torch.equal(
        student[0].weight[2:], before[2:]
    )


def test_a_run_starts_the_student_from_its_teacher(tmp_path, teacher_file, monkeypatch):
    seen = []
    real = copy_layers
    monkeypatch.setattr(opening, "copy_layers", lambda *nets: (real(*nets), seen.append(nets))[0])
    student = "student: {model: lenet5, width: 2, from_teacher: copy}"
    text = f"name: a\n{DIGITS}}}\nteacher: {{model: lenet5, width: 2, checkpoint: {teacher_file}}}\n{student}\n{DISTILL}\n"
    with runner.begun(written(tmp_path, text), 0, folder=tmp_path) as run:
        assert digest(run.student.state_dict()) == digest(run.teacher.network.state_dict())
    assert len(seen) == 1
    nothing = text.replace("{model: lenet5, width: 2, from", "{model: lstm, hidden: 4, from").replace(
        "name: a", "name: b"
    )
    monkeypatch.setattr(opening, "copy_layers", lambda *nets: 0)
    with pytest.raises(RecipeError, match=r"student.from_teacher: has no effect: no layer of the student"):
        runner.run(written(tmp_path, nothing), folder=tmp_path)


# ---- what a teacher must know


def test_each_of_several_teachers_is_examined(tmp_path, teacher_file):
    torch.manual_seed(0)
    save_file(tmp_path / "fresh.safetensors", lenet5((1, 8, 8), 10, width=2).state_dict())
    entries = [
        f"{{model: lenet5, width: 2, checkpoint: {file}}}"
        for file in (teacher_file, tmp_path / "fresh.safetensors")
    ]
    text = f"name: a\n{DIGITS}}}\nteachers: [{', '.join(entries)}]\nstudent: {{model: lenet5, width: 2}}\n{DISTILL}\n"
    with pytest.raises(
        ValueError,
        match=r"teachers\[1\] has \d+\.\d\d % of the 60 validation images right, and guessing \d+\.\d\d %",
    ):
        runner.run(written(tmp_path, text), folder=tmp_path)
    text = text.replace(entries[1], entries[0].replace("}", ", weight: 3}"))
    result = runner.run(written(tmp_path, text), folder=tmp_path)
    assert [row["stage"] for row in result["rows"]] == ["teacher", "distilled"] and result["rows"][0][
        "top1"
    ] > 40


@pytest.mark.parametrize("recorded", [True, False])
def test_a_file_that_knows_its_classes_is_not_put_in_the_entrys_order(tmp_path, recorded):
    text = f"name: a\n{DIGITS}}}\nstudent: {{model: lenet5, width: 2}}\n"
    text += "stages: [{stage: train, training: {epochs: 6, batch_size: 16, lr: 1e-2}}]\n"
    (own,) = runner.run(written(tmp_path, text), folder=tmp_path)["rows"]
    file = tmp_path / "a" / "checkpoints" / "00-train" / "00000000" / "student.safetensors"
    if not recorded:
        save_file(tmp_path / "bare.safetensors", read_file(file)[0])
        file = tmp_path / "bare.safetensors"
    text = f"name: b\n{DIGITS}}}\nteacher: {{model: lenet5, width: 2, classes: [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]}}\n"
    text += "student: {model: lenet5, width: 2}\nallow_untrained: true\nstages:\n"
    text += f"  - {{stage: train, who: teacher, checkpoint: {file}}}\n"
    text += "  - {stage: distill, training: {epochs: 1}, losses: [{loss: kl}]}\n"
    row = runner.run(written(tmp_path, text), folder=tmp_path)["rows"][0]
    assert own["top1"] > 40 and (row["top1"] == own["top1"] if recorded else row["top1"] < 30)


def test_several_teachers_trainings_are_counted_together(tmp_path):
    text = f"name: a\n{DIGITS}, labelled: 0.25}}\nteachers: [{{model: lenet5, width: 2}}, {{model: lenet5, width: 3}}]\n"
    text += "student: {model: lenet5, width: 2}\nstages:\n"
    text += "  - {stage: train, who: teacher, training: {epochs: 3, batch_size: 16, lr: 1e-2, keep: best}}\n"
    text += "  - {stage: distill, training: {epochs: 2, batch_size: 64}, losses: [{loss: kl}]}\n"
    with runner.begun(written(tmp_path, text), 1, folder=tmp_path) as run:
        data, bar, (row,) = run.data, runner.bar_of(run, read(tmp_path / "given.yaml")[0].stages), run.rows
    labelled = len(data.labelled_alone().train)
    assert 0 < labelled < len(data.train) / 3
    assert [(due.who, due.images) for due in bar._stages] == [
        ("teacher", 2 * 3 * labelled), ("student", 2 * len(data.train)),
    ]  # fmt: skip
    assert row["epochs"] == 3 and row["steps"] == 2 * 3 * -(-labelled // 16)
    assert len(row["best_epoch"]) == len(row["best_validation"]) == 2 and set(row["best_epoch"]) <= {1, 2, 3}
    assert row["images_per_second"] == pytest.approx(2 * 3 * labelled / row["train_seconds"])


def test_a_teacher_of_other_classes_is_refused_before_anything_is_trained(tmp_path):
    save_file(tmp_path / "x.safetensors", lenet5((1, 8, 8), 7, width=2).state_dict())
    text = f"name: a\n{DIGITS}}}\nteacher: {{model: lenet5, width: 2, checkpoint: {tmp_path / 'x.safetensors'}}}\n"
    with pytest.raises(
        ValueError,
        match=r"x.safetensors: does not fit the network: other shapes in the file: fc3.weight 7x28 for 10x28, fc3.bias 7 for 10. Likely cause: it was taught other classes",
    ):
        runner.run(
            written(tmp_path, text + f"student: {{model: lenet5, width: 2}}\n{DISTILL}\n"), folder=tmp_path
        )
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_pretrained_weights_of_other_classes_leave_a_fresh_head(tmp_path, monkeypatch):
    """A stand-in for timm's weights, since tests ask no hub: what it says of them, and a network."""
    text = f"name: a\n{DIGITS}}}\nteacher: {{model: timm/resnet18, pretrained: true}}\nstudent: {{model: lenet5, width: 2}}\n"
    recipe, _ = read(written(tmp_path, text + DISTILL + "\n"))
    data = make_data(recipe.data, torch.device("cpu"))

    def create(name, *, pretrained, num_classes, **settings):
        assert name == "resnet18" and pretrained
        net = lenet5((1, 8, 8), num_classes, width=2)
        net.pretrained_cfg = {"num_classes": known, "mean": (0.25,), "std": (0.5,)}
        return net

    monkeypatch.setattr("timm.create_model", create)
    known = 1000
    with pytest.raises(
        ValueError, match="was trained on 1000 classes and the data has 10: its new head is freshly"
    ):
        make_teacher(recipe, data)
    known = 10
    images, before = torch.rand(2, 1, 8, 8), recipe.model_copy(deep=True)
    prepared = make_teacher(recipe, data)[0].prepare(images)
    assert recipe == before and recipe.teacher.mean is None  # the checked recipe stays what its author wrote
    assert torch.allclose(prepared, (images - 0.25) / 0.5)  # its own normalisation, not the data's
    assert data.mean != (0.25,)


def test_a_teacher_of_removed_channels_is_known_by_its_own_sizes(tmp_path):
    spec = {"model": "lenet5", "width": 2, "resized": {"fc1": [20, 10], "fc2": [28, 20]}}
    full = build({"model": "lenet5", "width": 2}, (1, 8, 8), 10)
    spec["resized"]["fc1"][1] = full.fc1.in_features
    small = build(spec, (1, 8, 8), 10)
    file = tmp_path / "small.safetensors"
    save_file(file, small.state_dict(), {"facts": json.dumps({"net": spec})})
    text = f"name: a\n{DIGITS}}}\nteacher: {{model: lenet5, width: 2, checkpoint: {file}}}\n"
    recipe, _ = read(written(tmp_path, text + f"student: {{model: lenet5, width: 2}}\n{DISTILL}\n"))
    teacher, _ = make_teacher(recipe, make_data(recipe.data, torch.device("cpu")))
    assert teacher.members[0].spec == spec and teacher.network.fc1.out_features == 20


# ---- what both are shown


@pytest.mark.parametrize("mixing", ["mixup: 1.0", "cutmix: 1.0"])
def test_teacher_and_student_see_the_same_mixed_batch(tmp_path, teacher_file, monkeypatch, mixing):
    text = f"name: a\n{DIGITS}, augment: {{shift: 1}}, {mixing}}}\nteacher: {{model: lenet5, width: 2, checkpoint: {teacher_file},"
    text += f" mean: [0], std: [1]}}\nstudent: {{model: lenet5, width: 2}}\n{DISTILL}\n"
    shown = {"student": [], "teacher": []}
    real = features.see

    forward, inside = Objective.forward, []

    def learning(self, *given):
        inside.append(True)
        found = forward(self, *given)
        inside.pop()
        return found

    monkeypatch.setattr(Objective, "forward", learning)  # measuring takes batches of that size too

    def watched(model, images, *asked, **more):
        if (
            inside
            and len(images) == 50
            and any(p.requires_grad for p in model.parameters()) == model.training
        ):
            shown["student" if model.training else "teacher"].append(images)
        return real(model, images, *asked, **more)

    monkeypatch.setattr(features, "see", watched)
    with runner.begun(written(tmp_path, text), 1, folder=tmp_path) as run:
        mean, std = run.data.mean[0], run.data.std[0]
        whole = run.data.train.images.images.float() / 255
    assert len(shown["student"]) == len(shown["teacher"]) == 2  # steps of the epoch
    for ours, theirs in zip(shown["student"], shown["teacher"]):
        assert torch.allclose(ours * std + mean, theirs, atol=1e-6)
        # ... and they were mixed: most are none of the data's own images, moved by a pixel or not.
        own = {image.sum().round(decimals=3).item() for image in whole}
        assert sum(image.sum().round(decimals=3).item() in own for image in theirs) < 40


def test_images_without_labels_teach_with_the_teacher_alone(tmp_path, monkeypatch):
    """From a folder of images to a report: the student is the user's own network."""
    random = np.random.default_rng(0)

    def picture(file, kind):
        pixels = random.integers(0, 90, (12, 12, 3), dtype=np.uint8)
        pixels[:, :, kind] += 120
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)

    for number in range(30):
        picture(tmp_path / "heap" / f"{number}.png", number % 3)
        picture(tmp_path / "known" / "train" / "rgb"[number % 3] / f"{number}.png", number % 3)
    for number in range(12):
        picture(tmp_path / "known" / "test" / "rgb"[number % 3] / f"{number}.png", number % 3)
    data = "data: {dataset: image_folder, folder: FOLDER, test_folder: TEST, size: 12, validation: 9, workers: 0}"
    data = data.replace("TEST", str(tmp_path / "known" / "test"))
    first = data.replace("FOLDER", str(tmp_path / "known" / "train"))
    text = f"name: t\n{first}\nstudent: {{model: lenet5, width: 2}}\n"
    text += "stages: [{stage: train, training: {epochs: 9, batch_size: 7, lr: 1e-2, keep: best}}]\n"
    result = runner.run(written(tmp_path, text), folder=tmp_path, allow_python=True)
    assert result["rows"][-1]["top1"] > 80
    tensors, _ = checkpoint.load(tmp_path / "t" / "checkpoints" / "00-train")
    save_file(tmp_path / "t.safetensors", tensors["student"])

    (tmp_path / "their_own_net.py").write_text(
        "from torch import nn\n\n\n"
        "def build(shape, classes, units):\n"
        "    size = shape[0] * shape[1] * shape[2]\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(size, units), nn.ReLU(), nn.Linear(units, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = f"name: a\n{data.replace('FOLDER', str(tmp_path / 'heap'))}\n"
    text += f"teacher: {{model: lenet5, width: 2, checkpoint: {tmp_path / 't.safetensors'}}}\n"
    text += "student: {model: 'python:their_own_net:build', options: {units: 8}}\nstages:\n"
    text += "  - {stage: distill, training: {epochs: 12, batch_size: 7, lr: 1e-2, keep: best}, losses: [{loss: kl}]}\n"
    result = runner.run(written(tmp_path, text), folder=tmp_path, allow_python=True)
    row = result["rows"][-1]
    assert [r["stage"] for r in result["rows"]] == ["teacher", "distilled"]
    assert row["top1"] > 80 and row["agreement"] > 80 and row["best_validation"] > 80
    wrong = text.replace("{loss: kl}", "{loss: kl}, {loss: cross_entropy}").replace("name: a", "name: b")
    wrong += "  - {stage: prune, sensitivity: 1, training: {epochs: 1}}\n"
    with pytest.raises(RecipeError) as caught:
        runner.run(written(tmp_path, wrong), folder=tmp_path, allow_python=True)
    first, second = str(caught.value).splitlines()
    assert "stages[0].losses[1]: the loss asks for labels, and the training images have none" in first
    assert (
        "stages[1]: learns from labels where no losses are given, and the training images have none" in second
    )


# ---- what it answers on a CPU


def test_a_teacher_that_is_asked_is_laid_out_and_answers_the_same():
    torch.manual_seed(0)
    network = Chain(5, 6)
    for norm in (network[1], network[4]):
        norm.running_mean.normal_()
    guide = Teacher([network], [TeacherKeys(model="chain")], [0.5], [0.5])
    images, before = torch.rand(7, 1, 9, 9), guide.fingerprint()
    with torch.no_grad():
        wanted = network((images - 0.5) / 0.5)
    assert network[3].weight.is_contiguous()
    answers = guide.see(images, ["3"])
    assert (
        network[3].weight.is_contiguous(memory_format=torch.channels_last)
        and not network[3].weight.is_contiguous()
    )
    torch.testing.assert_close(answers.logits, wanted, rtol=1e-5, atol=1e-6)
    assert guide.fingerprint() == before
    network[3].weight = nn.Parameter(
        torch.randn(6, 5, 3, 3), requires_grad=False
    )  # as if it had been taught on
    guide.version += 1
    with torch.no_grad():
        wanted = network((images - 0.5) / 0.5)
    torch.testing.assert_close(guide.see(images).logits, wanted, rtol=1e-5, atol=1e-6)
    assert not network[3].weight.is_contiguous()


@pytest.mark.parametrize(
    "options", [{"norm_layer": "foo"}, {"block": 3}, {"layers": [1]}, {"output_stride": 3}]
)
def test_options_that_timm_trips_over_are_the_users(options):
    with pytest.raises(ValueError, match="model 'timm/resnet18' cannot be built for images"):
        build({"model": "timm/resnet18", "options": options}, (1, 32, 32), 3)
