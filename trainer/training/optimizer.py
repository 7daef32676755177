"""Makes the optimizer of a training, and the moving average of its weights."""

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
from trainer.recipe.training import Training


def make_optimizer(objective: Objective, training: Training) -> torch.optim.Optimizer:
    """Makes the optimizer of all trainable parameters; those without weight decay are in a second group.

    Raises Mistake if all parameters are frozen.
    """
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
    """Returns the parameters without weight decay, by the same rule for every optimizer.

    These are the student's norms and biases (parameters of one dimension, as in timm), parameters with the mark `no_decay`
    (shared values), and everything that is learned beside the student: projectors, parameters of losses. With `decay_all`
    or without any weight decay, only those with the mark.
    """
    marked = [parameter for parameter in objective.parameters() if getattr(parameter, "no_decay", False)]
    # Without decay the groups stay as in earlier versions, so that interrupted trainings can continue.
    if training.decay_all or not training.weight_decay:
        return marked
    of_student = {id(parameter): parameter for parameter in objective.student.parameters()}
    beside = [parameter for parameter in objective.parameters() if id(parameter) not in of_student]
    return [*marked, *beside, *(p for p in of_student.values() if p.ndim <= 1)]


def cpp_compiler() -> str:
    """Returns the compiler that torch.compile calls for a CPU."""
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
        """Updates the averages after an optimizer step."""
        self._mix(self.average, [t.detach() for t in self.live], None)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the module's tensors with their averages; a second call undoes the first."""
        for live, average in zip(self.live, self.average, strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)


def freeze_unused(objective: Objective, batch: Sequence[Any]) -> list[nn.Parameter]:
    """Freezes the parameters that the losses do not reach (a head, under losses on maps alone), and returns them.

    DDP waits for a gradient of every trainable parameter, so these must be frozen before. batch: the objective's arguments.
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
