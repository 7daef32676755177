"""Makes the optimizer of a training, and the moving average of its weights."""

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.distillation.objective import Objective
from trainer.mistakes import Mistake
from trainer.networks.depths import depths
from trainer.networks.features import evaluating
from trainer.recipe.training import Training


def make_optimizer(
    objective: Objective, training: Training, later: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Makes the optimizer of all trainable parameters; those without weight decay are in a second group.

    With `layer_decay` each depth has groups of its own, and their "lr_scale" is the factor on the learning rate.
    later: parameters that are frozen at first; they have groups of their own, because SGD's fused step needs a
    momentum of all parameters of a group or of none. Raises Mistake if all parameters are frozen.
    """
    spared = {id(parameter) for parameter in without_decay(objective, training)}
    scales = lr_scales(objective.student, training.layer_decay) if training.layer_decay else {}
    frozen = {id(parameter) for parameter in later}
    by_group: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for parameter in objective.parameters():
        if parameter.requires_grad:
            key = (scales.get(id(parameter), 1.0), id(parameter) in frozen, id(parameter) in spared)
            by_group.setdefault(key, []).append(parameter)
    if not by_group:
        raise Mistake("there is nothing to train: all parameters are frozen")
    groups: list[dict[str, Any]] = [
        {
            "params": by_group[scale, is_frozen, is_spared],
            "weight_decay": 0.0 if is_spared else training.weight_decay,
            **({"lr_scale": scale} if training.layer_decay else {}),
        }
        for scale, is_frozen, is_spared in sorted(by_group)
    ]
    if training.optimizer == "sgd":
        momentum = 0.0 if training.momentum is None else training.momentum
        return torch.optim.SGD(
            groups, lr=training.lr, momentum=momentum, nesterov=training.nesterov, fused=True
        )
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=training.lr, fused=True)


def lr_scales(network: nn.Module, layer_decay: float) -> dict[int, float]:
    """Returns {id of a parameter: factor on its learning rate}, layer_decay^(layers above its own)."""
    depth = depths(network)
    top = max(depth.values())
    return {
        id(parameter): layer_decay ** (top - depth[name]) for name, parameter in network.named_parameters()
    }


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


def c_compiler() -> str | None:
    """Returns the compiler that Triton calls for a GPU, None without one."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


class Averaged:
    """The exponential moving average of a module's trainable parameters and floating buffers.

    The decay rises to the one asked for, min(decay, (1 + step) / (10 + step)), so that short trainings too forget the
    initial weights (as TensorFlow's ExponentialMovingAverage with `num_updates`).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.live: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.live += [b for b in module.buffers() if b.is_floating_point()]
        self.average = [t.detach().clone() for t in self.live]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the averages after optimizer step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [t.detach() for t in self.live], 1 - decay)

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
