"""Opens shelf files by name and turns a signature into a checker: the one place that reaches up.

The key names the shelf, the value names the file: `loss: kl` is `trainer/losses/kl.py`, which defines `kl`.
Its keyword-only arguments are its recipe keys (type hints checked by pydantic); its positional arguments say,
by name, what the program feeds it.
"""

import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from trainer.mistakes import Mistake, closest, nearest

SHELVES = {"loss": "losses", "stage": "stages", "dataset": "datasets", "model": "models"}


def names(key: str) -> list[str]:
    """The files on the shelf of `key` (loss, stage, dataset or model), in alphabetical order."""
    package = importlib.import_module(f"trainer.{SHELVES[key]}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def split(key: str, value: str) -> tuple[str, str | None]:
    """File and remainder of a value: 'timm/resnet18' is 'timm' with 'resnet18', 'lenet5' is 'lenet5'."""
    if key == "model":
        if value.startswith("hf-hub:"):
            return "timm", value
        for start in ("timm/", "python:"):
            if value.startswith(start) and value != start:
                return start[:-1], value.removeprefix(start)
    return value, None


def find(key: str, value: str) -> Callable:
    """What the shelf file named by `value` defines. Mistake, with the nearest name, when there is none."""
    file, _ = split(key, value)
    if file not in names(key):
        raise Mistake(f"there is no {key} {value!r}{nearest(file, names(key))}")
    module = importlib.import_module(f"trainer.{SHELVES[key]}.{file}")
    if not callable(getattr(module, file, None)):
        raise Mistake(f"{key} {value!r}: {module.__file__} defines no {file!r}, which its name promises")
    return getattr(module, file)


def fed(function: Callable) -> list[str]:
    """Names of the positional arguments: what a function, or a class's `forward`, wants to be fed."""
    if inspect.isclass(function):
        function = function.forward
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.name != "self"]


def built_with(cls: type) -> list[str]:
    """Names of the positional arguments of a class's constructor."""
    return fed(cls.__init__)


@functools.cache
def checker(function: Callable, base: type[BaseModel]) -> type[BaseModel]:
    """`base` with one more field for each keyword-only argument of `function`; unknown keys are refused."""
    parameters = inspect.signature(function).parameters.values()
    fields: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert parameter.annotation is not parameter.empty, (
                f"{function.__name__}: {parameter.name} has no type"
            )
            assert parameter.name not in base.model_fields, (
                f"{function.__name__}: {parameter.name} is a common key"
            )
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (parameter.annotation, default)
    # A shelf file may define `check(settings)`, which raises Mistake for settings that do not go together.
    check = getattr(inspect.getmodule(function), "check", None)
    validators = {}
    if check is not None:
        validators["check"] = model_validator(mode="after")(lambda checked: (check(checked), checked)[1])
    return create_model(function.__name__, __base__=base, __validators__=validators, **fields)


def own_settings(checked: BaseModel, base: type[BaseModel]) -> dict[str, Any]:
    """The settings that are the shelf file's own, not the common keys of `base`."""
    return {
        name: getattr(checked, name) for name in type(checked).model_fields if name not in base.model_fields
    }


class Entry(BaseModel):
    """A mapping in a recipe. Keys that are no fields are faults, as are inf, nan, and true for a number."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _every_fault(cls, given: Any, handler: Callable[[Any], Any]) -> Any:
        # By itself pydantic names no nearest key, and takes true for the number 1.
        if not isinstance(given, dict):
            return handler(given)
        faults, meant = [], set()
        for key in given.keys() - cls.model_fields.keys():
            faults.append(fault(key, f"is no key here{nearest(str(key), cls.model_fields)}", given[key]))
            meant.add((closest(str(key), cls.model_fields),))
        checked = None
        try:
            checked = handler({key: value for key, value in given.items() if key in cls.model_fields})
        except ValidationError as error:
            # One slip of the pen, one message: the key that is missing is the one that was misspelt.
            faults += [f for f in _faults(error) if f["type"].type != "missing" or f["loc"] not in meant]
        wrong = {told["loc"][0] for told in faults if told["loc"]}
        for name, field in cls.model_fields.items():
            if name in given and name not in wrong and not _mentions(field.annotation, bool, Any):
                for below, value in _booleans(given[name]):
                    if not below or not _mentions(field.annotation, BaseModel):  # an entry looks at its own
                        faults.append(
                            fault(name, "it should be a valid number", value, *below, kind="bool_type")
                        )
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return checked


def _faults(error: ValidationError) -> list[InitErrorDetails]:
    """pydantic's faults once more, to be raised together with others."""
    return [
        InitErrorDetails(
            type=PydanticCustomError(told["type"], "{message}", {"message": told["msg"]}),
            loc=told["loc"],
            input=told["input"],
        )
        for told in error.errors(include_url=False)
    ]


def fault(key: Any, message: str, given: Any, *below: Any, kind: str = "entry") -> InitErrorDetails:
    """One fault at `key` (and further keys below it) of the mapping that is being checked."""
    loc = tuple(k if isinstance(k, (int, str)) else str(k) for k in (key, *below))
    return InitErrorDetails(
        type=PydanticCustomError(kind, "{message}", {"message": message}), loc=loc, input=given
    )


def _mentions(annotation: Any, *kinds: Any) -> bool:
    """Whether one of `kinds` is named in a type hint, at any depth."""
    if annotation in kinds:
        return True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return BaseModel in kinds
    return any(_mentions(part, *kinds) for part in typing.get_args(annotation))


def _booleans(value: Any) -> list[tuple[tuple, bool]]:
    """Where true and false stand in a value: at its top, or one level down."""
    if isinstance(value, bool):
        return [((), value)]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [((key,), item) for key, item in inner if isinstance(item, bool)]


def from_shelf(key: str, base: type[BaseModel]) -> Any:
    """The type of a mapping whose `key` names a shelf file: keys from `base`, and those of the file."""

    def check(given: Any) -> Any:
        if isinstance(given, base):
            return given
        if not isinstance(given, dict):
            raise PydanticCustomError(
                "shelf", "it should be a mapping with the key {key}", {"key": repr(key)}
            )
        if key not in given:
            near = closest(
                key, [name for name in given if isinstance(name, str) and name not in base.model_fields]
            )
            told = (
                fault(near, f"is no key here (did you mean {key!r}?)", given)
                if near
                else fault(key, "Field required", given, kind="missing")
            )
        elif not isinstance(given[key], str):
            told = fault(key, f"it should be the name of a {key}", given[key], kind="shelf")
        else:
            try:
                function = find(key, given[key])
            except Mistake as error:
                told = fault(key, str(error), given[key])
            else:
                return checker(function, base).model_validate(given)
        # Which keys the file allows cannot be known; those that every file allows are checked all the same.
        common = {name: value for name, value in given.items() if name in base.model_fields and name != key}
        try:
            base.model_validate(common | {key: key})
        except ValidationError as error:
            raise ValidationError.from_exception_data(key, [told, *_faults(error)]) from None
        raise ValidationError.from_exception_data(key, [told])

    return Annotated[base, BeforeValidator(check)]
