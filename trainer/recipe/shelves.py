"""Opens shelf files by name and turns a signature into a checker: the one place that reaches up.

The key names the shelf, the value names the file: `loss: kl` is `trainer/losses/kl.py`, which defines `kl`.
`python:module:name` stands for somebody else's file on every shelf; its code runs when a recipe is read, so that
whoever reads the recipe must allow it. A method's keyword-only arguments are its recipe keys (type hints checked by
pydantic); its positional arguments say, by name, what the program feeds it.
"""

import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from trainer.mistakes import Mistake, closest, nearest
from trainer.recipe.faults import fault, restated

SHELVES = {
    "loss": "losses",
    "stage": "stages",
    "dataset": "datasets",
    "model": "models",
    "method": "criteria",
}
PYTHON = "python:"
ALLOW_PYTHON = "it runs the code of that module: allow it by --allow-python (in Python by allow_python=True)"


class OnShelf(NamedTuple):
    """Marks an argument of a stage that itself names a file of a shelf: `method: Annotated[str, OnShelf("method")]`.

    That file's keys stand beside the stage's own in the recipe. Which they are tells `NAME_keys(function)` beside the stage,
    for an argument NAME; without it they are the function's keyword-only arguments. The stage takes them as **keys.
    """

    key: str


def names(key: str) -> list[str]:
    """The files on the shelf of `key` (loss, stage, dataset, model or method), in alphabetical order."""
    package = importlib.import_module(f"trainer.{SHELVES[key]}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def split(key: str, value: str) -> tuple[str, str | None]:
    """File and remainder of a value: 'timm/resnet18' is 'timm' with 'resnet18', 'lenet5' is 'lenet5'."""
    if key == "model":
        if value.startswith("hf-hub:"):
            return "timm", value
        for start in ("timm/", PYTHON):
            if value.startswith(start) and value != start:
                return start[:-1], value.removeprefix(start)
    return value, None


def find(key: str, value: str) -> Callable:
    """What the shelf file named by `value` defines, or what `python:module:name` names.

    Raises Mistake, with the nearest name, when there is none.
    """
    file, _ = split(key, value)
    if value.startswith(PYTHON) and file not in names(key):
        return ones_own(value)
    if file not in names(key):
        raise Mistake(f"there is no {key} {value!r}{nearest(file, names(key))}")
    module = importlib.import_module(f"trainer.{SHELVES[key]}.{file}")
    # A loss with parameters may be a class of the usual spelling: CosineMargin in cosine_margin.py.
    for name in (file, "".join(word.capitalize() for word in file.split("_"))):
        if callable(getattr(module, name, None)):
            return getattr(module, name)
    raise Mistake(f"{key} {value!r}: {module.__file__} defines no {file!r}, which its name promises")


def ones_own(value: str) -> Callable:
    """The function or class that 'python:module:name' names: installed, or in the folder the program was started in."""
    module_name, _, name = value.removeprefix(PYTHON).partition(":")
    if not (module_name and name):
        raise Mistake(f"got {value!r}; python:module:name is allowed")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise Mistake(f"there is no module {error.name!r}, installed or in {Path.cwd()}") from None
    except Exception as error:  # whatever somebody else's code raises
        raise Mistake(
            f"module {module_name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise Mistake(f"module {module_name!r} has no function {name!r}{nearest(name, _callables(module))}")
    return found


def _callables(module: Any) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


def beside(function: Callable, name: str) -> Any:
    """What the file that defines a method defines beside it under `name`; None where it does not, or only imports it."""
    found = getattr(sys.modules[function.__module__], name, None)
    return None if callable(found) and found.__module__ != function.__module__ else found


def fed(function: Callable) -> list[str]:
    """Names of the positional arguments: what a function, or a class's `forward`, wants to be fed."""
    if inspect.isclass(function):
        function = function.forward  # type: ignore[attr-defined]  # every loss that is a class has it
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.name != "self"]


def built_with(cls: type) -> list[str]:
    """Names of the positional arguments of a class's constructor."""
    return fed(cls.__init__)  # type: ignore[misc]  # that of this very class is wanted


def fields(function: Callable) -> dict[str, tuple[Any, Any]]:
    """{name: (type, default)} of the keyword-only arguments; the default is ... where one must be given."""
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if parameter.annotation is parameter.empty:
                raise Mistake(
                    f"{function.__module__}.{function.__qualname__}: {parameter.name} has no type hint"
                )
            found[parameter.name] = (
                parameter.annotation,
                ... if parameter.default is parameter.empty else parameter.default,
            )
    return found


@functools.cache
def checker(
    function: Callable, base: type[BaseModel], chosen: tuple[tuple[str, Callable], ...] = ()
) -> type[BaseModel]:
    """`base` with one more field for each key of `function`, and of what its `OnShelf` arguments choose.

    Unknown keys are refused. A file's `check(settings)` raises Mistake for settings that do not go together.
    """
    keys: dict[str, Any] = fields(function)
    for name, other in chosen:
        keys_of = beside(function, f"{name}_keys") or fields
        keys |= keys_of(other)
    for name in keys:
        if name in base.model_fields:
            raise Mistake(
                f"{function.__module__}.{function.__qualname__}: {name} is a key of every {base.__name__}"
            )
    checks = [beside(found, "check") for found in (function, *(other for _, other in chosen))]
    validators: dict[str, Any] = {
        f"check_{number}": model_validator(mode="after")(_checked_by(check))
        for number, check in enumerate(checks)
        if check is not None
    }
    made = create_model(function.__name__, __base__=base, __validators__=validators, **keys)
    if chosen:
        no_key = classmethod(lambda cls, key: _no_key(cls, key, function, chosen))
        made.no_key = no_key  # type: ignore[attr-defined]  # as `base`, an Entry, has it
    return made


def _no_key(
    cls: type[BaseModel], key: str, function: Callable, chosen: tuple[tuple[str, Callable], ...]
) -> str:
    """As `Entry.no_key`, where other choices of the function's `OnShelf` arguments have more keys."""
    for argument, other in chosen:
        shelf = arguments_on_shelves(function).get(argument)
        if shelf is None:
            continue
        keys_of = beside(function, f"{argument}_keys") or fields
        elsewhere = {name: keys_of(find(shelf, name)) for name in names(shelf)}
        meant = closest(key, {*cls.model_fields, *(k for keys in elsewhere.values() for k in keys)})
        having = [name for name, keys in elsewhere.items() if meant in keys]
        if meant is not None and meant not in cls.model_fields:
            said = "" if meant == key else f" (did you mean {meant!r}?)"
            return f"is no key with {argument} {other.__name__!r}{said}; with {', '.join(having)} {meant!r} is one"
    return f"is no key here{nearest(key, cls.model_fields)}"


def _checked_by(check: Callable[[Any], None]) -> Callable[[Any], Any]:
    def checked(settings: Any) -> Any:
        check(settings)
        return settings

    return checked


def arguments_on_shelves(function: Callable) -> dict[str, str]:
    """{argument: key of its shelf} of the arguments marked `OnShelf`."""
    found = {}
    for name, (annotation, _) in fields(function).items():
        for mark in getattr(annotation, "__metadata__", ()):
            if isinstance(mark, OnShelf):
                found[name] = mark.key
    return found


def chosen(function: Callable, settings: BaseModel) -> Iterator[tuple[str, Callable]]:
    """(argument, function) of each file that checked settings choose beside their own."""
    for name, key in arguments_on_shelves(function).items():
        yield name, find(key, getattr(settings, name))


def own_settings(checked: BaseModel, base: type[BaseModel]) -> dict[str, Any]:
    """The settings that are the shelf file's own, not the common keys of `base`."""
    return {
        name: getattr(checked, name) for name in type(checked).model_fields if name not in base.model_fields
    }


def from_shelf(key: str, base: type[BaseModel]) -> Any:
    """The type of a mapping whose `key` names a shelf file: keys from `base`, and those of the file.

    Validated with the context {"allow_python": True} it may name `python:module:name` too.
    """

    def check(given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, base):
            return given
        if not isinstance(given, dict):
            raise PydanticCustomError(
                "shelf", "it should be a mapping with the key {key}", {"key": repr(key)}
            )
        allowed = bool((info.context or {}).get("allow_python"))
        if key not in given:
            near = closest(
                key, [name for name in given if isinstance(name, str) and name not in base.model_fields]
            )
            told = [
                fault(near, f"is no key here (did you mean {key!r}?)", given)
                if near
                else fault(key, "Field required", given, kind="missing")
            ]
        else:
            function, told = _found(key, key, given[key], allowed)
            if function is not None:
                others = []
                for name, shelf in arguments_on_shelves(function).items():
                    default = fields(function)[name][1]
                    other, faults = _found(shelf, name, given.get(name, default), allowed)
                    told += faults
                    others.append((name, other))
                if given[key].startswith(PYTHON) and function.__name__ == "python":
                    other, faults = _or_fault(
                        ones_own, key, given[key], given[key]
                    )  # a shelf's own file that calls somebody else's
                    told += faults
                    others.append(("name", other))
                if not told:
                    return checker(function, base, tuple(others)).model_validate(given, context=info.context)
        # Which keys the file allows cannot be known; those that every file allows are checked all the same.
        common = {name: value for name, value in given.items() if name in base.model_fields and name != key}
        try:
            base.model_validate(common | {key: key}, context=info.context)
        except ValidationError as error:
            raise ValidationError.from_exception_data(key, [*told, *restated(error)]) from None
        raise ValidationError.from_exception_data(key, told)

    return Annotated[base, BeforeValidator(check)]


def _found(shelf: str, name: str, value: Any, allowed: bool) -> tuple[Callable | None, list]:
    """What a key's value names on a shelf; else None and the fault."""
    if not isinstance(value, str):
        return None, [fault(name, f"it should be the name of a {shelf}", value, kind="shelf")]
    if value.startswith(PYTHON) and not allowed:
        return None, [fault(name, f"{value!r}: {ALLOW_PYTHON}", value)]
    return _or_fault(find, name, value, shelf, value)


def _or_fault(function: Callable, name: str, value: str, *arguments: str) -> tuple[Callable | None, list]:
    try:
        return function(*arguments), []
    except Mistake as error:
        return None, [fault(name, str(error), value)]
