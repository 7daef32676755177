"""Brings a network's outputs into the order of the data's classes, and finds out when they stand in another."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trainer.mistakes import Mistake
from trainer.networks.features import classifiers, evaluating
from trainer.training.weights import Made

#: The least fraction of moved images that another order must get right to be believed.
BELIEVED = 0.3


def in_order(
    made: Made,
    given: Sequence[str | int] | None,
    classes: Sequence[str],
    shape: tuple[int, int, int],
    where: str,
) -> Made:
    """Returns the network with its outputs in the order of the data's classes. Its classifier is changed in place.

    Args:
        made: The network. Its own checkpoint may have recorded its classes.
        given: What the recipe says each output is: names or indexes of the data's classes. None: nothing.
        classes: The data's classes.
        shape: (C, H, W) of the network's input.
        where: The network's name in messages.

    Raises:
        Mistake: If the given classes are not the data's, or the outputs are not those of a linear layer.
    """
    if given is not None:
        reorder(made.network, outputs_of(given, classes, where), shape, where)
        return made
    recorded = made.facts.get("classes")
    recorded = [str(number) for number in range(recorded)] if isinstance(recorded, int) else recorded
    if not recorded or list(recorded) == list(classes) or len(recorded) != len(classes):
        return made
    shown = ", ".join(map(str, recorded[:5])) + (" ..." if len(recorded) > 5 else "")
    if set(recorded) != set(classes):
        note = f"{where}: its checkpoint was taught other classes than the data's: {shown}"
    else:
        reorder(made.network, outputs_of(recorded, classes, where), shape, where)
        note = f"{where}: its checkpoint has the classes in another order ({shown}); its outputs are put in the data's"
    return made._replace(notes=[*made.notes, note])


def outputs_of(given: Sequence[str | int], classes: Sequence[str], where: str) -> list[int]:
    """Returns the position of each of the data's classes among `given`, which names a network's outputs in order."""
    meant = [classes[one] if isinstance(one, int) and 0 <= one < len(classes) else one for one in given]
    unknown = [one for one in meant if one not in classes]
    twice = [one for number, one in enumerate(meant) if one in meant[:number]]
    if unknown or twice or len(meant) != len(classes):
        fault = (
            f"{unknown[0]!r} is none of the data's classes" if unknown
            else f"{twice[0]!r} is there twice" if twice
            else f"there are {len(meant)}"
        )  # fmt: skip
        raise Mistake(f"{where}: classes: {fault}; each of the data's {len(classes)} classes is needed once")
    return [meant.index(name) for name in classes]


@torch.no_grad()
def reorder(network: nn.Module, outputs: Sequence[int], shape: tuple[int, int, int], where: str) -> None:
    """Makes output c of the network what its output outputs[c] was, by the rows of its classifier.

    Raises Mistake, with the network unchanged, if its outputs are not those of a linear layer.
    """
    if list(outputs) == list(range(len(outputs))):
        return
    layers = [
        [m for m in head.modules() if isinstance(m, nn.Linear | nn.Conv2d) and len(m.weight) == len(outputs)]
        for head in classifiers(network)
    ]
    message = (
        f"{where}: its outputs are not those of a linear layer of its own, so they cannot be put in order"
    )
    if not all(layers) or any(hasattr(found[-1], "parametrizations") for found in layers):
        raise Mistake(message)
    device = next(network.parameters()).device
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    order = torch.tensor(list(outputs), device=device)
    with evaluating(network):
        before = network(images)
        tensors = [t for found in layers for t in (found[-1].weight, found[-1].bias) if t is not None]
        for tensor in tensors:
            tensor.copy_(tensor[order])
        if not torch.allclose(network(images), before[:, order], rtol=1e-4, atol=1e-5):
            for tensor in tensors:
                tensor.copy_(tensor[order.argsort()])
            raise Mistake(message)


def another_order(answers: Tensor, labels: Tensor, num_classes: int) -> list[int] | None:
    """Returns the class that each output seems to mean, if another order than the data's explains the answers.

    It is the assignment with the most right answers (Kuhn 1955). It must be right clearly more often than the data's
    order, beyond three standard deviations, and for `BELIEVED` of the images of the classes that it moves.

    Args:
        answers: Predicted classes, int64 [N].
        labels: True classes, int64 [N], -1 for unlabelled images.
        num_classes: K.
    """
    from scipy.optimize import linear_sum_assignment  # here, since it takes a moment

    known = labels >= 0
    answers, labels = answers[known].cpu(), labels[known].cpu()
    confusion = torch.bincount(labels * num_classes + answers, minlength=num_classes**2)
    counts = confusion.view(num_classes, num_classes).numpy()
    # Where the images do not tell, the data's order stays.
    _, outputs = linear_sum_assignment(counts + 1e-3 * np.eye(num_classes), maximize=True)
    moved = outputs != np.arange(num_classes)
    total = int(counts[moved].sum())
    right, before = (int(counts[moved, to[moved]].sum()) for to in (outputs, np.arange(num_classes)))
    if right - before <= 3 * math.sqrt(total) or right < BELIEVED * total:
        return None
    return np.argsort(outputs).tolist()
