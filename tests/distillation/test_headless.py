"""Teachers whose answers are no logits of the data's classes: `head: false`, embeddings and maps alone."""

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import trainer
from tests.distillation.test_objective import SIZE, K, Small, some_data, term
from trainer.cli import main
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.networks import features
from trainer.recipe.keys import TeacherKeys
from trainer.reporting import report
from trainer.storage import checkpoint

VIT = {"model": "timm/vit_tiny_patch16_224", "img_size": 16}
VIT |= {"options": {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}}
TRAINING = {"epochs": 2, "batch_size": 30, "lr": 1e-2}


def plain(width=6):
    """An embedding network: its last Linear layer is inside, and its answer is the embedding."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, width), nn.ReLU())


def other_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 8), nn.ReLU(), nn.Linear(8, K + 3))


def objective(teacher, *losses):
    torch.manual_seed(0)
    data = some_data()
    keys = TeacherKeys(model="lenet5", head=False)
    made = Objective(
        Small(), [term(**keys) for keys in losses], data, Teacher([teacher], [keys], data.mean, data.std)
    )
    made.rehearse(data)
    return made


def test_an_embedding_is_what_goes_into_the_classifier_or_the_answer_itself():
    images = torch.randn(3, 1, SIZE, SIZE)
    net = plain()
    assert torch.equal(features.see(net, images, embedding=True, head=False).embedding, net(images))
    net = other_classes()
    seen = features.see(net, images, embedding=True, head=False)
    assert torch.equal(seen.embedding, net[:3](images)) and torch.equal(seen.logits, net(images))
    without = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1))
    assert features.see(without, images, embedding=True, head=False).embedding.shape == (3, 2)


@pytest.mark.parametrize("network", [plain, other_classes])
def test_losses_on_embeddings_and_maps(network):
    teacher = network()
    made = objective(teacher, {"loss": "correlation"}, {"loss": "hint", "at": {"two": "1"}})
    images, index = torch.rand(4, 1, SIZE, SIZE), torch.arange(4)
    terms = made(images, torch.zeros(4, dtype=torch.int64), index)
    assert math.isfinite(terms["loss"].item()) and terms["correlation"].item() > 0
    terms["loss"].backward()
    assert made.student.one.weight.grad.any() and all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("loss", ["kl", "reuse_classifier", "one_for_all"])
def test_a_loss_that_asks_for_its_logits_is_refused(loss):
    with pytest.raises(
        ValueError, match=f"loss '{loss}' asks for the teacher's logits, and the teacher has none"
    ):
        objective(plain(), {"loss": loss})


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(report, "write", lambda folder, *_: (folder / "report.json").write_text("{}"))


@pytest.fixture
def recipe(tmp_path):
    """A vision transformer without a classifier, as self-supervised ones are saved, teaches on unlabelled terms."""
    from trainer.networks.build import build

    torch.manual_seed(0)
    network = build(VIT, (1, 16, 16), 7)
    state = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("head.")}
    safetensors.torch.save_file(state, tmp_path / "vit.safetensors")
    return {
        "name": "x",
        "data": {"dataset": "digits", "subset": 90, "validation": 60, "size": 16},
        "teacher": VIT | {"checkpoint": str(tmp_path / "vit.safetensors"), "head": False},
        "student": {"model": "lenet5", "width": 2},
        "stages": [
            {
                "stage": "distill",
                "training": TRAINING,
                "losses": [{"loss": "correlation"}, {"loss": "hint", "at": "last"}],
            },
            {"stage": "train", "training": TRAINING},
            {"stage": "pack"},
        ],
    }


def written(folder, recipe):
    (folder / "x.yaml").write_text(json.dumps(recipe))
    return str(folder / "x.yaml")


def test_a_run_has_no_row_of_such_a_teacher_and_no_agreement(recipe, tmp_path, no_report, capsys):
    path = written(tmp_path, recipe)
    assert main(["check", "--build", path]) == 0
    found = trainer.run(path, folder=tmp_path)
    assert [row["stage"] for row in found["rows"]] == ["distilled", "trained", "decoded"]
    assert all(row["agreement"] is None and row["ratio_teacher"] > 1 for row in found["rows"])
    assert "answers are kept" in capsys.readouterr().out


def test_a_report_is_written(recipe, tmp_path, plots):
    recipe["stages"] = recipe["stages"][:1]
    trainer.run(written(tmp_path, recipe), folder=tmp_path)
    assert "distilled" in (tmp_path / "x/report.md").read_text()
    assert (tmp_path / "x/report.html").is_file()


def with_stage(recipe, stage):
    return recipe | {"stages": [stage, *recipe["stages"]]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda r: with_stage(r, {"stage": "distill", "training": TRAINING, "losses": [{"loss": "kl"}]}),
            "stages[0].losses[0]: loss 'kl' asks for the teacher's logits, and the teacher has head: false",
        ),
        (
            lambda r: with_stage(r, {"stage": "train", "who": "teacher", "training": TRAINING}),
            "stages[0]: trains the teacher on labels, and head: false leaves its classifier out",
        ),
        (
            lambda r: r | {"teacher": r["teacher"] | {"classes": list(range(10))}},
            "teacher.classes: has no effect with head: false",
        ),
        (
            lambda r: (
                {k: v for k, v in r.items() if k != "teacher"} | {"teachers": [r["teacher"], r["teacher"]]}
            ),
            "teachers[0].head: false is for one teacher",
        ),
    ],
)
def test_check_tells_what_cannot_be(change, told, recipe, tmp_path, capsys):
    assert main(["check", written(tmp_path, change(recipe))]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("keep", "best"), ("patience", 2)])
def test_nothing_is_chosen_by_validation_images_without_labels(key, value, recipe, tmp_path):
    random = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "pictures" / ("train" if number < 20 else f"test/{'ab'[number % 2]}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16), np.uint8)).save(folder / f"{number}.png")
    recipe["data"] = {
        "dataset": "image_folder",
        "folder": str(tmp_path / "pictures"),
        "size": 16,
        "channels": 1,
        "validation": 6,
    }
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0]["training"] = TRAINING | {"epochs": 5, key: value}
    with pytest.raises(
        ValueError, match=f"training.{key}: chooses by the validation images, of which none has a label"
    ):
        trainer.run(written(tmp_path, recipe), folder=tmp_path)


def test_a_linear_probe_is_a_trained_head_and_teaches(recipe, tmp_path, no_report):
    """`train_only: head` on the same weights: the classifier is new, all else stays; then its logits can be had."""
    teacher = {key: value for key, value in recipe["teacher"].items() if key != "head"}
    stages = [
        {"stage": "train", "who": "teacher", "training": TRAINING | {"epochs": 4, "train_only": "head"}},
        {"stage": "distill", "training": TRAINING, "losses": [{"loss": "kl"}]},
    ]
    found = trainer.run(written(tmp_path, recipe | {"teacher": teacher, "stages": stages}), folder=tmp_path)
    assert [row["stage"] for row in found["rows"]] == ["teacher", "distilled"]
    assert found["rows"][1]["agreement"] is not None
    probed = checkpoint.load(tmp_path / "x/checkpoints/00-train")[0]["teacher-0"]
    before = safetensors.torch.load_file(tmp_path / "vit.safetensors")
    assert probed["head.weight"].any() and set(probed) - set(before) == {"head.weight", "head.bias"}
    assert all(torch.equal(tensor, probed[key]) for key, tensor in before.items())


def test_in_python_an_embedding_network_teaches():
    images = [torch.randn(8, 1, SIZE, SIZE) for _ in range(3)]
    student = Small()
    found = trainer.distill(student, plain(), images, losses=["relational"], epochs=2, lr=0.01)
    assert found[1]["relational"] < found[0]["relational"]
    with pytest.raises(ValueError, match="the teacher knows 6 classes and the data has 4"):
        trainer.distill(student, plain(), images, losses=["kl"], epochs=1)
