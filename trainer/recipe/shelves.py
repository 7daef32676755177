"""Opens shelf files by name, and turns their signatures into checkers. Only this file imports from floors above it.

The key names the shelf, the value names the file: `loss: kl` is `trainer/losses/kl.py`, which defines `kl`.
`python:module:name` stands for somebody else's code on every shelf; reading a recipe runs it, so the reader must allow
it. A method's keyword-only arguments are its recipe keys (pydantic checks their type hints); its positional arguments
name what the program passes to it.
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
from trainer.recipe.faults import fault, restated, unknown
from trainer.recipe.folders import SHELVES
from trainer.recipe.words import first_sentence

PYTHON = "python:"
ALLOW_PYTHON = "it runs the code of that module: allow it by --allow-python (in Python by allow_python=True)"


class OnShelf(NamedTuple):
    """Marks an argument of a stage that itself names a file of a shelf: `method: Annotated[str, OnShelf("method")]`.

    In the recipe that file's keys are beside the stage's own. They are the keyword-only arguments of its function, or what
    `NAME_keys(function)` beside the stage returns, for an argument NAME. The stage takes them as **keys.
    """

    key: str


def names(key: str) -> list[str]:
    """Returns the files on the shelf of `key` (loss, stage, dataset, model, method or to), in alphabetical order."""
    package = importlib.import_module(f"trainer.{SHELVES[key]}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def first_line(key: str, name: str) -> str:
    """Returns the first sentence of a file's manual, its function's docstring."""
    return " ".join(first_sentence((find(key, name).__doc__ or "").partition("\n\n")[0]).split())


def split(key: str, value: str) -> tuple[str, str | None]:
    """Returns file and remainder of a value: ('timm', 'resnet18') for 'timm/resnet18', ('lenet5', None) for 'lenet5'."""
    if key == "model":
        if value.startswith("hf-hub:"):
            return "timm", value
        for start in ("timm/", PYTHON):
            if value.startswith(start) and value != start:
                return start[:-1], value.removeprefix(start)
    return value, None


def find(key: str, value: str) -> Callable:
    """Returns the function or class that `value` names: of a shelf file, or of `python:module:name`.

    Raises Mistake, with the nearest name, if there is none.
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
    """Imports what 'python:module:name' names, installed or in the folder where the program was started.

    Raises Mistake if there is no such module or name, and if the import fails.
    """
    module_name, _, name = value.removeprefix(PYTHON).partition(":")
    if not (module_name and name):
        raise Mistake(f"got {value!r}; python:module:name is allowed")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise Mistake(f"there is no module {error.name!r}, installed or in {Path.cwd()}") from None
    except Exception as error:  # somebody else's code may raise anything
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
    """Returns what a method's file defines beside it as `name`; None if it does not, or only imports it."""
    found = getattr(sys.modules[function.__module__], name, None)
    return None if callable(found) and found.__module__ != function.__module__ else found


def fed(function: Callable) -> list[str]:
    """Returns the names of the positional arguments of a function, or of a class's `forward`."""
    if inspect.isclass(function):
        function = function.forward  # type: ignore[attr-defined]  # every loss that is a class has it
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.name != "self"]


def built_with(cls: type) -> list[str]:
    """Returns the names of the positional arguments of a class's constructor."""
    return fed(cls.__init__)  # type: ignore[misc]  # that of this very class is wanted


def fields(function: Callable) -> dict[str, tuple[Any, Any]]:
    """Returns {name: (type, default)} of the keyword-only arguments; the default of a required one is ... .

    Raises Mistake for an argument without a type hint, or with one whose names its module does not have.
    """
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if parameter.annotation is parameter.empty:
                raise Mistake(
                    f"{function.__module__}.{function.__qualname__}: {parameter.name} has no type hint"
                )
            found[parameter.name] = (
                _hint(function, parameter),
                ... if parameter.default is parameter.empty else parameter.default,
            )
    return found


def _hint(function: Callable, parameter: inspect.Parameter) -> Any:
    """Returns the type hint of an argument, which is a text under `from __future__ import annotations`."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    try:
        return eval(parameter.annotation, vars(sys.modules[function.__module__]).copy())
    except Exception as error:
        where = f"{function.__module__}.{function.__qualname__}: {parameter.name}"
        raise Mistake(f"{where}: its type hint {parameter.annotation!r} has no meaning: {error}") from None


@functools.cache
def checker(
    function: Callable, base: type[BaseModel], chosen: tuple[tuple[str, Callable], ...] = ()
) -> type[BaseModel]:
    """Makes a pydantic model: `base` with one more field for each key of `function` and of the files that it chooses.

    Unknown keys are refused. A file's `check(settings)` raises Mistake for settings that contradict each other.

    Args:
        function: The shelf file's function or class.
        base: The common keys of its shelf.
        chosen: (argument, function) of each file that an `OnShelf` argument chooses.
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
    made.methods = (function, *(other for _, other in chosen))  # type: ignore[attr-defined]  # read by `methods_of`
    if chosen:
        no_key = classmethod(lambda cls, key: _no_key(cls, key, function, chosen))
        made.no_key = no_key  # type: ignore[attr-defined]  # as `base`, an Entry, has it
    return made


def _no_key(
    cls: type[BaseModel], key: str, function: Callable, chosen: tuple[tuple[str, Callable], ...]
) -> str:
    """Does the work of `Entry.no_key`, and names the other choices of an `OnShelf` argument that have the key."""
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
    return unknown(key, cls.model_fields)


def _checked_by(check: Callable[[Any], None]) -> Callable[[Any], Any]:
    def checked(settings: Any) -> Any:
        check(settings)
        return settings

    return checked


def arguments_on_shelves(function: Callable) -> dict[str, str]:
    """Returns {argument: key of its shelf} of the arguments marked `OnShelf`."""
    found = {}
    for name, (annotation, _) in fields(function).items():
        for mark in getattr(annotation, "__metadata__", ()):
            if isinstance(mark, OnShelf):
                found[name] = mark.key
    return found


def chosen(function: Callable, settings: BaseModel) -> Iterator[tuple[str, Callable]]:
    """Yields (argument, function) of each further file that checked settings choose."""
    for name, key in arguments_on_shelves(function).items():
        yield name, find(key, getattr(settings, name))


def methods_of(settings: Any) -> Iterator[Callable]:
    """Yields the functions and classes that checked settings name, and those that settings and lists in them name."""
    if isinstance(settings, BaseModel):
        yield from getattr(type(settings), "methods", ())
        settings = [getattr(settings, name) for name in type(settings).model_fields]
    if isinstance(settings, list):
        for value in settings:
            yield from methods_of(value)


def source_of(function: Callable) -> Path | None:
    """Returns the file that defines a function or class; None if there is none."""
    # By the module, not by the code: a decorator's code is in another file.
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    return None if file is None else Path(file)


def own_settings(checked: BaseModel, base: type[BaseModel]) -> dict[str, Any]:
    """Returns the settings that are the shelf file's own, without the common keys of `base`."""
    return {
        name: getattr(checked, name) for name in type(checked).model_fields if name not in base.model_fields
    }


def from_shelf(key: str, base: type[BaseModel]) -> Any:
    """Returns the type of a mapping whose `key` names a shelf file: it has the keys of `base` and those of the file.

    With the validation context {"allow_python": True} it may name `python:module:name` too.
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
            faults = [
                fault(near, f"is no key here (did you mean {key!r}?)", given)
                if near
                else fault(key, "Field required", given, kind="missing")
            ]
        else:
            function, faults = _found(key, key, given[key], allowed)
            if function is not None:
                others = []
                for name, shelf in arguments_on_shelves(function).items():
                    default = fields(function)[name][1]
                    other, more = _found(shelf, name, given.get(name, default), allowed)
                    faults += more
                    others.append((name, other))
                if given[key].startswith(PYTHON) and function.__name__ == "python":
                    # A shelf's own file that calls somebody else's.
                    other, more = _or_fault(ones_own, key, given[key], given[key])
                    faults += more
                    others.append(("name", other))
                if not faults:
                    return checker(function, base, tuple(others)).model_validate(given, context=info.context)
        # The file's own keys are unknown here; the common keys can still be checked.
        common = {name: value for name, value in given.items() if name in base.model_fields and name != key}
        try:
            base.model_validate(common | {key: key}, context=info.context)
        except ValidationError as error:
            raise ValidationError.from_exception_data(key, [*faults, *restated(error)]) from None
        raise ValidationError.from_exception_data(key, faults)

    return Annotated[base, BeforeValidator(check)]


def _found(shelf: str, name: str, value: Any, allowed: bool) -> tuple[Callable | None, list]:
    """Returns what a key's value names on a shelf, and []; or None and the fault."""
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
