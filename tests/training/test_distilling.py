"""`trainer.distill`: anybody's modules and loader, the losses of the shelf, and what bad input gets."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import trainer
from trainer.losses.kl import kl
from trainer.mistakes import Mistake


def convnet(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)
    )


def pictures(num=48):
    torch.manual_seed(1)
    return torch.randn(num, 3, 9, 9), torch.randint(4, (num,))


def loader(num=48, size=16):
    return DataLoader(TensorDataset(*pictures(num)), batch_size=size)


def test_it_is_the_plain_loop():
    """Two losses, Adam, three epochs: the same weights as a loop written here."""
    student, teacher = convnet(5, 0), convnet(8, 7)
    by_hand = copy.deepcopy(student)
    found = trainer.distill(
        student,
        teacher,
        loader(),
        losses=["cross_entropy", {"loss": "kl", "weight": 0.5, "temperature": 2}],
        epochs=3,
        lr=0.01,
    )
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.01, fused=True)
    means = []
    for _ in range(3):
        terms = []
        for images, labels in loader():
            with torch.no_grad():
                taught = teacher(images)
            logits = by_hand(images)
            parts = F.cross_entropy(logits, labels), kl(logits, taught, temperature=2)
            loss = parts[0] + 0.5 * parts[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            terms.append([loss.item(), *(part.item() for part in parts)])
        means.append(torch.tensor(terms).mean(0).tolist())
    for ours, theirs in zip(student.parameters(), by_hand.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert list(found[0]) == ["loss", "cross_entropy", "kl"] and len(found) == 3
    for one, mean in zip(found, means):
        assert list(one.values()) == pytest.approx(mean, rel=1e-4)
    assert found[-1]["loss"] < found[0]["loss"] and not student.training


def test_maps_embeddings_and_a_schedule_and_the_teacher_is_as_it_was():
    student, teacher = convnet(5, 0), convnet(8, 7).train()
    teacher[4].bias.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    asked = [{"loss": "hint", "at": {"1": "1"}}, "correlation"]
    settings = {"schedule": "one_cycle", "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "clip": 1.0}
    found = trainer.distill(student, teacher, loader(), losses=asked, epochs=4, ema=0.9, **settings)
    assert found[-1]["hint/1"] < found[0]["hint/1"] and list(found[0]) == ["loss", "hint/1", "correlation"]
    assert teacher.training and all(module.training for module in teacher.modules())
    assert [p.requires_grad for p in teacher.parameters()] == [True, True, True, False]
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())


def layouts(network):
    return [
        (key, tensor.data_ptr(), tensor.shape, tensor.stride())
        for key, tensor in network.state_dict().items()
    ]


@pytest.mark.parametrize("broken", [False, True])
def test_the_teachers_tensors_and_layers_are_those_of_before(broken):
    teacher = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    trainer.prune(teacher, sparsity=0.5, exclude=["first"])  # whose masks are buffers
    images, labels = pictures()
    teacher(images).sum().backward()
    slopes = [parameter.grad for parameter in teacher.parameters()]
    before, strides = layouts(teacher), [slope.stride() for slope in slopes]
    if broken:
        images[3] = torch.nan
    with pytest.raises(FloatingPointError) if broken else contextlib.nullcontext():
        trainer.distill(convnet(5, 0), teacher, [(images, labels)], losses=["kl"], epochs=1)
    assert layouts(teacher) == before
    assert not any("forward" in vars(module) for module in teacher.modules())
    assert [parameter.grad.stride() for parameter in teacher.parameters()] == strides
    teacher[0].weight.view(-1)


def test_tensors_of_both_networks_are_refused():
    def network():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 4))

    def refused(told):
        before = copy.deepcopy(teacher.state_dict())
        with pytest.raises(ValueError, match=told):
            trainer.distill(student, teacher, loader(), losses=["kl"], epochs=1)
        assert all(parameter.requires_grad for parameter in student.parameters())
        assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())

    student, teacher = network(), network()
    student[0] = teacher[0]
    refused("student: shares 0.weight, 0.bias with the teacher")
    student = network()
    student[3].weight.data = teacher[3].weight.data
    student[1].running_mean = teacher[1].running_mean
    refused("student: shares 3.weight, 1.running_mean with the teacher")
    student = teacher
    refused("student: shares 0.weight, 0.bias, 1.weight, 1.bias, 3.weight and 4 more with the teacher")


def test_a_weight_is_found():
    asked = ["cross_entropy", {"loss": "kl", "weight": "auto"}]
    found = trainer.distill(convnet(5, 0), convnet(8, 7), loader(), losses=asked, epochs=1)[0]
    assert found["loss"] != pytest.approx(found["cross_entropy"] + found["kl"], rel=1e-3)
    assert found["loss"] > found["cross_entropy"]


def test_unlabelled_images_and_an_index():
    images, labels = pictures()
    student, teacher = convnet(5, 0), convnet(8, 7)
    found = trainer.distill(student, teacher, [images[:16], images[16:]], losses=["kl"], epochs=1)
    assert math.isfinite(found[0]["kl"])
    indexed = DataLoader(TensorDataset(images, labels, torch.arange(48)), batch_size=16)
    found = trainer.distill(
        student, teacher, indexed, losses=[{"loss": "contrastive", "num_negatives": 8}], epochs=2
    )
    assert math.isfinite(found[-1]["contrastive"])


def test_a_folded_classifier_is_the_students():
    student, teacher = convnet(5, 0), convnet(8, 7)
    trainer.distill(student, teacher, loader(), losses=["reuse_classifier"], epochs=1)
    assert student(pictures()[0]).shape == (48, 4)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"losses": ["klo"]}, r"losses\[0\].loss: .*'klo'.*did you mean 'kl'"),
        ({"losses": []}, "losses: got"),
        ({"losses": [{"loss": "kl", "temprature": 1}]}, "temprature: is no key here .did you mean 'temperature'"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"lr": -1}, "lr: got -1"),
        ({"learning_rate": 1}, "learning_rate: is no key"),
        ({"batch_size": 8}, "batch_size: of recipes only"),
        ({"loader": iter([1])}, "loader: has no batches or no length"),
        ({"loader": []}, "loader: has no batches"),
        ({"loader": [{"x": 1}]}, "loader: batch 1: got a batch of dict"),
        ({"loader": [torch.zeros(2, 3, 9, 9, dtype=torch.uint8)]}, "got images torch.uint8"),
        ({"loader": [torch.randn(8, 3, 9, 9)], "losses": ["cross_entropy", "kl"]}, "a loss asks for labels"),
        ({"losses": ["contrastive"]}, "a loss asks for index"),
        ({"losses": [{"loss": "hint", "at": ["conv9"]}]}, "student has no layer 'conv9'"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(243, 7))}, "the teacher knows 7 classes"),
    ],
)  # fmt: skip
def test_bad_input_is_a_clear_error_and_the_student_is_unchanged(settings, told):
    student = convnet(5, 0)
    before = copy.deepcopy(student.state_dict())
    given = {"teacher": convnet(8, 7), "loader": loader(), "losses": ["kl"], "epochs": 1} | settings
    with pytest.raises(ValueError, match=told):
        trainer.distill(student, **given)
    assert all(torch.equal(tensor, before[key]) for key, tensor in student.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loader": [torch.zeros(2, 3, 9, 9, dtype=torch.float64)]}, "got images torch.float64 .*torch.float32"),
        ({"loader": [torch.zeros(2, 3, 9, 9, dtype=torch.bfloat16)]}, "got images torch.bfloat16"),
        ({"loader": [torch.zeros(0, 3, 9, 9)]}, r"got images torch.float32 \(0, 3, 9, 9\)"),
        ({"student": convnet(5, 0).double()}, "student: cannot take images of 3x9x9 in torch.float32: .*double"),
        ({"teacher": convnet(5, 0).bfloat16()}, "teacher: cannot take images of 3x9x9 in torch.float32: .*BFloat"),
        ({"student": nn.Flatten()}, "student: has no parameters"),
        ({"teacher": lambda images: images}, "teacher: got function; an nn.Module is allowed"),
        ({"losses": "klo"}, r"losses\[0\].loss: .*'klo'.*did you mean 'kl'"),
        ({"labels": [1, -1, 2, 3]}, "batch 1: label -1; class ids from 0 to 3 are allowed"),
        ({"labels": [1, -100, 2, 3]}, "batch 1: label -100; class ids from 0 to 3"),
        ({"labels": [1, 4, 2, 3]}, "batch 1: label 4; class ids from 0 to 3"),
        ({"labels": [1.0, 0.0, 2.0, 3.0]}, r"batch 1: got labels torch.float32 \(4,\); class ids \[N\] or prob"),
        ({"labels": [[1], [0], [2], [3]]}, r"batch 1: got labels torch.int64 \(4, 1\)"),
        ({"labels": [[0.5, 0.5]] * 4}, r"got labels torch.float32 \(4, 2\).* probabilities \[N, 4\]"),
        ({"labels": [1, 2, 3]}, r"batch 1: got 4 images and beside them \(3,\)"),
        ({"index": [0, 1, 2, 4]}, "batch 1: index 4; positions in the set from 0 to 3 are allowed"),
        ({"index": [0, -1, 2, 3]}, "batch 1: index -1; positions in the set from 0 to 3"),
    ],
)  # fmt: skip
def test_what_a_batch_and_a_network_can_be(settings, told):
    given = {"student": convnet(5, 0), "teacher": convnet(8, 7), "epochs": 1} | settings
    labels = torch.tensor(given.pop("labels", [0, 1, 2, 3]))
    index = torch.tensor(given.pop("index", [0, 1, 2, 3]))
    given.setdefault("loader", [(pictures(4)[0], labels, index)])
    before = copy.deepcopy(given["student"].state_dict())
    with pytest.raises(ValueError, match=told) as raised:
        trainer.distill(**({"losses": ["cross_entropy", "contrastive"]} | given))
    assert len(str(raised.value).splitlines()) == 1
    assert all(torch.equal(tensor, before[key]) for key, tensor in given["student"].state_dict().items())


def test_networks_and_moments_that_cannot_learn():
    def network(first):
        return nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(8), nn.Linear(8, 4))

    def refused(told, teacher, batches):
        with pytest.raises(Mistake, match=told):
            trainer.distill(network(nn.Linear(192, 8)), teacher, batches, losses=["kl"], epochs=1)

    images, labels = torch.rand(9, 3, 8, 8), torch.zeros(9, dtype=torch.int64)
    batches = [(images[:8], labels[:8]), (images[8:], labels[8:])]
    refused("loader: gives a batch of one image", network(nn.Linear(192, 8)), batches)
    refused("teacher: some of its layers are lazy", network(nn.LazyLinear(8)), batches[:1])
    for nothing_learned in (torch.no_grad, torch.inference_mode):
        with nothing_learned():
            refused("nothing is learned inside", network(nn.Linear(192, 8)), batches[:1])


def test_a_later_batch_is_looked_at_too():
    images, labels = pictures(12)
    bad = labels.clone()
    bad[5] = -1
    for losses, told in (("cross_entropy", "batch 3 of epoch 1: label -1"), ("kl", None)):
        with pytest.raises(ValueError, match=told) if told else contextlib.nullcontext():
            trainer.distill(
                convnet(5, 0), convnet(8, 7), [(images, labels)] * 2 + [(images, bad)], losses=losses, epochs=1
            )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_whole_type_are_the_same(dtype):
    images, labels = pictures(12)
    found = [
        trainer.distill(
            convnet(5, 0), convnet(8, 7), [(images, one)], losses={"loss": "cross_entropy"}, epochs=2
        )
        for one in (labels, labels.to(dtype), F.one_hot(labels, 4).double())
    ]
    assert found[0] == found[1] and found[0][1]["loss"] == pytest.approx(found[2][1]["loss"], rel=1e-5)


class Once:
    """Batches that can be run through once, with a length."""

    def __init__(self, batches):
        self.batches, self.length = iter(batches), len(batches)

    def __len__(self):
        return self.length

    def __iter__(self):
        return self.batches


def test_a_loader_that_can_be_run_through_once():
    batches = list(loader())
    whole = trainer.distill(convnet(5, 0), convnet(8, 7), batches, losses=["kl"], epochs=1)
    assert trainer.distill(convnet(5, 0), convnet(8, 7), Once(batches), losses=["kl"], epochs=1) == whole
    with pytest.raises(ValueError, match="loader: gives no batch in epoch 2 of 2: it must begin anew"):
        trainer.distill(convnet(5, 0), convnet(8, 7), Once(batches), losses=["kl"], epochs=2)
    exhausted = Once(batches)
    assert len(list(exhausted)) == 3
    with pytest.raises(ValueError, match="loader: gives no batch, and its length is 3"):
        trainer.distill(convnet(5, 0), convnet(8, 7), exhausted, losses=["kl"], epochs=1)


def test_a_set_without_a_length_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(*pictures())

    with pytest.raises(ValueError, match="loader: has no batches or no length"):
        trainer.distill(convnet(5, 0), convnet(8, 7), DataLoader(Stream()), losses=["kl"], epochs=1)


def test_a_loss_that_is_not_finite_stops_it():
    images, labels = pictures()
    images[3] = torch.nan
    with pytest.raises(FloatingPointError, match="epoch 1: .*kl is not finite"):
        trainer.distill(convnet(5, 0), convnet(8, 7), [(images, labels)], losses=["kl"], epochs=1)
