"""Finds the weights of a network that can be pruned and shared: Linear, Conv, Embedding, LSTM, GRU, attention."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from trainer.compression.parametrizations import OURS, Codebook, Mask, TrainedCodebook, parametrized
from trainer.mistakes import Mistake, nearest

#: Hooks that compute a weight from other tensors before every forward pass, and what ends that.
_COMPUTING = {
    WeightNorm: "remove_weight_norm",
    SpectralNorm: "remove_spectral_norm",
    prune.BasePruningMethod: "prune.remove",
}

#: Types of the weights that can be pruned and shared.
_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Weight:
    """A weight of a network: its name, and the (module, attribute) pairs that hold it (several for a tied weight)."""

    def __init__(self, name: str, module: nn.Module, attribute: str) -> None:
        self.name = name
        self.holders = [(module, attribute)]

    @property
    def value(self) -> Tensor:
        """The weight as the network uses it, masked or shared."""
        module, attribute = self.holders[0]
        return getattr(module, attribute)

    @property
    def parametrization(self) -> nn.Module | None:
        """The mask or codebook of the weight; None without one."""
        module, attribute = self.holders[0]
        if parametrize.is_parametrized(module, attribute):
            return parametrized(module, attribute)[0]
        return None

    @property
    def mask(self) -> Tensor | None:
        """Bool of the weight's shape, False where it is pruned; None for a weight that is neither pruned nor shared."""
        found = self.parametrization
        if isinstance(found, Mask):
            return found.mask
        if isinstance(found, Codebook):
            return found.codes != 0
        if isinstance(found, TrainedCodebook):
            return found.alive
        return None

    @property
    def alive(self) -> Tensor:
        """Like `mask`, but all True for a weight without one."""
        return torch.ones_like(self.value, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def parameter(self) -> nn.Parameter:
        """The tensor that is trained: the weight itself (under a mask too), the centroids, or the latent weights."""
        module, attribute = self.holders[0]
        if parametrize.is_parametrized(module, attribute):
            original: Any = parametrized(module, attribute).original  # torch calls it a Tensor
            return original
        return getattr(module, attribute)

    @property
    def trainable(self) -> bool:
        """Whether the weight requires a gradient."""
        return self.parameter.requires_grad

    @property
    def parts(self) -> int:
        """Number of matrices stacked along the first axis: gates of an LSTM or GRU; query, key, value."""
        module, attribute = self.holders[0]
        if (
            isinstance(module, nn.LSTM | nn.LSTMCell)
            and attribute.startswith("weight_")
            and "hr" not in attribute
        ):
            return 4
        if isinstance(module, nn.GRU | nn.GRUCell) and attribute.startswith("weight_"):
            return 3
        if attribute == "in_proj_weight" or self.name.split(".")[-1] == "qkv":
            return (
                3 if len(self.value) % 3 == 0 else 1
            )  # a qkv of fewer keys than queries has no equal thirds
        return 1

    @property
    def input_axis(self) -> int:
        """The axis of the layer's inputs (in a convolution: of its input channels)."""
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        return 0 if isinstance(self.holders[0][0], transposed) else 1


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """Returns the weights that can be pruned and shared, by layer name, in the order of the network.

    These are all parameters of two dimensions or more whose name holds 'weight' (no biases, no norms). `fc1.weight`
    is called 'fc1'; others keep their own name ('lstm.weight_ih_l0'). A tied weight appears once, under its first name.
    Raises Mistake for a weight with a foreign parametrization (`weight_norm`), for one that a hook computes, and for a lazy
    layer that has no shape yet.
    """
    found: dict[int, Weight] = {}
    others: list[tuple[int, nn.Module, str]] = []
    for path, module in model.named_modules():
        _refuse_unready(path, module)
        if isinstance(module, parametrize.ParametrizationList | nn.LayerNorm | nn.RMSNorm):
            continue
        inner = getattr(module, "parametrizations", {})
        own = {name: p for name, p in module.named_parameters(recurse=False) if p is not None}
        own |= {name: getattr(inner[name], "original", inner[name]) for name in inner}
        for attribute in sorted(own):  # a parametrized weight has left its module: keep one order
            key = id(own[attribute])
            if "weight" not in attribute:
                others.append((key, module, attribute))
                continue
            if getattr(module, attribute).dim() < 2:
                continue
            name = path if attribute == "weight" and path else f"{path}.{attribute}".lstrip(".")
            if attribute in inner and not (
                len(inner[attribute]) == 1 and isinstance(inner[attribute][0], OURS)
            ):
                raise Mistake(
                    f"layer {name!r} is parametrized by {type(inner[attribute][0]).__name__.lstrip('_')} already: make it plain first, "
                    "by torch.nn.utils.parametrize.remove_parametrizations"
                )
            if key in found:
                found[key].holders.append((module, attribute))
            else:
                found[key] = Weight(name, module, attribute)
    for key, module, attribute in others:  # a weight that is tied to something of another name
        if key in found:
            found[key].holders.append((module, attribute))
    return {layer.name: layer for layer in found.values()}


def refuse_computed(model: nn.Module) -> None:
    """Raises Mistake for a weight that a hook computes before every forward pass: what is set in it would be lost.

    Likewise for a lazy layer that has no shape yet.
    """
    for path, module in model.named_modules():
        _refuse_unready(path, module)


def _refuse_unready(path: str, module: nn.Module) -> None:
    for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and is_lazy(tensor):
            raise Mistake(
                f"layer {path!r}: its {attribute}, {tensor.dtype} of a {type(module).__name__}, has no shape yet: run the network "
                "on a batch first"
            )
    for hook in module._forward_pre_hooks.values():
        for kind, removal in _COMPUTING.items():
            if isinstance(hook, kind):
                raise Mistake(
                    f"layer {path!r}: its weight is computed by a hook ({type(hook).__name__}): make it plain first, by "
                    f"torch.nn.utils.{removal}"
                )
    for name, value in vars(module).items():
        if name.startswith(("weight", "bias")) and isinstance(value, Tensor) and value.requires_grad:
            raise Mistake(
                f"layer {path!r}: its {name} is a plain tensor that is computed, no parameter: make it one, "
                "or compute it by torch.nn.utils.parametrize"
            )


def choose(layers: Mapping[str, Weight], exclude: Iterable[str] = ()) -> dict[str, Weight]:
    """Returns the weights that are not in `exclude`: 'first', 'last', a layer's name or a module's (all weights below it).

    Raises Mistake for a name that no layer has, and for a weight that is not in `exclude` and is frozen, not finite, of another
    type than float, or on the meta device.
    """
    left = dict(layers)
    order = list(layers)
    if isinstance(exclude, str):
        raise Mistake(f"exclude: got {exclude!r}; a list of names is allowed, such as [{exclude!r}]")
    ends = {"first": order[:1], "last": order[-1:]}
    for word in exclude:
        for name in ends[word] if word in ends else matching(layers, word):
            left.pop(name, None)
    for name, layer in left.items():
        if not layer.trainable:
            raise Mistake(
                f"layer {name!r} is frozen (requires_grad is False): name it in exclude to leave it alone"
            )
        value = layer.value
        if value.dtype not in _TYPES:
            allowed = ", ".join(str(kind).removeprefix("torch.") for kind in _TYPES)
            raise Mistake(
                f"layer {name!r} is of {value.dtype}; {allowed} are allowed: name it in exclude to leave it alone"
            )
        if value.is_meta:
            raise Mistake(f"layer {name!r} is on the meta device and has no values: give it some first")
        if not torch.isfinite(value).all():
            raise Mistake(f"layer {name!r} has weights that are not finite")
    return left


def matching(layers: Mapping[str, Weight], word: str) -> list[str]:
    """Returns the names of the weights that `word` means. Raises Mistake, with the nearest name, if there are none."""
    found = [name for name in layers if name == word or name.startswith(word + ".")]
    if not found:
        raise Mistake(f"there is no layer {word!r}{nearest(word, layers)}")
    return found


def per_layer(layers: Mapping[str, Weight], setting, what: str) -> dict:
    """Returns {layer: value} of a setting that is one value for all layers, or a mapping that must name every layer.

    what: the setting's name. Raises Mistake for a layer without a value, and for an unknown name.
    """
    if not isinstance(setting, Mapping):
        return dict.fromkeys(layers, setting)
    values = {}
    for word, value in setting.items():
        for name in matching(layers, word):
            values[name] = value
    missing = [name for name in layers if name not in values]
    if missing:
        raise Mistake(f"{what}: nothing is given for {', '.join(missing)} (name them here or in exclude)")
    return {name: values[name] for name in layers}


def counts(model: nn.Module) -> dict[str, float]:
    """Returns num_weights, num_nonzero and sparsity (fraction of zeros) over all layers, without biases and norms."""
    total = nonzero = 0
    for layer in weights_of(model).values():
        total += layer.value.numel()
        nonzero += int(torch.count_nonzero(layer.value.detach()))
    return {"num_weights": total, "num_nonzero": nonzero, "sparsity": 1 - nonzero / total if total else 0.0}
