"""The one trainable module: what it feeds the losses, what it owns, and what it leaves alone."""

import copy
import math
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from trainer.compression.masks import set_mask
from trainer.compression.weights import weights_of
from trainer.data.images import Data, InMemory, Part
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.models.lenet5 import lenet5
from trainer.networks.blocks import Blocks
from trainer.networks.features import head
from trainer.recipe import shelves
from trainer.recipe.keys import Augment, TeacherKeys, Term, TermKeys, WeightSchedule
from trainer.recipe.terms import (
    EMBEDDINGS,
    MAP_LISTS,
    MAPS,
    VOCABULARY,
    WEIGHTS,
    WORDS_OF_CONSTRUCTORS,
    needs_teacher,
    wants,
)
from trainer.recipe.training import Training
from trainer.training.optimizer import make_optimizer

N, K, SIZE, MEAN, STD = 6, 4, 16, (0.3,), (0.2,)
TOP = Path(__file__).parents[2]


class Small(Blocks):
    """Two stages that halve the image, then the mean over positions and a Linear."""

    def __init__(self, width: int = 3, num_classes: int = K, names=("one", "two")) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Conv2d(1, width, 3, stride=2, padding=1))
        self.add_module(names[1], nn.Conv2d(width, 2 * width, 3, stride=2, padding=1))
        self.fc = nn.Linear(2 * width, num_classes)

    def blocks(self):
        return [(name, lambda x, name=name: torch.relu(getattr(self, name)(x))) for name in self.names]

    def forward_head(self, x, pre_logits=False):
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)


def plain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 8), nn.ReLU(), *layers, nn.Linear(8, K))


def some_data(mixup: float = 0.0, labelled: bool = True, classes: int = K) -> Data:
    numbers = torch.Generator().manual_seed(1)
    labels = torch.randint(K, (20,), generator=numbers) if labelled else torch.full((20,), -1)
    images = InMemory(torch.randint(256, (20, 1, SIZE, SIZE), generator=numbers, dtype=torch.uint8), labels)
    part = Part(images, torch.arange(20))
    return Data(
        "some",
        part,
        part,
        part,
        [str(i) for i in range(classes)],
        MEAN,
        STD,
        (1, SIZE, SIZE),
        20,
        Augment(),
        mixup=mixup,
    )


def term(**keys) -> TermKeys:
    return TypeAdapter(Term).validate_python(keys)


def teacher_of(*networks: nn.Module, combine: str = "logits", **keys) -> Teacher:
    each = [
        TeacherKeys(model="lenet5", **{k: v[i] if isinstance(v, list) else v for k, v in keys.items()})
        for i in range(len(networks))
    ]
    return Teacher(networks, each, MEAN, STD, combine)


@pytest.fixture
def batch():
    torch.manual_seed(5)
    return torch.rand(N, 1, SIZE, SIZE), torch.randint(K, (N,)), torch.randperm(20)[:N]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal(images):
    return (images - MEAN[0]) / STD[0]


# ---- the sum


def test_terms_add_up_with_their_weights(batch):
    student, guide = Small(), teacher_of(Small(5))
    objective = Objective(
        student,
        [term(loss="cross_entropy", weight=0.1), term(loss="kl", weight=2, temperature=3)],
        some_data(),
        guide,
    )
    images, labels, _ = batch
    losses = objective(*batch)
    logits, taught = student(normal(images)), guide.network(normal(images))
    divergence = (
        sum(
            math.exp(t) * (t - s)
            for row_t, row_s in zip(
                (taught / 3).log_softmax(1).tolist(), (logits / 3).log_softmax(1).tolist(), strict=True
            )
            for t, s in zip(row_t, row_s, strict=True)
        )
        / N
        * 9
    )
    assert list(losses) == ["loss", "cross_entropy", "kl"]
    assert losses["cross_entropy"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert losses["kl"].item() == pytest.approx(divergence, rel=1e-4)
    assert losses["loss"].item() == pytest.approx(
        0.1 * losses["cross_entropy"].item() + 2 * losses["kl"].item(), rel=1e-6
    )


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        ({"schedule": "constant", "value": 2}, [2, 2, 2, 2, 2]),
        ({"schedule": "warm_up", "value": 2, "epochs": 5}, [0, 1, 2, 2, 2]),
        ({"schedule": "warm_up", "value": 2}, [0, 0.5, 1, 1.5, 2]),
        ({"schedule": "linear", "value": 2, "to": 1}, [2, 1.75, 1.5, 1.25, 1]),
        ({"schedule": "linear", "value": 1, "epochs": 5}, [1, 0.5, 0, 0, 0]),
        (
            {"schedule": "cosine", "value": 2, "to": 4},
            [2, 2 + (1 - math.cos(math.pi / 4)), 3, 2 + (1 + math.cos(math.pi / 4)), 4],
        ),
    ],
)
def test_schedules_of_weights(schedule, weights, batch):
    """Five looks at a stage of 10 epochs, every 2.5."""
    objective = Objective(Small(), [term(loss="cross_entropy", weight=schedule)], some_data(), num_epochs=10)
    for epoch, weight in zip((0, 2.5, 5, 7.5, 10), weights, strict=True):
        losses = objective(*batch, epoch=epoch)
        assert losses["loss"].item() == pytest.approx(weight * losses["cross_entropy"].item(), abs=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        {"schedule": "warm_up", "value": 1, "to": 1},
        {"schedule": "constant", "value": 1, "to": 1},
        {"schedule": "constant", "value": 1, "epochs": 1},
        {"schedule": "linear", "value": 1, "to": 1},
        {"schedule": "cosine", "value": 0},
        {"schedule": "warm_up", "value": 0},
    ],
)
def test_schedules_that_do_nothing_are_refused(schedule):
    with pytest.raises(ValidationError, match="no effect"):
        WeightSchedule.model_validate(schedule)


def test_terms_of_one_loss_have_names_of_their_own(batch):
    objective = Objective(
        Small(),
        [term(loss="kl"), term(loss="kl", temperature=1), term(loss="hint"), term(loss="hint")],
        some_data(),
        teacher_of(Small(5)),
    )
    losses = objective(*batch)
    assert list(losses) == ["loss", "kl", "kl_2", "hint/one", "hint/two", "hint_2/one", "hint_2/two"]
    assert losses["loss"].item() == pytest.approx(
        sum(value.item() for name, value in losses.items() if name != "loss"), rel=1e-5
    )


def test_the_epoch_and_the_index_arrive(batch):
    class Listener(nn.Module):
        def forward(self, *fed):
            self.heard = fed
            return fed[0].sum()

    objective = Objective(Small(), [term(loss="cross_entropy")], some_data())
    objective.bound[0].asks, objective.bound[0].function = (
        ["student_logits", "labels", "index", "epoch"],
        Listener(),
    )
    objective(*batch, epoch=1.5)
    _, labels, index, epoch = objective.bound[0].function.heard
    assert labels is batch[1] and index is batch[2] and epoch == 1.5


def test_between_the_forward_and_a_loss_stands_no_frame_of_ours(batch, monkeypatch):
    stack = []

    def kl(student_logits, teacher_logits, *, temperature: float = 4.0):
        stack.extend(frame.filename for frame in traceback.extract_stack())
        return (student_logits - teacher_logits).square().mean() / temperature

    monkeypatch.setattr("trainer.losses.kl.kl", kl)
    objective = Objective(Small(), [TermKeys(loss="kl")], some_data(), teacher_of(Small(5)))
    objective(*batch)
    ours = [
        Path(file).relative_to(TOP).as_posix() for file in stack if Path(file).is_relative_to(TOP / "trainer")
    ]
    assert ours == ["trainer/distillation/objective.py"] and stack[-2].endswith("objective.py")


# ---- what it owns


def test_the_teacher_is_no_part_of_it(batch):
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(SIZE * SIZE, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, K)
    )
    guide = teacher_of(network)
    objective = Objective(Small(), [term(loss="kl"), term(loss="semantic")], some_data(), guide)
    mine = {id(t) for t in [*network.parameters(), *network.buffers(), *network.modules()]}
    assert not mine & {id(t) for t in [*objective.parameters(), *objective.buffers(), *objective.modules()]}
    assert not any("teacher" in key for key in objective.state_dict())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    objective.train()
    objective(*batch)["loss"].backward()
    assert not network.training and all(p.grad is None for p in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_projectors_are_trained_and_are_no_part_of_the_student(batch):
    student = Small()
    keys = set(student.state_dict())
    objective = Objective(
        student,
        [term(loss="hint"), term(loss="variational"), term(loss="reuse_classifier")],
        some_data(),
        teacher_of(Small(5)),
    )
    assert set(student.state_dict()) == keys
    beside = {id(p) for p in objective.parameters()} - {id(p) for p in student.parameters()}
    assert (
        len(beside) == 2 * 2 + 2 * 4 + 2
    )  # two 1x1 convolutions, two regressors of three layers and a variance, one Linear
    optimizer = make_optimizer(objective, Training(epochs=1, lr=0.1))
    assert beside <= {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = [p.detach().clone() for p in objective.parameters()]
    objective(*batch)["loss"].backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, objective.parameters(), strict=True)]
    named = dict(zip([name for name, _ in objective.named_parameters()], moved, strict=True))
    assert [name for name, is_moved in named.items() if not is_moved] == [
        "student.fc.weight",
        "student.fc.bias",
    ]


def test_what_was_learned_goes_from_stage_to_stage(batch):
    student, guide, data = Small(), teacher_of(Small(5)), some_data()
    first = Objective(student, [term(loss="hint", at="last"), term(loss="contrastive", dim=3)], data, guide)
    first.train()
    first(*batch)
    learned = first.learned()
    assert set(learned) >= {"hint/two.projector.conv.weight", "contrastive.function.student_bank"}
    second = Objective(student, [term(loss="hint"), term(loss="contrastive", dim=3)], data, guide)
    fresh = second.bound[0].projector.conv.weight.clone()
    second.recall(learned)
    assert all(torch.equal(value, second.learned()[key]) for key, value in learned.items())
    assert torch.equal(fresh, second.bound[0].projector.conv.weight)  # of another layer: nothing to recall
    other = Objective(Small(), [term(loss="contrastive", dim=4)], data, guide)
    before = other.learned()
    other.recall(learned)  # of another size: starts afresh, whole
    assert all(torch.equal(value, other.learned()[key]) for key, value in before.items())


# ---- what it sees


def test_student_and_teacher_each_see_their_own_normalisation_and_size(batch):
    seen = {}

    class Watched(Small):
        def forward(self, x):
            seen[self.names] = x
            return super().forward(x)

    guide = teacher_of(Watched(names=("a", "b")), mean=(0.5,), std=(0.1,), resize=24)
    objective = Objective(Watched(), [term(loss="kl")], some_data(), guide)
    objective(*batch)
    assert torch.allclose(seen["one", "two"], normal(batch[0]), atol=1e-6)
    larger = F.interpolate(batch[0], size=(24, 24), mode="bilinear", antialias=True)
    assert torch.allclose(seen["a", "b"][:N], (larger - 0.5) / 0.1, atol=1e-5)
    own = Objective(Watched(), [term(loss="cross_entropy")], some_data(), prepare=lambda images: images * 2)
    own(*batch)
    assert torch.equal(seen["one", "two"], batch[0] * 2)


def test_maps_arrive_paired_and_projected(batch):
    student, guide = Small(), teacher_of(Small(5))
    objective = Objective(student, [term(loss="hint")], some_data(), guide)
    x, y = (
        student.forward_intermediates(normal(batch[0]))[1],
        guide.network.forward_intermediates(normal(batch[0]))[1],
    )
    losses = objective(*batch)
    for number, name in enumerate(("one", "two")):
        conv = objective.bound[number].projector.conv
        projected = (
            torch.einsum("oc,nchw->nohw", conv.weight[:, :, 0, 0], x[number]) + conv.bias[None, :, None, None]
        )
        assert losses[f"hint/{name}"].item() == pytest.approx(
            (projected - y[number]).square().mean().item(), rel=1e-4
        )


def test_the_larger_map_is_pooled_before_it_is_projected(batch):
    objective = Objective(Small(), [term(loss="hint", at={"one": "two"})], some_data(), teacher_of(Small(5)))
    x = objective.student.forward_intermediates(normal(batch[0]))[1][0]
    y = objective.teacher.network.forward_intermediates(normal(batch[0]))[1][1]
    pooled = x.reshape(N, 3, 4, 2, 4, 2).mean((3, 5))
    assert objective(*batch)["hint/one"].item() == pytest.approx(
        (objective.bound[0].projector(pooled) - y).square().mean().item(), rel=1e-4
    )


def test_embeddings_and_the_head_arrive(batch):
    student, guide = Small(), teacher_of(Small(5))
    objective = Objective(student, [term(loss="semantic"), term(loss="relational")], some_data(), guide)
    mine = student.forward_head(student.forward_features(normal(batch[0])), pre_logits=True)
    theirs = guide.network.forward_head(guide.network.forward_features(normal(batch[0])), pre_logits=True)
    projected = objective.bound[0].function.projector(mine)
    wanted = (projected - theirs).square().mean() + (
        guide.network.fc(projected) - guide.network.fc(theirs)
    ).square().mean()
    assert objective(*batch)["semantic"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_weights_arrive_in_pairs_and_as_the_network_uses_them(batch):
    student, guide = Small(), teacher_of(Small(5))
    objective = Objective(student, [term(loss="weight_distribution")], some_data(), guide)
    losses = objective(*batch)
    assert list(losses) == ["loss", *(f"weight_distribution/{name}" for name in ("one", "two", "fc"))]
    place = weights_of(student)["one"]
    mask = torch.rand_like(place.value) > 0.5
    set_mask(place, mask)
    pruned = objective(*batch)
    pruned["loss"].backward()
    quantiles = shelves.find("loss", "weight_distribution")()
    assert pruned["weight_distribution/one"] == quantiles(
        torch.where(mask, place.value, 0.0), guide.network.one.weight
    )
    assert pruned["weight_distribution/two"] == losses["weight_distribution/two"]
    gradient = student.one.parametrizations.weight.original.grad
    assert (gradient[~mask] == 0).all() and gradient[mask].any()


def test_losses_on_lists_get_all_pairs(batch):
    objective = Objective(Small(), [term(loss="review"), term(loss="fsp")], some_data(), teacher_of(Small(5)))
    losses = objective(*batch)
    assert list(losses) == ["loss", "review", "fsp"]
    assert [(row["term"], row["student"], row["teacher"]) for row in objective.pairs()] == [
        ("review", "one", "one"),
        ("review", "two", "two"),
        ("fsp", "one", "one"),
        ("fsp", "two", "two"),
    ]


def test_only_what_is_asked_for_is_computed(batch, monkeypatch):
    guide = teacher_of(Small(5))
    asked = []
    see = guide.see
    monkeypatch.setattr(
        guide,
        "see",
        lambda images, layers=(), embedding=False: (
            asked.append((list(layers), embedding)),
            see(images, layers, embedding),
        )[1],
    )
    for losses, wanted in (
        (["cross_entropy"], []),
        (["kl"], [([], False)]),
        (["one_for_all"], [([], False)]),
        (["hint"], [(["one", "two"], False)]),
        (["relational", "kl"], [([], True)]),
        (["weight_distribution", "cross_entropy"], []),
        (["hint", "attention"], [(["one", "two"], False)]),
    ):
        objective = Objective(Small(), [term(loss=name) for name in losses], some_data(), guide)
        asked.clear()
        objective(*batch)
        assert asked[:1] == wanted, losses  # it may ask itself once more, about a fuller batch


# ---- at


def pairs_of(at, student=None, network=None, loss="hint"):
    objective = Objective(
        student or Small(),
        [term(loss=loss, at=at)],
        some_data(),
        teacher_of(network or Small(5, names=("a", "b"))),
    )
    return [(row["student"], row["teacher"]) for row in objective.pairs()]


def deep(width: int = 3) -> nn.Module:
    """Five stages at strides 2, 2, 4, 4, 8, with a block inside each."""

    class Deep(Blocks):
        def __init__(self) -> None:
            super().__init__()
            widths = [1, width, width, 2 * width, 2 * width, 4 * width]
            for i, stride in enumerate((2, 1, 2, 1, 2)):
                block = nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], 3, stride=stride, padding=1), nn.ReLU()
                )
                self.add_module(f"s{i}", block)
            self.fc = nn.Linear(4 * width, K)

        def blocks(self):
            return [(f"s{i}", getattr(self, f"s{i}")) for i in range(5)]

        def forward_head(self, x, pre_logits=False):
            return x.mean((2, 3)) if pre_logits else self.fc(x.mean((2, 3)))

    return Deep()


@pytest.mark.parametrize(
    ("at", "pairs"),
    [
        (None, [("one", "a"), ("two", "b")]),
        ("auto", [("one", "a"), ("two", "b")]),
        ("last", [("two", "b")]),
        (["one"], [("one", "a")]),
        (["two", "one"], [("two", "b"), ("one", "a")]),
        ([0], [("one", "a")]),
        ([-1], [("two", "b")]),
        ({"one": "b"}, [("one", "b")]),
        ({"one": "b", "two": "b"}, [("one", "b"), ("two", "b")]),
        ({0: 1}, [("one", "b")]),
        ({"one": -1}, [("one", "b")]),
        ({"fc": "fc"}, [("fc", "fc")]),
    ],
)
def test_at(at, pairs):
    assert pairs_of(at) == pairs


def test_at_names_of_both_mean_both():
    assert pairs_of(["s1", "s3"], deep(), deep(4)) == [("s1", "s1"), ("s3", "s3")]
    assert pairs_of(["s0"], deep(), Small(5)) == [("s0", "one")]


def test_at_names_of_the_student_alone_go_to_the_same_stride_or_depth():
    assert pairs_of("auto", Small(), deep()) == [("one", "s1"), ("two", "s3")]
    assert pairs_of(["one", "two"], Small(), deep()) == [("one", "s1"), ("two", "s3")]
    assert pairs_of(["s0", "s4"], deep(), Small(names=("a", "b"))) == [("s0", "a"), ("s4", "b")]
    assert pairs_of(["s2.0"], deep(), Small(names=("a", "b"))) == [
        ("s2.0", "b")
    ]  # a convolution inside a stage, stride 4
    # A fully connected net keeps one size: depth decides.
    names = [name for name, module in plain().named_modules() if isinstance(module, nn.Linear)]
    assert pairs_of([names[0]], plain(), deep()) == [(names[0], "s2")]
    assert pairs_of([names[-1]], plain(), deep()) == [(names[-1], "s4")]
    assert pairs_of(["one"], Small(), plain())[0][1] == "1"


def test_at_dotted_modules():
    assert pairs_of({"s3.0": "s2.1"}, deep(), deep(4)) == [("s3.0", "s2.1")]
    assert pairs_of({"1": "s0"}, plain(), deep()) == [("1", "s0")]  # a word is a name, a number a stage's
    assert pairs_of({1: "s0"}, plain(), deep()) == [("1", "s0")]


@pytest.mark.parametrize(
    ("at", "told"),
    [
        (["ones"], r"at: student has no layer 'ones' \(did you mean 'one'\?\)"),
        ({"one": "c"}, "at: teacher has no layer 'c' .did you mean 'fc'"),
        ({"one": "xyz"}, "at: teacher has no layer 'xyz'; there are: a, b"),
        ([2], "at: student has no block 2; it has 2, counted from 0"),
        ({"one": -3}, "at: teacher has no block -3; it has 2, counted from 0"),
        ([""], "at: student has no layer ''"),
        (["one", 0], "at: names the student's layer 'one' more than once"),
        ({"one": "a", 0: "b"}, "at: names the student's layer 'one' more than once"),
    ],
)
def test_faulty_at(at, told):
    with pytest.raises(ValueError, match=told):
        pairs_of(at)


def test_at_a_module_that_gives_no_map():
    class Idle(Small):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Conv2d(1, 1, 1)

    with pytest.raises(ValueError, match="at: student: layer 'idle' is not called in the forward pass"):
        pairs_of(["idle"], Idle())


def test_at_with_nothing_to_pair():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(SIZE * SIZE, K)

        def forward(self, x):
            return self.fc(x.flatten(1))

    for at in ("auto", "last"):
        with pytest.raises(ValueError, match="at: no layers can be paired by themselves; name them"):
            pairs_of(at, Bare())
    assert pairs_of({"fc": "b"}, Bare()) == [("fc", "b")]


@pytest.mark.parametrize(
    ("at", "pairs"),
    [
        (None, [("one", "a"), ("two", "b"), ("fc", "fc")]),
        ("last", [("fc", "fc")]),
        (["one", "fc"], [("one", "a"), ("fc", "fc")]),
        ([0, -1], [("one", "a"), ("fc", "fc")]),
        ({"one": "b", "fc": 0}, [("one", "b"), ("fc", "a")]),
    ],
)
def test_at_weights(at, pairs):
    assert pairs_of(at, loss="weight_distribution") == pairs


def test_at_weights_of_nets_of_unequal_depth():
    assert pairs_of(None, Small(), deep(), "weight_distribution") == [
        ("one", "s0.0"),
        ("two", "s2.0"),
        ("fc", "fc"),
    ]
    assert pairs_of(None, deep(), Small(), "weight_distribution") == [
        ("s0.0", "one"),
        ("s2.0", "two"),
        ("fc", "fc"),
    ]


@pytest.mark.parametrize(
    ("at", "told"),
    [
        (["ones"], r"at: student has no weights in 'ones' \(did you mean 'one'\?\)"),
        ({"one": 7}, "at: teacher has no weight number 7; it has 3"),
        (["one", 0], "at: names the student's layer 'one' more than once"),
    ],
)
def test_faulty_at_weights(at, told):
    with pytest.raises(ValueError, match=told):
        pairs_of(at, loss="weight_distribution")


def test_the_table_of_pairs():
    guide = teacher_of(Small(5))
    rows = Objective(
        Small(),
        [term(loss="hint", at="last"), term(loss="weight_distribution", at="last"), term(loss="kl")],
        some_data(),
        guide,
    ).pairs()
    assert rows == [
        {
            "term": "hint/two",
            "student": "two",
            "student_shape": (6, 4, 4),
            "teacher": "two",
            "teacher_shape": (10, 4, 4),
            "projector": "MapProjector",
        },
        {
            "term": "weight_distribution/fc",
            "student": "fc",
            "student_shape": (4, 6),
            "teacher": "fc",
            "teacher_shape": (4, 10),
            "projector": "-",
        },
    ]


# ---- mistakes


class Finishing(nn.Module):
    """Sees nothing of the teacher but what `finish` is given."""

    def forward(self, student_logits: Tensor) -> Tensor:
        return student_logits.square().mean()

    def finish(self, student: nn.Module, teacher_head: nn.Module) -> None:
        pass


def test_a_loss_that_finishes_needs_a_teacher(monkeypatch):
    monkeypatch.setitem(sys.modules, "own", sys.modules[__name__])
    with pytest.raises(ValueError, match="loss 'python:own:Finishing' needs a teacher, and there is none"):
        Objective(Small(), [TermKeys(loss="python:own:Finishing")], some_data())


def test_mistakes():
    data, guide = some_data(), teacher_of(Small(5))
    with pytest.raises(ValueError, match="losses: there are none"):
        Objective(Small(), [], data)
    with pytest.raises(ValueError, match="loss 'kl' needs a teacher, and there is none"):
        Objective(Small(), [term(loss="kl")], data)
    with pytest.raises(ValueError, match="the teacher knows 5 classes and the data has 4"):
        Objective(Small(), [term(loss="kl")], data, teacher_of(Small(5, 5)))
    with pytest.raises(ValueError, match=r"teachers\[1\] knows 5 classes and the data has 4"):
        Objective(Small(), [term(loss="kl")], data, teacher_of(Small(5), Small(5, 5)))
    with pytest.raises(ValueError, match="the student knows 5 classes and the data has 4"):
        Objective(Small(num_classes=5), [term(loss="cross_entropy")], data)
    with pytest.raises(
        ValueError, match=r"the student gives a tensor 2x1x16x16; logits \[N, 4\] are needed$"
    ):
        Objective(nn.Conv2d(1, 1, 1), [term(loss="cross_entropy")], data)
    with pytest.raises(
        ValueError,
        match=r"the student gives tuple \(0: 2x16x3, 1: tuple\); logits \[N, 4\] are needed; output: NUMBER or",
    ):
        Objective(nn.LSTM(SIZE, 3), [term(loss="cross_entropy")], data, prepare=lambda images: images[:, 0])
    small = nn.Sequential(nn.Flatten(), nn.Linear(9, K))
    with pytest.raises(
        ValueError, match="the teacher cannot look at images of 1x16x16; resize gives .*mat1 and mat2"
    ):
        Objective(Small(), [term(loss="kl")], data, teacher_of(small))
    with pytest.raises(ValueError, match="the student cannot look at images of 1x16x16: .*mat1 and mat2"):
        Objective(small, [term(loss="cross_entropy")], data)
    with pytest.raises(ValueError, match="at: loss 'kl' looks at no layers"):
        Objective(Small(), [term(loss="kl", at="last")], data, guide)
    with pytest.raises(ValueError, match="got 1 pair of layers; a flow is between two"):
        Objective(Small(), [term(loss="fsp", at="last")], data, guide)
    with pytest.raises(ValueError, match="reuse_classifier: the student's classifier is a Parametrized"):
        student = Small()
        set_mask(weights_of(student)["fc"], torch.ones(K, 6, dtype=torch.bool))
        Objective(student, [term(loss="reuse_classifier")], data, guide)


def test_the_student_is_left_as_it_was():
    student = Small()
    student.train()
    before = copy.deepcopy(student.state_dict())
    objective = Objective(
        student, [term(loss="reuse_classifier"), term(loss="hint")], some_data(), teacher_of(Small(5))
    )
    objective.rehearse(some_data())
    assert student.training and all(
        torch.equal(before[key], value) for key, value in student.state_dict().items()
    )


def test_rehearsal_finds_what_cannot_be_computed():
    def rehearse(loss: str, data: Data) -> None:
        Objective(Small(), [term(loss=loss)], data, teacher_of(Small(5))).rehearse(data)

    with pytest.raises(
        ValueError, match="cannot be computed for this student and data: decoupled: labels are"
    ):
        rehearse("decoupled", some_data(mixup=1.0))
    with pytest.raises(ValueError, match="the loss asks for labels, and the training images have none"):
        rehearse("cross_entropy", some_data(labelled=False))
    for loss, data in (
        ("cross_entropy", some_data(mixup=1.0)),
        ("decoupled", some_data()),
        ("kl", some_data(labelled=False)),
        ("one_for_all", some_data(labelled=False)),
    ):
        rehearse(loss, data)


def test_words_that_nobody_knows(monkeypatch, tmp_path):
    import trainer.losses

    (tmp_path / "wrong.py").write_text("def wrong(student_logit, labels): ...\n")
    monkeypatch.setattr(trainer.losses, "__path__", [*trainer.losses.__path__, str(tmp_path)])
    with pytest.raises(
        ValueError, match=r"loss 'wrong' asks for 'student_logit' \(did you mean 'student_logits'\?\)"
    ):
        wants(TermKeys(loss="wrong"))


def test_finishing_folds_the_classifier(batch):
    student, guide = Small(), teacher_of(Small(5))
    objective = Objective(student, [term(loss="reuse_classifier")], some_data(), guide)
    before = copy.deepcopy(student.state_dict())
    foreseen = objective.finished()(batch[0])  # what a validation in the middle of the training measures
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    objective.finish()
    assert torch.equal(student(batch[0]), foreseen)
    plain = Objective(student, [term(loss="kl")], some_data(), guide)
    assert plain.finished() is plain.student
    pooled = student.forward_head(student.forward_features(batch[0]), pre_logits=True)
    wanted = head(guide.network)(objective.bound[0].function.projector(pooled))
    assert torch.allclose(student(batch[0]), wanted, atol=1e-5)


def two_headed(name: str) -> nn.Module:
    """timm's networks whose logits come from two classifiers, made small, for images of 16 pixels."""
    size = {"img_size": SIZE, "in_chans": 1, "num_classes": K}
    if name == "volo":
        from timm.models.volo import VOLO

        return VOLO(
            layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), num_heads=(2, 2, 2, 2), patch_size=4, **size
        )
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(patch_size=4, embed_dim=16, depth=2, num_heads=2, **size)


@pytest.mark.parametrize(
    "name, told", [("volo", "logits are not what its classifier makes"), ("deit", "several classifiers")]
)
def test_networks_of_two_classifiers_work_where_no_classifier_is_asked_for_alone(name, told, batch):
    data = some_data()
    for losses in (["kl"], ["hint", "cross_entropy"], ["relational"]):
        for student, guide in ((Small(), two_headed(name)), (two_headed(name), Small(5))):
            objective = Objective(student, [term(loss=loss) for loss in losses], data, teacher_of(guide))
            objective.train()
            objective(*batch)["loss"].backward()
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    for loss in ("semantic", "reuse_classifier"):
        with pytest.raises(ValueError, match=f"the teacher.*{told}"):
            Objective(Small(), [term(loss=loss)], data, teacher_of(two_headed(name)))
    Objective(two_headed(name), [term(loss="semantic")], data, teacher_of(Small(5)))
    with pytest.raises(ValueError, match=f"the student.*{told}"):
        Objective(two_headed(name), [term(loss="reuse_classifier")], data, teacher_of(Small(5)))


def test_losses_with_a_memory_know_a_sample_by_its_place_in_the_training_part(batch):
    """A bank has rows for the samples it will see, and none for those held out."""
    data = some_data()
    data.train = Part(data.train.images, torch.tensor([2, 3, 7, 11, 19]))
    objective = Objective(Small(), [term(loss="contrastive", dim=4)], data, teacher_of(Small(5)))
    loss = objective.bound[0].function
    assert len(loss.student_bank) == 5
    before = loss.student_bank.clone()
    objective.train()
    objective(batch[0][:2], batch[1][:2], torch.tensor([7, 3]))
    assert (loss.student_bank != before).any(dim=1).tolist() == [False, True, True, False, False]


# ---- several teachers


def test_several_teachers_against_naive_formulas(batch):
    networks = [Small(4), Small(5), Small(6)]
    logits = [[row.tolist() for row in network(normal(batch[0])).detach().double()] for network in networks]

    def softmax(row):
        powers = [math.exp(value) for value in row]
        return [power / sum(powers) for power in powers]

    weights = [1.0, 2.0, 0.5]
    for combine in ("logits", "probabilities", "confidence"):
        guide = teacher_of(*networks, combine=combine, weight=weights)
        objective = Objective(Small(), [term(loss="kl", temperature=1)], some_data(), guide)
        total = 0.0
        student = objective.student(normal(batch[0])).detach().double()
        for i in range(N):
            rows = [each[i] for each in logits]
            if combine == "logits":
                probabilities = softmax(
                    [
                        sum(w * row[k] for w, row in zip(weights, rows, strict=True)) / sum(weights)
                        for k in range(K)
                    ]
                )
            else:
                votes = weights if combine == "probabilities" else [max(softmax(row)) for row in rows]
                probabilities = [
                    sum(w * softmax(row)[k] for w, row in zip(votes, rows, strict=True)) / sum(votes)
                    for k in range(K)
                ]
            total += sum(
                p * (math.log(p) - math.log(q))
                for p, q in zip(probabilities, softmax(student[i].tolist()), strict=True)
            )
        assert objective(*batch)["kl"].item() == pytest.approx(total / N, rel=1e-3, abs=1e-6), combine


def test_of_several_teachers_the_first_shows_its_layers(batch):
    networks = [Small(5), deep()]
    objective = Objective(
        Small(),
        [term(loss="hint"), term(loss="relational"), term(loss="kl")],
        some_data(),
        teacher_of(*networks),
    )
    assert [row["teacher"] for row in objective.pairs()] == ["one", "two"]
    alone = Objective(
        objective.student, [term(loss="hint"), term(loss="relational")], some_data(), teacher_of(networks[0])
    )
    alone.recall(objective.learned())
    both, one = objective(*batch), alone(*batch)
    for name in ("hint/one", "hint/two", "relational"):
        assert torch.equal(both[name], one[name])


# ---- every file of the shelf


@pytest.mark.parametrize("loss", shelves.names("loss"))
def test_every_loss_through_the_objective(loss, batch):
    """Alone: a finite loss, gradients to the student, none to the teacher; its state survives a restart."""
    assert set(wants(TermKeys(loss=loss))) <= VOCABULARY
    data = some_data()
    guide = teacher_of(lenet5(data.shape, K, width=6))

    def make() -> Objective:
        return Objective(lenet5(data.shape, K, width=2), [term(loss=loss)], data, guide, num_epochs=2)

    objective = make()
    objective.rehearse(data)
    objective.train()
    losses = objective(*batch, epoch=0.5)
    assert losses["loss"].dim() == 0 and all(torch.isfinite(value) for value in losses.values())
    assert len(losses) > 1 and all(
        name == loss or name.startswith(f"{loss}/") for name in losses if name != "loss"
    )
    losses["loss"].backward()
    gradients = [p.grad for p in objective.student.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients) and any(g.any() for g in gradients)
    assert all(p.grad is None and not p.requires_grad for p in guide.network.parameters())
    beside = [p for name, p in objective.named_parameters() if not name.startswith("student.")]
    assert all(p.grad is not None for p in beside), "a learned parameter of the loss gets no gradient"

    again = make()
    again.load_state_dict(objective.state_dict())
    objective.eval()
    again.eval()
    torch.manual_seed(3)
    first = objective(*batch, epoch=0.5)
    torch.manual_seed(3)
    second = again(*batch, epoch=0.5)
    assert all(torch.equal(first[name], second[name]) for name in first)
    objective.finish()


def test_every_word_of_the_vocabulary_is_asked_for_by_some_loss():
    asked = {word for loss in shelves.names("loss") for word in wants(TermKeys(loss=loss))}
    built = {
        word
        for loss in shelves.names("loss")
        if isinstance(shelves.find("loss", loss), type)
        for word in shelves.built_with(shelves.find("loss", loss))
    }
    assert VOCABULARY - asked <= {"projected_embedding"}  # for those who write their own
    assert built <= WORDS_OF_CONSTRUCTORS and {"num_samples", "num_classes"} <= built
    assert not needs_teacher(TermKeys(loss="cross_entropy")) and needs_teacher(TermKeys(loss="one_for_all"))
    assert not (MAPS & EMBEDDINGS or WEIGHTS & MAP_LISTS)


def test_a_loss_of_ones_own_on_projected_embeddings(monkeypatch, tmp_path, batch):
    import trainer.losses

    (tmp_path / "nearby.py").write_text(
        "def nearby(projected_embedding, teacher_embedding, student_map):\n"
        "    return (projected_embedding - teacher_embedding).square().mean() + 0 * student_map.sum()\n"
    )
    monkeypatch.setattr(trainer.losses, "__path__", [*trainer.losses.__path__, str(tmp_path)])
    objective = Objective(Small(), [term(loss="nearby", at="last")], some_data(), teacher_of(Small(5)))
    assert objective.bound[0].projector.linear.weight.shape == (10, 6)
    losses = objective(*batch)
    losses["loss"].backward()
    assert list(losses) == ["loss", "nearby/two"] and objective.bound[0].projector.linear.weight.grad.any()


# ---- images without labels among others, and the weights of classes


def test_losses_on_labels_see_the_images_with_a_label_alone(batch):
    images, labels, index = batch
    labels = torch.where(torch.tensor([True, False, True, True, False, False]), labels, -1)
    data, guide = some_data(), teacher_of(Small(5))
    data.train.images.labels[::2] = -1
    terms = [term(loss="cross_entropy"), term(loss="decoupled"), term(loss="kl")]
    objective = Objective(Small(), terms, data, guide)
    objective.rehearse(data)
    losses, known = objective(images, labels, index), labels >= 0
    alone = objective(images[known], labels[known], index[known])
    for name in ("cross_entropy", "decoupled"):
        assert losses[name].item() == pytest.approx(alone[name].item(), rel=1e-5)
    assert losses["kl"].item() != pytest.approx(alone["kl"].item(), rel=1e-3)
    none = objective(images, torch.full_like(labels, -1), index)
    assert none["cross_entropy"].item() == none["decoupled"].item() == 0 and none["loss"].requires_grad
    assert none["kl"].item() == losses["kl"].item()


def test_of_mixed_images_those_whose_both_halves_have_labels_count(batch):
    images, _, index = batch
    data = some_data(mixup=0.3)
    data.train.images.labels[::2] = -1
    objective = Objective(Small(), [term(loss="cross_entropy")], data)
    one_hot = F.one_hot(torch.tensor([0, 1, 2, 3, 0, 1]), K).float()
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    mixed[[1, 4]] -= 0.3 * one_hot.flip(0)[[1, 4]]
    got = objective(images, mixed, index)["loss"]
    rows = [0, 2, 3, 5]
    assert got.item() == pytest.approx(
        objective(images[rows], mixed[rows], index[rows])["loss"].item(), rel=1e-5
    )


def test_weights_of_classes_reach_the_losses_that_take_them(batch):
    images, labels, _ = batch
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    objective = Objective(Small(), [term(loss="cross_entropy")], some_data())
    objective.weigh_classes(weights)
    expected = F.cross_entropy(objective.student(normal(images)), labels, weights)
    assert objective(*batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="class_weights: no loss of this training takes them"):
        Objective(Small(), [term(loss="kl")], some_data(), teacher_of(Small(5))).weigh_classes(weights)
