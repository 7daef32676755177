"""The same function from a network that packs smaller: BatchNorm folded, dead units dropped, units put in order."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainer import bind, compress
from trainer.compress import Codebook, Mask, Place
from trainer.features import Staged
from trainer.mistakes import Mistake


def norms(model: nn.Module) -> list[tuple[str, str]]:
    """The (layer, BatchNorm after it) pairs that can be folded (`Staged.norms`), those aside that were folded already."""
    known = model.norms() if isinstance(model, Staged) else []
    return [(layer, norm) for layer, norm in known if not isinstance(model.get_submodule(norm), nn.Identity)]


def can_fold(model: nn.Module) -> list[tuple[str, str]]:
    """The (layer, norm) pairs that `fold` would fold. Raises Mistake where there are none, or the weights are shared."""
    pairs = norms(model)
    if not pairs:
        raise Mistake("the network has no BatchNorm that can be folded: lenet5 and separable with batch_norm: true do")
    places = compress.weights(model)
    for layer, _ in pairs:
        if places[layer].mask is not None and not isinstance(places[layer].parametrization, Mask):
            raise Mistake(f"layer {layer!r} shares its weights already: fold before sharing")
    return pairs


def fold(model: nn.Module, spec: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Folds BatchNorm away as `fold_norms`; returns the network and its spec, that of `batch_norm: false`.

    spec: {"model": name, settings} as in a recipe.
    """
    folded = {norm for _, norm in norms(model)}
    return fold_norms(model), _without_norms(spec, folded)


@torch.no_grad()
def fold_norms(model: nn.Module) -> nn.Module:
    """Takes BatchNorm into the layers before it, in place; returns the network.

    In evaluation mode the outputs are the same up to rounding. Each output channel is scaled, so masks stay as they are.
    Raises Mistake for a network that has nothing to fold or whose weights are shared already.
    """
    pairs = can_fold(model)
    places = compress.weights(model)
    for layer, norm_name in pairs:
        module, norm = model.get_submodule(layer), model.get_submodule(norm_name)
        gain = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        scale = gain.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        shift = torch.zeros_like(scale) if norm.bias is None else norm.bias.double()
        before = torch.zeros_like(scale) if module.bias is None else module.bias.double()
        bias = shift + (before - norm.running_mean.double()) * scale
        weight = _tensors(places[layer])[0]
        shape = (-1,) + (1,) * (weight.dim() - 1)
        weight.copy_(weight.double() * scale.reshape(shape) + 0.0)  # + 0.0: a scale below zero must leave no -0.0
        module.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
        owner, _, name = norm_name.rpartition(".")
        setattr(model.get_submodule(owner), name, nn.Identity())
    return model


def _without_norms(spec: Mapping[str, Any], norms: set[str]) -> dict[str, Any]:
    found = {**spec, "batch_norm": False}
    parameters = inspect.signature(bind.find("model", spec["model"])).parameters
    if parameters["batch_norm"].default is False:
        del found["batch_norm"]
    if "resized" in found:
        found["resized"] = {name: size for name, size in found["resized"].items() if name not in norms}
    return found


# ---- units whose order is free ---------------------------------------------------------------------------------------


class _Link(NamedTuple):
    """A hidden layer, the depthwise convolution that its units may pass through, and the layer that they feed."""

    layer: Place
    through: Place | None
    following: Place

    @property
    def num_units(self) -> int:
        return len(self.layer.value)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.layer.places[0][0].bias


def can_tidy(model: nn.Module) -> None:
    """Raises Mistake for a network that `tidy` cannot put in order: one that is no chain of layers, or not folded."""
    if not (isinstance(model, Staged) and model.chain()):
        raise Mistake("the network is no chain of layers whose units could be moved: lenet300, lenet5, lenet5_caffe and "
                         "separable (residual: false) are")
    for _, norm in norms(model):
        raise Mistake(f"{norm!r} stands between layers whose units could be moved: fold it away first (stage fold, "
                         "before share)")


def _links(model: nn.Module) -> Iterator[_Link]:
    can_tidy(model)
    places = compress.weights(model)
    chain = model.chain()
    depthwise = {name for name in chain if getattr(model.get_submodule(name), "groups", 1) > 1}
    for number, name in enumerate(chain[:-1]):
        if name not in depthwise:
            through = places[chain[number + 1]] if chain[number + 1] in depthwise else None
            yield _Link(places[name], through, places[chain[number + 1 + (through is not None)]])


def _tensors(place: Place) -> list[Tensor]:
    """The tensors of a weight's own shape that make it up: itself, weight and mask, or the codes of a codebook."""
    module, attribute = place.places[0]
    found = place.parametrization
    if found is None:
        return [getattr(module, attribute)]
    if isinstance(found, Codebook):
        return [found.codes]
    if isinstance(found, Mask):
        return [module.parametrizations[attribute].original, found.mask]
    raise Mistake(f"layer {place.name!r} is still deciding which values it shares")


def _by_unit(tensor: Tensor, num_units: int) -> Tensor:
    """[outputs, units, weights of each]: what a weight does with each unit that feeds it, maps laid flat included."""
    return tensor.reshape(len(tensor), num_units, -1)


@torch.no_grad()
def drop_dead(model: nn.Module) -> dict[str, int]:
    """Sets all weights and the bias of hidden units that do not matter to zero, in place; {layer: such units, in all}.

    A unit of which nothing goes on is dropped: the outputs stay as they are. So is one that nothing comes into: what it
    gives, relu(bias), is the same for every image, and goes into the biases of the layer that it feeds (outputs are
    then the same up to rounding). That unit stays where it gives something to a convolution that is padded, whose
    borders do not see it, or to a layer without bias. Raises Mistake as `can_tidy`.
    """
    links = list(_links(model))
    counts: dict[str, int] = {}
    while True:  # what fed a dropped unit, or was fed by it, may be dead too now
        found = {link.layer.name: _drop_units(link) for link in links}
        if found == counts:
            return counts
        counts = found


def _drop_units(link: _Link) -> int:
    """Drops the dead units of a layer; returns how many there are."""
    num_units = link.num_units
    outgoing = _by_unit(link.following.value, num_units)
    goes_on = outgoing.ne(0).any(2).any(0)
    if link.through is not None:
        passing = link.through.value.reshape(num_units, -1)
        goes_on &= passing.ne(0).any(1)
    comes_in = link.layer.value.reshape(num_units, -1).ne(0).any(1)
    constant = torch.zeros(num_units, device=comes_in.device) if link.bias is None else torch.relu(link.bias)
    silent = ~comes_in & (constant == 0)
    told = ~comes_in & (constant != 0) & goes_on
    following = link.following.places[0][0]
    if told.any() and following.bias is not None and not _padded(link):
        given = torch.where(told, constant.double(), 0.0)
        if link.through is not None:
            given = given * passing.double().sum(1)
        following.bias.copy_(following.bias.double() + outgoing.double().sum(2) @ given)
    else:
        told[:] = False
    dead = ~goes_on | silent | told
    for tensor in _tensors(link.layer):
        tensor[dead] = 0
    if link.bias is not None:
        link.bias[dead] = 0
    for tensor in _tensors(link.through) if link.through is not None else []:
        tensor[dead] = 0
    for tensor in _tensors(link.following):
        tensor.copy_(torch.where(dead[:, None], 0, _by_unit(tensor, num_units)).reshape(tensor.shape))
    return int(dead.sum())


def _padded(link: _Link) -> bool:
    layers = [place.places[0][0] for place in (link.through, link.following) if place is not None]
    return any(isinstance(layer, nn.Conv2d) and any(layer.padding) for layer in layers)


@torch.no_grad()
def tidy(model: nn.Module, order: Literal["alike", "count"] = "alike") -> dict[str, int]:
    """`drop_dead`, and hidden units sorted so that the positions of their weights are cheap to code, in place.

    order: `alike`, each unit followed by the one most like it (`codec.unit_order`); `count`, by their number of
    weights. The outputs are the same up to the order in which sums are added up. Returns {layer: units dropped}.
    """
    from trainer.codec import unit_order  # here: a recipe is read without the coder

    counts = drop_dead(model)
    for link in _links(model):
        weight = link.layer.value
        if order == "alike":
            units = torch.from_numpy(unit_order(weight.cpu().numpy())).to(weight.device)
        else:
            units = weight.reshape(len(weight), -1).ne(0).sum(1).argsort(descending=True, stable=True)
        rows = _tensors(link.layer) + ([] if link.through is None else _tensors(link.through))
        for tensor in [*rows, *([] if link.bias is None else [link.bias])]:
            tensor.copy_(tensor[units].clone())
        for tensor in _tensors(link.following):
            tensor.copy_(_by_unit(tensor, len(units))[:, units].reshape(tensor.shape))
    return counts
