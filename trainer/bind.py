"""Opens shelf files by name and turns a signature into a checker: the one place that reaches up.

The key names the shelf, the value names the file: `loss: kl` is `trainer/losses/kl.py`, which defines `kl`. Its
keyword-only arguments are its recipe keys (type hints checked by pydantic); its positional arguments say, by name,
what the program feeds it.
"""

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

SHELVES = {"loss": "losses", "stage": "stages", "dataset": "datasets", "model": "models"}


def names(key: str) -> list[str]:
    """The files on the shelf of `key` (loss, stage, dataset or model), in alphabetical order."""
    package = importlib.import_module(f"trainer.{SHELVES[key]}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def split(key: str, value: str) -> tuple[str, str | None]:
    """File and remainder of a value: 'timm/resnet18' is file 'timm' with 'resnet18', 'lenet5' is file 'lenet5'."""
    if key == "model" and value.startswith("hf-hub:"):
        return "timm", value
    for mark in "/:":
        head, found, rest = value.partition(mark)
        if key == "model" and found and rest and head in ("timm", "python"):
            return head, rest
    return value, None


def find(key: str, value: str) -> Callable:
    """What the shelf file named by `value` defines. Raises ValueError, with the nearest name, when there is none."""
    file, _ = split(key, value)
    if file not in names(key):
        raise ValueError(f"there is no {key} {value!r}{nearest(file, names(key))}")
    return getattr(importlib.import_module(f"trainer.{SHELVES[key]}.{file}"), file)


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' or, when nothing is near, '; there are ...'."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f"; there are: {', '.join(known)}" if known else ""


def fed(function: Callable) -> list[str]:
    """Names of the positional arguments: what a function, or a class's `forward`, wants to be fed."""
    if inspect.isclass(function):
        function = function.forward
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.name != "self"]


def built_with(cls: type) -> list[str]:
    """Names of the positional arguments of a class's constructor."""
    return [n for n in fed(cls.__init__) if n != "self"]


@functools.cache
def checker(function: Callable, base: type[BaseModel]) -> type[BaseModel]:
    """`base` with one more field for each keyword-only argument of `function`; unknown keys are refused."""
    parameters = inspect.signature(function).parameters.values()
    fields: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert parameter.annotation is not parameter.empty, f"{function.__name__}: {parameter.name} has no type"
            assert parameter.name not in base.model_fields, f"{function.__name__}: {parameter.name} is a common key"
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (parameter.annotation, default)
    # A shelf file may define `check(settings)`, which raises ValueError for settings that do not go together.
    check = getattr(inspect.getmodule(function), "check", None)
    validators = {}
    if check is not None:
        validators["check"] = model_validator(mode="after")(lambda checked: (check(checked), checked)[1])
    return create_model(function.__name__, __base__=base, __validators__=validators, **fields)


def own_settings(checked: BaseModel, base: type[BaseModel]) -> dict[str, Any]:
    """The settings that are the shelf file's own, not the common keys of `base`."""
    return {name: getattr(checked, name) for name in type(checked).model_fields if name not in base.model_fields}


class Entry(BaseModel):
    """A mapping in a recipe; a key that is not a field is a fault."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def from_shelf(key: str, base: type[BaseModel]) -> Any:
    """The type of a recipe's mapping whose `key` names a shelf file: common keys from `base`, the rest from the file."""

    def check(given: Any) -> Any:
        if isinstance(given, base):
            return given
        if not isinstance(given, dict):
            raise PydanticCustomError("mapping", "got {got}; a mapping with the key {key!r} is allowed",
                                      {"got": repr(given), "key": key})
        if key not in given:
            raise _fault(key, "missing, required", given)
        if not isinstance(given[key], str):
            raise _fault(key, f"got {given[key]!r}; a name is allowed", given)
        try:
            function = find(key, given[key])
        except ValueError as error:
            raise _fault(key, str(error), given) from None
        return checker(function, base).model_validate(given)

    return Annotated[base, BeforeValidator(check)]


def _fault(key: str, message: str, given: Any) -> ValidationError:
    error = PydanticCustomError("entry", "{message}", {"message": message})
    return ValidationError.from_exception_data(key, [InitErrorDetails(type=error, loc=(key,), input=given)])
