"""Converts a pruned or shared network to plain weights, and restores one from a checkpoint."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.compression.codebooks import set_codebook
from trainer.compression.masks import set_mask
from trainer.compression.parametrizations import Mask, bake_weight
from trainer.compression.weights import weights_of
from trainer.mistakes import Mistake


def bake(model: nn.Module) -> nn.Module:
    """Turns all masks and codebooks of a model into plain weights of the same values, in place."""
    for layer in weights_of(model).values():
        if layer.parametrization is not None:
            bake_weight(layer)
    return model


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state_dict that the model would have without parametrizations, with the weights as the network uses them."""
    state = {}
    for key, tensor in model.state_dict().items():
        head, found, tail = key.partition("parametrizations.")
        attribute, _, part = tail.partition(".")
        if not found:
            state[key] = tensor
        elif part.startswith("original"):  # weight_norm has two of them
            module = model.get_submodule(head.rstrip("."))
            state[head + attribute] = getattr(module, attribute).detach()
    return state


def plain_key(key: str) -> str:
    """Returns the key in `dense_state` of a key of a masked or shared network."""
    return key.replace("parametrizations.", "").removesuffix(".original")


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state_dict of a masked or shared model; masks and codebooks are made as its keys say.

    Raises Mistake if keys or shapes do not fit.
    """
    bake(model)
    layers = weights_of(model)
    by_key = {_key(model, *where): layer for layer in layers.values() for where in layer.holders[:1]}
    for key, tensor in state.items():
        for ending in (".0.mask", ".0.codes"):
            if not key.endswith(ending):
                continue
            weight_key = key.removesuffix(ending).replace("parametrizations.", "")
            if weight_key not in by_key:
                continue  # a tied weight's second name, or a missing layer, which load_state_dict below reports
            layer = by_key[weight_key]
            if ending == ".0.mask":
                set_mask(layer, tensor.to(layer.value.device))
                if key.removesuffix("mask") + "score" in state:
                    found = layer.parametrization
                    assert isinstance(found, Mask)
                    found.watch(None, torch.zeros_like(layer.value.detach()))
            else:
                original = state[key.removesuffix(".0.codes") + ".original"]
                set_codebook(layer, tensor, original)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise Mistake(f"the weights do not fit this network: {error}") from None


def _key(model: nn.Module, module: nn.Module, attribute: str) -> str:
    path = next(path for path, candidate in model.named_modules() if candidate is module)
    return f"{path}.{attribute}".lstrip(".")


def dense_bytes(model: nn.Module) -> int:
    """Returns the bytes of all parameters and statistics, dense, in the network's own types (float32: 4 each)."""
    return sum(tensor.numel() * tensor.element_size() for tensor in dense_state(model).values())


def rewind_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies an earlier `dense_state` back into parameters and statistics, in place; the masks stay.

    Frankle & Carbin 2019 (The Lottery Ticket Hypothesis); Renda et al. 2020 (Comparing Rewinding and Fine-tuning).
    """
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            plain = plain_key(key)
            if plain in state:
                tensor.copy_(state[plain])
