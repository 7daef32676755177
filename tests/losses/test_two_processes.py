"""Every loss on two processes, in one pair of them: equal gradients on both, and those of the joined batch where it says so."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from tests.losses.feeding import STUDENT_WIDTH, build, call, feed
from tests.losses.test_contract import close
from tests.processes import in_two
from trainer.data.images import Data, InMemory, Part
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.distributed import gather_batch
from trainer.losses.margin_relu import margin_relu
from trainer.losses.similarity import similarity
from trainer.models.lenet5 import lenet5
from trainer.recipe import shelves
from trainer.recipe.keys import Augment, TeacherKeys, TermKeys
from trainer.training.optimizer import freeze_unused

# Those on pairs of samples, which with `gather` are the pairs of all processes.
GATHER = [name for name in shelves.names("loss") if "gather" in shelves.fields(shelves.find("loss", name))]
ON_EMBEDDINGS = [name for name in GATHER if name != "similarity"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu()


def net_and_maps():
    torch.manual_seed(5)
    return Net(), torch.randn(8, 2, 6, 6), torch.randn(8, 4, 3, 3)


def one_of_two(rank):
    """What this process has of each loss: of a wrapped objective, and of uneven shares of a batch."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    wrapped = {name: gradients_of(name, accelerator, rank) for name in shelves.names("loss")}
    return {"wrapped": wrapped, "embeddings": of_embeddings(rank), "maps": of_maps(rank)}


def gradients_of(name, accelerator, rank):
    """One step of an objective that is wrapped as a training wraps it; each process has images of its own."""
    draw = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (12, 1, 16, 16), dtype=torch.uint8, generator=draw)
    part = Part(InMemory(pixels, torch.randint(0, 10, (12,), generator=draw)), torch.arange(12))
    data = Data(
        name="x", train=part, validation=part, test=part, classes=[str(i) for i in range(10)], mean=(0.5,), std=(0.5,),
        shape=(1, 16, 16), num_samples=12, augment=Augment(),
    )  # fmt: skip
    torch.manual_seed(1)
    teacher = Teacher([lenet5(data.shape, 10, width=4)], [TeacherKeys(model="lenet5")], data.mean, data.std)
    torch.manual_seed(2 + rank)  # the wrapped module starts from the main process's weights, projectors too
    student = lenet5(data.shape, 10, width=3)
    term = shelves.checker(shelves.find("loss", name), TermKeys)(loss=name)
    objective = Objective(student, [term], data, teacher)
    images, labels, index = part.__getitems__(torch.arange(12)[rank::2])
    fed = (images.float() / 255, labels, index)
    freeze_unused(objective, fed)
    wrapped = accelerator.prepare(objective)
    torch.manual_seed(10 + rank)
    loss = wrapped(*fed, 0, 0.5)["loss"]
    accelerator.backward(loss)
    gradient = torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])
    both = [torch.empty_like(gradient) for _ in range(2)]
    dist.all_gather(both, gradient)
    accelerator.free_memory()
    return {
        "apart": (both[0] - both[1]).abs().max().item(),
        "size": gradient.abs().max().item(),
        "loss": loss.item(),
        "missing": [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None],
        "beside": sum(p.numel() for n, p in objective.named_parameters() if not n.startswith("student.")),
    }


def of_embeddings(rank):
    """With 2 and 4 of 6 samples: the gradients of each relation, and a bank."""
    x = feed()
    rows = slice(0, 2) if rank == 0 else slice(2, 6)
    mine = x | {key: x[key][rows] for key in ("student_embedding", "teacher_embedding", "index")}
    found = {"gathered": gather_batch(mine["student_embedding"]), "index": gather_batch(mine["index"])}
    for name in ON_EMBEDDINGS:
        found[name] = gradient_of_body(name, mine, gather=True)
        found[f"{name} alone"] = gradient_of_body(name, mine)
    loss = build("contrastive")
    call("contrastive", loss, mine)
    return found | loss.state_dict()


def gradient_of_body(name, x, **settings):
    """The gradient of a layer that gives the student's embedding, as a network's would be."""
    weight = torch.eye(STUDENT_WIDTH).requires_grad_()
    call(name, build(name, **settings), x | {"student_embedding": x["student_embedding"] @ weight}).backward()
    return weight.grad


def of_maps(rank):
    """With 3 and 5 of 8 samples: a network's gradients of the relation of maps, and a margin."""
    net, images, teacher = net_and_maps()
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    similarity(net(images[mine]), teacher[mine], gather=True).backward()
    for parameter in net.parameters():  # the mean over processes, which is what DDP gives
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2
    overhaul = margin_relu(torch.Size((1, 4, 3, 3)), torch.Size((1, 4, 3, 3)))
    overhaul(teacher[mine], teacher[mine])
    return net.conv.weight.grad, net.conv.bias.grad, overhaul.margin


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_two(one_of_two, tmp_path_factory.mktemp("losses"))


@pytest.mark.parametrize("name", shelves.names("loss"))
def test_gradients_are_equal_on_both(ranks, name):
    found = [rank["wrapped"][name] for rank in ranks]
    assert found[0]["apart"] == found[1]["apart"] == 0
    assert found[0]["size"] > 0 and found[0]["missing"] == []
    # They would not be equal by chance: each process has images of its own.
    assert found[0]["loss"] != found[1]["loss"] or name == "weight_distribution"


def test_projectors_are_among_what_has_equal_gradients(ranks):
    assert sum(found["beside"] > 0 for found in ranks[0]["wrapped"].values()) >= 5


def test_every_gathered_relation_is_tested():
    assert ON_EMBEDDINGS and {name for name in GATHER if name not in ON_EMBEDDINGS} == {"similarity"}


def test_two_processes_learn_what_one_does(ranks):
    found = [rank["embeddings"] for rank in ranks]
    x = feed()
    for one in found:
        assert torch.equal(one["gathered"], x["student_embedding"])
        assert torch.equal(one["index"], x["index"])
    for name in ON_EMBEDDINGS:
        single = gradient_of_body(name, x)
        averaged = (found[0][name] + found[1][name]) / 2  # what DDP does
        assert close(averaged, single, 1e-5), name
        assert not close((found[0][f"{name} alone"] + found[1][f"{name} alone"]) / 2, single, 0.1), name
    one = build("contrastive")
    call("contrastive", one, x)
    for bank in ("student_bank", "teacher_bank"):
        assert torch.equal(found[0][bank], found[1][bank])
        assert torch.allclose(found[0][bank], getattr(one, bank), atol=1e-6)
    assert torch.equal(found[0]["log_constants"], found[1]["log_constants"])


def test_two_processes_see_the_pairs_of_the_joined_batch(ranks):
    net, images, teacher = net_and_maps()
    similarity(net(images), teacher).backward()
    margin = [teacher[:, c][teacher[:, c] < 0].mean().item() for c in range(4)]
    for weight, bias, found in (rank["maps"] for rank in ranks):
        torch.testing.assert_close(weight, net.conv.weight.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(bias, net.conv.bias.grad, rtol=1e-5, atol=1e-7)
        assert found.tolist() == pytest.approx(margin, rel=1e-5)
