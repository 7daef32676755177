"""Building the networks of a recipe."""

from typing import Any

from torch import nn

from trainer.mistakes import Mistake
from trainer.networks.sizes import resize
from trainer.recipe import shelves
from trainer.recipe.keys import ModelKeys, StudentKeys, TeacherKeys

#: What a network's own code raises when its settings or its source are faulty.
FAULTS = (
    *(ValueError, TypeError, RuntimeError, ImportError, LookupError),
    *(AttributeError, AssertionError, ArithmeticError, SyntaxError, NameError),
)


def spec(keys: ModelKeys) -> dict[str, Any]:
    """What rebuilds the network: the model's name and those settings that differ from their defaults."""
    settings = shelves.own_settings(keys, _base(keys))
    fields = type(keys).model_fields
    return {"model": keys.model} | {
        n: v for n, v in settings.items() if v != fields[n].default and n != "pretrained"
    }


def _base(keys: ModelKeys) -> type[ModelKeys]:
    return next(base for base in (TeacherKeys, StudentKeys, ModelKeys) if isinstance(keys, base))


def build(spec: dict[str, Any], shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The network of a spec, freshly initialised from torch's generator. Raises Mistake when it cannot be built.

    spec: {"model": name, settings}, and where channels were removed "resized": the sizes of those layers (`channels`).
    """
    settings = {key: value for key, value in spec.items() if key not in ("model", "resized")}
    function = shelves.find("model", spec["model"])
    _, rest = shelves.split("model", spec["model"])
    try:
        model = function(shape, num_classes, *([rest] if rest else []), **settings)
    except Mistake:
        raise
    except FAULTS as error:
        told = (
            f"{type(error).__name__}: {error}" if isinstance(error, LookupError | AssertionError) else error
        )
        raise Mistake(f"model {spec['model']!r} cannot be built for images {shape}: {told}") from error
    resize(model, spec.get("resized", {}))
    return model


def build_entry(keys: ModelKeys, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The network of a recipe's entry, with timm's pretrained weights where the entry asks for them."""
    return build({"model": keys.model} | shelves.own_settings(keys, _base(keys)), shape, num_classes)
