"""A loss on a second output of the student: DeiT's distillation token, and any network that returns several."""

import copy

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import trainer
from tests.distillation.test_objective import SIZE, K, Small, some_data, term
from trainer.cli import main
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.networks.build import build
from trainer.networks.output import take_output
from trainer.recipe.keys import TeacherKeys

DEIT = {
    "model": "timm/deit_tiny_distilled_patch16_224",
    "img_size": SIZE,
    "options": {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8},
    "output": 0,
}
DEIT_LOSSES = [{"loss": "cross_entropy"}, {"loss": "hard_label", "output": 1}]


class Two(nn.Module):
    """Two classifiers; named outputs in both modes."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = (nn.Linear(n, m) for n, m in ((SIZE * SIZE, 8), (8, K), (8, K)))

    def forward(self, x):
        x = self.body(x.flatten(1)).relu()
        return {"logits": self.first(x), "taught": self.second(x)}


def two():
    net = Two()
    take_output(net, "logits")
    return net


def objective(student, losses=DEIT_LOSSES):
    torch.manual_seed(2)
    data = some_data()
    teacher = Teacher([Small(5)], [TeacherKeys(model="lenet5")], data.mean, data.std)
    made = Objective(student, [term(**keys) for keys in losses], data, teacher)
    made.rehearse(data)
    return made.train()


def batch():
    torch.manual_seed(3)
    return torch.rand(6, 1, SIZE, SIZE), torch.randint(K, (6,)), torch.arange(6)


def test_deits_token_learns_from_the_teacher_and_its_class_token_from_the_labels():
    torch.manual_seed(0)
    student = build(DEIT, (1, SIZE, SIZE), K)
    made = objective(student)
    images, labels, index = batch()
    terms = made(images, labels, index)
    inner = made.prepare(images)
    features = student.forward_head(student.forward_features(inner))
    own, taught = student.train().head, student.head_dist
    tokens = student.forward_features(inner)
    assert torch.equal(features[0], own(tokens[:, 0]))
    answers = made.teacher.see(images).logits.argmax(1)
    assert terms["cross_entropy"].item() == pytest.approx(
        F.cross_entropy(own(tokens[:, 0]), labels).item(), rel=1e-5
    )
    assert terms["hard_label"].item() == pytest.approx(
        F.cross_entropy(taught(tokens[:, 1]), answers).item(), rel=1e-5
    )
    for name, reached, left in (("cross_entropy", own, taught), ("hard_label", taught, own)):
        student.zero_grad()
        made(images, labels, index)[name].backward()
        assert reached.weight.grad.any() and left.weight.grad is None
    # Evaluated, it answers with the mean of both.
    student.eval()
    tokens = student.forward_features(inner)
    torch.testing.assert_close(student(inner), (own(tokens[:, 0]) + taught(tokens[:, 1])) / 2)


@pytest.mark.parametrize(
    "further", [[], [{"loss": "correlation"}], [{"loss": "hint", "at": {"body": "one"}}]]
)
def test_named_outputs_beside_maps_and_embeddings(further):
    student = two()
    made = objective(
        student, [{"loss": "cross_entropy"}, {"loss": "kl", "output": "taught", "temperature": 1}, *further]
    )
    images, labels, index = batch()
    terms = made(images, labels, index)
    hidden = student.body(made.prepare(images).flatten(1)).relu()
    wanted = F.kl_div(
        student.second(hidden).log_softmax(1),
        made.teacher.see(images).logits.softmax(1),
        reduction="batchmean",
    )
    assert terms["kl"].item() == pytest.approx(wanted.item(), rel=1e-4)
    assert terms["cross_entropy"].item() == pytest.approx(
        F.cross_entropy(student.first(hidden), labels).item(), rel=1e-5
    )
    assert len(student._forward_hooks) == 1  # nothing stays


def test_it_packs_and_loads_as_the_network_that_was_measured(tmp_path):
    torch.manual_seed(0)
    student = build(DEIT, (1, SIZE, SIZE), K).eval()
    trainer.pack(student, tmp_path / "x.tiny", (1, SIZE, SIZE), classes=list("abcd"), spec=DEIT)
    same, images = trainer.load(tmp_path / "x.tiny"), torch.rand(3, 1, SIZE, SIZE)
    assert torch.equal(same(images), student(images))


def test_a_copy_learns_the_same():
    """The hook that takes the first output is copied with the network."""
    torch.manual_seed(0)
    student = two()
    images, labels, index = batch()
    losses = [objective(net)(images, labels, index)["loss"] for net in (student, copy.deepcopy(student))]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("student", "losses", "told"),
    [
        (lambda: Small(), DEIT_LOSSES, "output: 1 is the student's answer itself"),
        (lambda: build(DEIT | {"output": None}, (1, SIZE, SIZE), K), DEIT_LOSSES, "is the student's answer"),
        (lambda: build(DEIT | {"output": 1}, (1, SIZE, SIZE), K), DEIT_LOSSES, "is the student's answer"),
        (
            two,
            [{"loss": "kl", "output": "tought"}],
            "output: there is no 'tought' in .*logits: 2x4, taught: 2x4",
        ),
        (two, [{"loss": "kl", "output": 2}], "output: there is no 2 in"),
    ],
)
def test_an_output_that_is_not_there_is_told_before_the_training(student, losses, told):
    with pytest.raises(ValueError, match=told):
        objective(student(), losses)


def test_an_output_of_another_width_is_told():
    student = Two()
    student.second = nn.Linear(8, K + 1)
    take_output(student, "logits")
    with pytest.raises(ValueError, match="output 'taught' is a tensor 2x5; logits .N, 4. are needed"):
        objective(student, [{"loss": "kl", "output": "taught"}])


def test_check_tells_an_output_of_a_loss_that_takes_no_logits(tmp_path, capsys):
    recipe = {
        "name": "x",
        "data": {"dataset": "digits"},
        "teacher": {"model": "lenet5"},
        "student": {"model": "lenet5"},
        "stages": [
            {"stage": "train", "who": "teacher", "training": {"epochs": 1}},
            {
                "stage": "distill",
                "training": {"epochs": 1},
                "losses": [{"loss": "hint", "output": 1}, {"loss": "kl"}],
            },
        ],
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["check", str(tmp_path / "x.yaml")]) == 2
    told = capsys.readouterr().err
    assert "stages[1].losses[0].output: loss 'hint' takes no logits of the student's" in told
