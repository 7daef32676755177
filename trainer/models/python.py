"""Networks of somebody else's code: `model: python:my_package.my_module:build`."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from trainer.mistakes import Mistake
from trainer.recipe.shelves import PYTHON, fields, ones_own


def name_keys(function: Callable) -> dict[str, tuple[Any, Any]]:
    """Returns the recipe keys of such a function: its keyword-only arguments, if all have type hints.

    Otherwise none: `options` then passes them on.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.KEYWORD_ONLY and p.annotation is p.empty for p in parameters):
        return {}
    return fields(function)


def python(
    input_shape: tuple[int, int, int],
    num_classes: int,
    name: str,
    /,  # the model's name alone says it: a file's settings must not name code
    *,
    options: dict[str, Any] = {},
    **keys: Any,
) -> nn.Module:
    """Builds what the function `name` ('module:function') returns for (input_shape, num_classes, **options, **keys).

    The module is installed, or in the folder where the program was started. The function's keyword-only arguments are
    recipe keys too; options: further keyword arguments. Raises Mistake if there is no such function, or if it does not
    return an `nn.Module`.
    """
    built = ones_own(PYTHON + name)(input_shape, num_classes, **options, **keys)
    if not isinstance(built, nn.Module):
        raise Mistake(f"python:{name}: returned {type(built).__name__}; an nn.Module is allowed")
    return built
