"""Anybody's network: `model: python:my_package.my_module:build`."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from trainer.mistakes import Mistake
from trainer.recipe.shelves import PYTHON, fields, ones_own


def name_keys(function: Callable) -> dict[str, tuple[Any, Any]]:
    """The keys of one's own function: those keyword-only arguments that have a type hint. `options` reaches the others."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.KEYWORD_ONLY and p.annotation is p.empty for p in parameters):
        return {}
    return fields(function)


def python(
    input_shape: tuple[int, int, int],
    num_classes: int,
    name: str,
    *,
    options: dict[str, Any] = {},
    **keys: Any,
) -> nn.Module:
    """What the function `name` ('module:function') returns for (input_shape, num_classes, **options, **keys).

    The module is looked for among the installed ones and in the folder the program was started in. Its keyword-only
    arguments are keys too. Raises Mistake when there is no such function, or what it returns is no `nn.Module`.
    """
    built = ones_own(PYTHON + name)(input_shape, num_classes, **options, **keys)
    if not isinstance(built, nn.Module):
        raise Mistake(f"python:{name}: returned {type(built).__name__}; an nn.Module is allowed")
    return built
