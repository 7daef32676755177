"""The optimizer of a training, and the moving average of its weights."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainer.distillation.objective import Objective
from trainer.mistakes import Mistake
from trainer.networks.features import evaluating
from trainer.recipe.keys import Training


def make_optimizer(objective: Objective, training: Training) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters; those without weight decay are in a group of their own."""
    spared = {id(parameter) for parameter in without_decay(objective, training)}
    trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if not trainable:
        raise Mistake("there is nothing to train: all parameters are frozen")
    groups = [
        {"params": [p for p in trainable if id(p) not in spared], "weight_decay": training.weight_decay},
        {"params": [p for p in trainable if id(p) in spared], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "sgd":
        momentum = 0.0 if training.momentum is None else training.momentum
        return torch.optim.SGD(
            groups, lr=training.lr, momentum=momentum, nesterov=training.nesterov, fused=True
        )
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=training.lr, fused=True)


def without_decay(objective: Objective, training: Training) -> list[nn.Parameter]:
    """The parameters that no weight decay is put on, for every optimizer alike.

    Of the student its norms and biases, which have one dimension, as in timm; whatever carries a mark, `no_decay`, such
    as the values that weights share; and all that is learned beside the student: projectors, parameters of losses.
    With `decay_all` only what carries the mark.
    """
    marked = [parameter for parameter in objective.parameters() if getattr(parameter, "no_decay", False)]
    # Where nothing decays the groups are as they always were, so that interrupted trainings go on.
    if training.decay_all or not training.weight_decay:
        return marked
    of_student = {id(parameter): parameter for parameter in objective.student.parameters()}
    beside = [parameter for parameter in objective.parameters() if id(parameter) not in of_student]
    return [*marked, *beside, *(p for p in of_student.values() if p.ndim <= 1)]


def cpp_compiler() -> str:
    """The compiler that torch.compile calls for a CPU."""
    return os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))


class Averaged:
    """The exponential moving average of a module's trainable parameters and floating buffers."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.live: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.live += [b for b in module.buffers() if b.is_floating_point()]
        self.average = [t.detach().clone() for t in self.live]
        self._mix = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        self._mix(self.average, [t.detach() for t in self.live], None)

    @torch.no_grad()
    def swap(self) -> None:
        """Puts the average into the module and keeps what was there; a second call undoes the first."""
        for live, average in zip(self.live, self.average, strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)


def freeze_unused(objective: Objective, batch: Sequence[Any]) -> list[nn.Parameter]:
    """Freezes the parameters that the losses do not reach (a head, under losses on maps alone), and returns them.

    DDP waits for a gradient of every trainable parameter, so these must be told beforehand.
    """
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    with evaluating(objective):
        objective(*batch)["loss"].backward()
    unused = [p for p in objective.parameters() if p.requires_grad and p.grad is None]
    objective.zero_grad(set_to_none=True)
    for name, buffer in objective.named_buffers():
        buffer.copy_(buffers[name])
    for parameter in unused:
        parameter.requires_grad_(False)
    return unused
