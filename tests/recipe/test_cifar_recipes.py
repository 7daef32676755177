"""The literature's CIFAR-100 pairs: their published settings, the networks' sizes, every loss a header suggests."""

import re
from pathlib import Path

import pytest
import torch

import trainer
from trainer.data.images import Data, InMemory, Part
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.networks.build import build_entry
from trainer.recipe import recipe
from trainer.recipe.text import value

PAIRS = sorted((Path(trainer.__file__).parents[1] / "recipes").glob("cifar100_*.yaml"))


def photographs(keys) -> Data:
    """Twelve made-up images in the shape of CIFAR-100's."""
    numbers = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, 32, 32), generator=numbers, dtype=torch.uint8)
    part = Part(InMemory(images, torch.arange(12)), torch.arange(12))
    classes = [str(number) for number in range(100)]
    return Data("cifar100", part, part, part, classes, (0.5,) * 3, (0.3,) * 3, (3, 32, 32), 12, keys.augment)


def test_all_four_pairs_are_there():
    names = {path.stem.removeprefix("cifar100_") for path in PAIRS}
    assert names == {"resnet32x4_resnet8x4", "wrn40_2_wrn16_2", "resnet56_resnet20", "vgg13_vgg8"}


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_a_published_pair(path):
    text = path.read_text()
    read, _ = recipe.read(path)
    assert "not run yet" in text and read.name == path.stem
    for stage in read.stages:
        how = stage.training
        assert (how.epochs, how.batch_size, how.lr, how.momentum, how.weight_decay, how.decay_all) == (
            240,
            64,
            0.05,
            0.9,
            5e-4,
            True,
        )
        assert (how.optimizer, how.schedule, how.milestones, how.gamma) == (
            "sgd",
            "step",
            [150, 180, 210],
            None,
        )  # x 0.1
    data = photographs(read.data)
    networks = [build_entry(keys, data.shape, 100) for keys in (read.teacher, read.student)]
    told = re.search(r"counts are tested: ([\d,]+) and ([\d,]+)\.", text).groups()
    assert [f"{sum(p.numel() for p in net.parameters()):,}" for net in networks] == list(told)

    suggested = [value(losses) for losses in re.findall(r"^# \w+: +losses: (\[.*\])$", text, re.MULTILINE)]
    assert len(suggested) == 4
    guide = Teacher([networks[0]], [read.teacher], data.mean, data.std)
    for losses in suggested:
        stage = recipe.read(path, {"stages.1.losses": losses})[0].stages[1]
        objective = Objective(networks[1], stage.losses, data, guide, num_epochs=240)
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        objective(images, torch.arange(4), torch.arange(4), epoch=30.0)["loss"].backward()
        gradients = [p.grad for p in objective.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(p.grad is not None and p.grad.any() for p in networks[1].parameters())
        networks[1].zero_grad()
