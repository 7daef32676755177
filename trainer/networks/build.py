"""Builds the networks of a recipe."""

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from trainer.mistakes import Mistake
from trainer.networks.features import evaluating
from trainer.networks.norms import adjoining, give_biases, remove_norms
from trainer.networks.output import take_output
from trainer.networks.quantizers import attach
from trainer.networks.sizes import resize
from trainer.recipe import shelves
from trainer.recipe.keys import ModelKeys, StudentKeys, TeacherKeys

#: What a network's own code raises when its settings or its source are faulty.
FAULTS = (
    *(ValueError, TypeError, RuntimeError, ImportError, LookupError),
    *(AttributeError, AssertionError, ArithmeticError, SyntaxError, NameError),
)


def spec(keys: ModelKeys) -> dict[str, Any]:
    """Returns what rebuilds the network: the model's name and the settings that differ from their defaults."""
    settings = shelves.own_settings(keys, _base(keys))
    fields = type(keys).model_fields
    changed = {n: v for n, v in settings.items() if v != fields[n].default and n != "pretrained"}
    return {"model": keys.model} | changed | _output(keys)


def _output(keys: ModelKeys) -> dict[str, Any]:
    return {} if keys.output is None else {"output": keys.output}


def _base(keys: ModelKeys) -> type[ModelKeys]:
    return next(base for base in (TeacherKeys, StudentKeys, ModelKeys) if isinstance(keys, base))


def build(spec: dict[str, Any], shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Builds the network of a spec, initialised from torch's global generator.

    Args:
        spec: {"model": name, settings}. If channels were removed, "resized" holds the new sizes of those layers; if its
            BatchNorm was folded away, "folded" is true; of a network with several outputs "output" says which is the answer. If it is quantized, "maps" holds the steps of its
            maps (`quantizers.attach`), and "biased" the layers that were given a bias for that.
        shape: (C, H, W) of the images.
        num_classes: Width K of the logits.

    Raises:
        Mistake: If the network cannot be built.
    """
    settings = {
        key: value
        for key, value in spec.items()
        if key not in ("model", "resized", "folded", "output", "biased", "maps")
    }
    function = shelves.find("model", spec["model"])
    _, rest = shelves.split("model", spec["model"])
    try:
        model = function(shape, num_classes, *([rest] if rest else []), **settings)
    except Mistake:
        raise
    except FAULTS as error:
        message = (
            f"{type(error).__name__}: {error}" if isinstance(error, LookupError | AssertionError) else error
        )
        raise Mistake(f"model {spec['model']!r} cannot be built for images {shape}: {message}") from error
    _materialize(model, shape)
    if spec.get("folded"):
        remove_norms(model, adjoining(model))
    resize(model, spec.get("resized", {}))
    take_output(model, spec.get("output"))
    give_biases(model, spec.get("biased", []))
    attach(model, spec.get("maps", {}))
    return model


@torch.no_grad()
def _materialize(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Gives lazy modules their weights, whose sizes they take from an input."""
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        with evaluating(model):
            model(torch.zeros(1, *shape))


def build_entry(keys: ModelKeys, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Builds the network of a recipe's entry, with timm's pretrained weights where the entry asks for them."""
    settings = shelves.own_settings(keys, _base(keys)) | _output(keys)
    return build({"model": keys.model} | settings, shape, num_classes)
