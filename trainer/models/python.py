"""Anybody's network: `model: python:my_package.my_module:build`."""

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from trainer.mistakes import Mistake


def python(
    input_shape: tuple[int, int, int], num_classes: int, name: str, *, options: dict[str, Any] = {}
) -> nn.Module:
    """What the function `name` ('module:function') returns for (input_shape, num_classes, **options).

    The module is looked for among the installed ones and in the folder the program was started in. Raises Mistake
    when there is no such function, or what it returns is no `nn.Module`.
    """
    module_name, _, function_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise Mistake(f"python:{name}: there is no module {error.name!r}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise Mistake(f"python:{name}: module {module_name!r} has no function {function_name!r}")
    built = function(input_shape, num_classes, **options)
    if not isinstance(built, nn.Module):
        raise Mistake(f"python:{name}: returned {type(built).__name__}; an nn.Module is allowed")
    return built
