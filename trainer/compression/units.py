"""Drops dead hidden units, and sorts the others so that they pack smaller."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trainer.compression.folding import norms, own_tensors
from trainer.compression.weights import Weight, weights_of
from trainer.mistakes import Mistake
from trainer.networks.blocks import Blocks


class _Link(NamedTuple):
    """A hidden layer, the depthwise convolution that its units may pass through, and the layer that they feed."""

    layer: Weight
    through: Weight | None
    following: Weight

    @property
    def num_units(self) -> int:
        return len(self.layer.value)

    @property
    def bias(self) -> nn.Parameter | None:
        holder: Any = self.layer.holders[0][0]
        return holder.bias


def can_tidy(model: nn.Module) -> None:
    """Raises Mistake for a network that `tidy` cannot handle: one that is not a chain of layers, or not folded."""
    if not (isinstance(model, Blocks) and model.chain()):
        raise Mistake(
            "the network is no chain of layers whose units could be moved: lenet300, lenet5, lenet5_caffe and "
            "separable (residual: false) are"
        )
    for _, norm in norms(model):
        raise Mistake(
            f"{norm!r} stands between layers whose units could be moved: fold it away first (stage fold, "
            "before share)"
        )


def is_chain(model: nn.Module) -> bool:
    """Returns whether `tidy` can handle a network."""
    try:
        can_tidy(model)
    except Mistake:
        return False
    return True


def _links(model: nn.Module) -> Iterator[_Link]:
    can_tidy(model)
    assert isinstance(model, Blocks)
    layers = weights_of(model)
    chain = model.chain()
    depthwise = {name for name in chain if getattr(model.get_submodule(name), "groups", 1) > 1}
    for number, name in enumerate(chain[:-1]):
        if name not in depthwise:
            through = layers[chain[number + 1]] if chain[number + 1] in depthwise else None
            yield _Link(layers[name], through, layers[chain[number + 1 + (through is not None)]])


def _by_unit(tensor: Tensor, num_units: int) -> Tensor:
    """Reshapes a weight to [outputs, units, weights of each unit]; a unit's flattened map has several inputs."""
    return tensor.reshape(len(tensor), num_units, -1)


@torch.no_grad()
def drop_dead(model: nn.Module) -> dict[str, int]:
    """Sets all weights and the bias of dead hidden units to zero, in place; returns {layer: number of dead units}.

    A unit without outgoing weights is dead; the outputs stay exactly the same. A unit without incoming weights is dead
    too: its output relu(bias) is the same for every image, and moves into the biases of the next layer (outputs then
    stay the same up to rounding). Such a unit stays if its output is not zero and the next layer has no bias or is a
    padded convolution, where the padding has no such output. Raises Mistake as `can_tidy` does.
    """
    links = list(_links(model))
    counts: dict[str, int] = {}
    while True:  # units before or after a dropped one may now be dead too
        found = {link.layer.name: _drop_units(link) for link in links}
        if found == counts:
            return counts
        counts = found


def _drop_units(link: _Link) -> int:
    """Drops the dead units of a layer; returns their number."""
    num_units = link.num_units
    outgoing = _by_unit(link.following.value, num_units)
    goes_on = outgoing.ne(0).any(2).any(0)
    if link.through is not None:
        passing = link.through.value.reshape(num_units, -1)
        goes_on &= passing.ne(0).any(1)
    comes_in = link.layer.value.reshape(num_units, -1).ne(0).any(1)
    constant = torch.zeros(num_units, device=comes_in.device) if link.bias is None else torch.relu(link.bias)
    silent = ~comes_in & (constant == 0)
    moved = ~comes_in & (constant != 0) & goes_on
    following: Any = link.following.holders[0][0]
    if moved.any() and following.bias is not None and not _padded(link):
        given = torch.where(moved, constant.double(), 0.0)
        if link.through is not None:
            given = given * passing.double().sum(1)
        following.bias.copy_(following.bias.double() + outgoing.double().sum(2) @ given)
    else:
        moved[:] = False
    dead = ~goes_on | silent | moved
    for tensor in own_tensors(link.layer):
        tensor[dead] = 0
    if link.bias is not None:
        link.bias[dead] = 0
    for tensor in own_tensors(link.through) if link.through is not None else []:
        tensor[dead] = 0
    for tensor in own_tensors(link.following):
        tensor.copy_(torch.where(dead[:, None], 0, _by_unit(tensor, num_units)).reshape(tensor.shape))
    return int(dead.sum())


def _padded(link: _Link) -> bool:
    layers = [layer.holders[0][0] for layer in (link.through, link.following) if layer is not None]
    return any(isinstance(layer, nn.Conv2d) and any(layer.padding) for layer in layers)


@torch.no_grad()
def tidy(model: nn.Module, order: Literal["alike", "count"] = "alike") -> dict[str, int]:
    """Drops dead hidden units (`drop_dead`) and sorts the others, in place; returns {layer: number of dead units}.

    The sorted weights' positions are cheaper to code. The outputs stay the same up to the order of summation.
    order: `alike`, each unit is followed by the one most like it (`unit_order`); `count`, most weights first.
    """

    counts = drop_dead(model)
    for link in _links(model):
        weight = link.layer.value
        if order == "alike":
            units = torch.from_numpy(unit_order(weight.cpu().numpy())).to(weight.device)
        else:
            units = weight.reshape(len(weight), -1).ne(0).sum(1).argsort(descending=True, stable=True)
        rows = own_tensors(link.layer) + ([] if link.through is None else own_tensors(link.through))
        for tensor in [*rows, *([] if link.bias is None else [link.bias])]:
            tensor.copy_(tensor[units].clone())
        for tensor in own_tensors(link.following):
            tensor.copy_(_by_unit(tensor, len(units))[:, units].reshape(tensor.shape))
    return counts


def unit_order(weight: np.ndarray) -> np.ndarray:
    """Returns an order of a layer's units that packs smaller: each unit is followed by the one most like it.

    weight: [units, ...]. The rows of the weight, the bias and the next layer's columns, all in this order, make the
    same network in fewer bytes.
    """
    rows = weight.reshape(len(weight), math.prod(weight.shape[1:]))
    signs = np.sign(np.nan_to_num(rows)).astype(np.float64)
    marks = np.concatenate([10 * signs, 7 * np.abs(signs)], 1)
    alike = marks @ marks.T
    norm = np.sqrt(np.diag(alike)) + 1
    alike /= norm[:, None] * norm
    order = [int(np.abs(signs).sum(1).argmax())] if len(weight) else []
    while len(order) < len(weight):
        alike[:, order[-1]] = -1
        order.append(int(alike[order[-1]].argmax()))
    return np.array(order, np.int64)
