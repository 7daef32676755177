"""What is known of the images that a loaded network was trained on: taken in order, measured once, and said."""

import json

import pytest
import torch
from torch import nn

from tests import making
from trainer.data.batches import make_data
from trainer.models.lenet5 import lenet5
from trainer.recipe import shelves
from trainer.recipe.keys import DataKeys, ModelKeys, TeacherKeys
from trainer.recipe.recipe import read
from trainer.runs import known, runner
from trainer.runs.known import known_looks, known_size, looks_of
from trainer.runs.opening import make_teacher
from trainer.runs.pairs import pairs
from trainer.training.weights import Made

LOADED = TeacherKeys.model_construct(model="x", checkpoint="x.pth")


def made(facts=None, config=None, new_head=False):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    network.pretrained_cfg = config
    return Made(network, {}, facts or {}, [], new_head)


OURS = {"mean": [0.1], "std": [0.2]}
TIMMS = {"mean": (0.3,), "std": (0.4,)}


def test_our_own_record_comes_before_timms_configuration_and_that_only_for_loaded_networks():
    assert known_looks(LOADED, made(OURS, TIMMS), 1) == ((0.1,), (0.2,), "its checkpoint")
    assert known_looks(LOADED, made({}, TIMMS), 1) == ((0.3,), (0.4,), "timm")
    assert known_looks(LOADED, made(), 1) is None
    assert known_looks(ModelKeys(model="x"), made({}, TIMMS), 1) is None


def test_grey_and_colour_are_turned_into_each_other():
    colours = {"mean": (0.2, 0.3, 0.7), "std": (0.5, 0.5, 0.5)}
    assert known_looks(LOADED, made({}, colours), 1)[:2] == (pytest.approx((0.4,)), (0.5,))
    assert known_looks(LOADED, made({}, TIMMS), 3)[:2] == ((0.3,) * 3, (0.4,) * 3)
    assert known_looks(LOADED, made({}, colours), 2) is None


@pytest.mark.parametrize(
    "facts, size",
    [({"shape": [1, 16, 16]}, 16), ({"shape": [1, 8, 8]}, None), ({"shape": [1, 16, 12]}, None), ({}, None)],
)
def test_the_size_is_known_where_it_differs_from_the_data_s(facts, size):
    assert known_size(facts, "shape", (1, 8, 8)) == size


@pytest.fixture
def data():
    keys = shelves.checker(shelves.find("dataset", "digits"), DataKeys)
    return make_data(keys.model_validate({"dataset": "digits"}), torch.device("cpu"))


@pytest.mark.parametrize(
    "source, known_right, own_right, taken",
    [
        ("timm", 90.0, 50.0, "timm"),
        ("timm", 50.0, 50.0, "timm"),
        ("timm", 50.0, 90.0, "the data"),  # a foreign file: timm's configuration is a guess
        ("its checkpoint", 50.0, 90.0, "its checkpoint"),
    ],
)
def test_both_are_measured_and_said_once_in_a_run(
    tmp_path, monkeypatch, data, source, known_right, own_right, taken
):
    measured = []

    def right(network, size, filter, data, looks):
        measured.append(looks)
        return own_right if looks.source == "the data" else known_right

    monkeypatch.setattr(known, "_percent_right", right)
    network = made(OURS) if source == "its checkpoint" else made({}, TIMMS)
    for _ in range(2):
        looks, notes = looks_of(LOADED, network, data, "teacher x", tmp_path)
        assert notes == [
            f"teacher x: {known_right:.2f} % of the validation images right with {source}'s mean and std, "
            f"{own_right:.2f} % with the data's: {taken}'s are taken (mean and std in the recipe decide)"
        ]
        assert (None if looks is None else looks.source) == (None if taken == "the data" else taken)
    assert len(measured) == 2
    with torch.no_grad():
        network.network[1].bias += 1
    looks_of(LOADED, network, data, "teacher x", tmp_path)
    assert len(measured) == 4
    (tmp_path / "normalisation.json").write_text("damaged")
    looks_of(LOADED, network, data, "teacher x", tmp_path)
    assert len(measured) == 6


def test_what_cannot_be_measured_is_taken_and_said(tmp_path, monkeypatch, data):
    monkeypatch.setattr(known, "_percent_right", None)
    looks, notes = looks_of(LOADED, made({}, TIMMS, new_head=True), data, "x", tmp_path)
    assert looks == ((0.3,), (0.4,), "timm")
    assert notes == ["x: mean 0.3 and std 0.4 are timm's, not the data's"]
    assert looks_of(LOADED, made(OURS), data, "x", None)[0] == ((0.1,), (0.2,), "its checkpoint")


def test_the_measure_is_of_the_network_as_it_is(tmp_path, data):
    """A network that answers by its first pixel's sign is right where the normalisation puts it."""

    class Sign(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            bright = (x.mean((1, 2, 3)) * self.scale > 0).float()
            return torch.stack([bright, 1 - bright, *[bright * 0 - 1] * 8], 1)

    network = Made(Sign().train(), {}, {"mean": [2.0], "std": [1.0]}, [])
    labels = data.validation.labels
    _, [note] = looks_of(LOADED, network, data, "x", tmp_path)
    dark = (labels == 1).double().mean().item() * 100  # with a mean of 2 every image is dark: class 1
    assert f"x: {dark:.2f} % of the validation images right with its checkpoint's" in note
    assert network.network.training and network.network.scale.requires_grad


DATA = "data: {dataset: digits, subset: 400, validation: 200"
LENET = "model: lenet5, width: 4"


def test_a_student_and_a_teacher_see_images_as_their_checkpoint_recorded(tmp_path, monkeypatch):
    making.leave_plots_out(monkeypatch)
    first = f"""name: first
{DATA}, mean: [0.9], std: [0.15]}}
student: {{{LENET}}}
stages: [{{stage: train, training: {{epochs: 4, batch_size: 40, lr: 5e-3}}}}]
"""
    (tmp_path / "first.yaml").write_text(first)
    row = runner.run(tmp_path / "first.yaml", folder=tmp_path)["rows"][-1]
    [file] = tmp_path.glob("first/checkpoints/00-train/*/student.safetensors")
    second = f"""name: second
{DATA}}}
teacher: {{{LENET}, checkpoint: {file}}}
student: {{{LENET}, checkpoint: {file}}}
stages: [{{stage: distill, training: {{epochs: 1, lr: 1e-12}}, losses: [{{loss: kl}}]}}, {{stage: pack}}]
"""
    path = tmp_path / "second.yaml"
    path.write_text(second)
    report = runner.run(path, folder=tmp_path)
    assert [entry["top1"] for entry in report["rows"]] == [pytest.approx(row["top1"])] * len(report["rows"])
    notes = [note for note in report["data"] if "its checkpoint's are taken" in note]
    assert len(notes) == 1 and notes[0].startswith("student: ")  # the teacher's are then the data's
    assert f"{row['top1_validation']:.2f} % of the validation images right with its checkpoint's" in notes[0]
    assert notes[0] in (tmp_path / "second" / "report.md").read_text()
    assert json.loads((tmp_path / "second" / "normalisation.json").read_text())
    # `trainer pairs` needs no measurement.
    monkeypatch.setattr(known, "_percent_right", None)
    pairs(path)


@pytest.mark.parametrize(
    "facts, config, expected",
    [
        ({"reading": {"filter": "bilinear"}}, {"interpolation": "bicubic"}, "bilinear"),
        ({"reading": {}}, {"interpolation": "bilinear"}, "bicubic"),
        ({}, {"interpolation": "bilinear"}, "bilinear"),
        ({}, {"interpolation": "random"}, None),
    ],
)
def test_the_filter_is_known_likewise(facts, config, expected):
    assert known.known_filter(LOADED, made(facts, config)) == expected
    assert known.known_filter(ModelKeys(model="x"), made({}, config)) is None


@pytest.mark.parametrize(
    "entry, size",
    [("pretrained: true", 16), ("pretrained: true, resize: 12", 12), ("checkpoint: {file}", None)],
)
def test_timms_size_is_taken_with_its_own_weights_only(tmp_path, monkeypatch, entry, size):
    def create(name, *, num_classes, **settings):
        network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), lenet5((1, 8, 8), num_classes, width=2))
        network.pretrained_cfg = {"num_classes": 10, "input_size": (3, 16, 16), **TIMMS}
        return network

    monkeypatch.setattr("timm.create_model", create)
    torch.save(create("", num_classes=10).state_dict(), tmp_path / "x.pth")
    path = tmp_path / "x.yaml"
    path.write_text(
        f"name: x\n{DATA}}}\nteacher: {{model: timm/resnet18, {entry.format(file=tmp_path / 'x.pth')}}}\n"
        f"student: {{{LENET}}}\nstages: [{{stage: distill, training: {{epochs: 1}}, losses: [{{loss: kl}}]}}]\n"
    )
    recipe, _ = read(path)
    teacher, notes = make_teacher(recipe, make_data(recipe.data, torch.device("cpu")))
    assert teacher.size == size and teacher.members[0].mean == TIMMS["mean"]
    assert any("sees images of 16 x 16 pixels" in note for note in notes) == (size == 16)
