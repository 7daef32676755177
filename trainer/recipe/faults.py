"""Collects every fault of a recipe's mapping at once, each with the nearest valid name."""

import os
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from trainer.mistakes import closest, nearest


class Entry(BaseModel):
    """A mapping in a recipe. Unknown keys are faults, and so are inf, nan, and true for a number."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    @classmethod
    def no_key(cls, key: str) -> str:
        """Returns the message for an unknown key."""
        return unknown(key, cls.model_fields)

    @model_validator(mode="wrap")
    @classmethod
    def _every_fault(cls, given: Any, handler: Callable[[Any], Any]) -> Any:
        # pydantic alone names no nearest key, and takes true for the number 1 and '1_0' for 10.
        if not isinstance(given, dict):
            return handler(given)
        faults, meant = [], set()
        for key in given.keys() - cls.model_fields.keys():
            faults.append(fault(key, cls.no_key(str(key)), given[key]))
            meant.add((closest(str(key), cls.model_fields),))
        checked = None
        try:
            checked = handler(
                {
                    key: expanded(value) if _mentions(cls.model_fields[key].annotation, Path) else value
                    for key, value in given.items()
                    if key in cls.model_fields
                }
            )
        except ValidationError as error:
            # One message for one misspelling: the misspelt key is the missing one.
            # (A type's bare name, which pydantic allows beside our errors, `restated` does not give.)
            faults += [f for f in restated(error) if f["type"].type != "missing" or f["loc"] not in meant]  # type: ignore[union-attr]
        wrong = {detail["loc"][0] for detail in faults if detail["loc"]}
        for name, field in cls.model_fields.items():
            if name not in given or name in wrong or _mentions(field.annotation, bool, Any):
                continue
            is_text = _mentions(field.annotation, str, Path)
            for below, value in _no_numbers(given[name], is_text):
                if not below or not _mentions(field.annotation, BaseModel):  # an inner entry checks itself
                    faults.append(fault(name, "it should be a valid number", value, *below, kind="bool_type"))
            if isinstance(given[name], str) and _mentions(field.annotation, Path):
                if _mentions(field.annotation, int, float) and _reads_as_number(given[name]):
                    message = (
                        f"got {given[name]!r}; a number has no quotes and no _ (a folder: ./{given[name]})"
                    )
                    faults.append(fault(name, message, given[name]))
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return checked


def unknown(key: str, known: Iterable[str]) -> str:
    """Returns the message for a key that is none of the known ones."""
    name, colon, _ = key.partition(":")
    if colon and name in known:
        return f"is no key here: a space is missing after the colon of {name!r}"
    return f"is no key here{nearest(key, known)}"


def restated(error: ValidationError) -> list[InitErrorDetails]:
    """Converts pydantic's faults so that they can be raised together with others."""
    return [
        InitErrorDetails(
            type=PydanticCustomError(detail["type"], "{message}", {"message": detail["msg"]}),
            loc=detail["loc"],
            input=detail["input"],
        )
        for detail in error.errors(include_url=False)
    ]


def expanded(value: Any) -> Any:
    """A path as it is written, or several, with ~ and $HOME taken for what they stand for."""
    if isinstance(value, list):
        return [expanded(one) for one in value]
    return os.path.expanduser(os.path.expandvars(value)) if isinstance(value, str) else value


def fault(key: Any, message: str, given: Any, *below: Any, kind: str = "entry") -> InitErrorDetails:
    """Makes a fault at `key`, and further keys below it, of the mapping that is being checked.

    Args:
        key: The key.
        message: Says what is allowed.
        given: The faulty value.
        below: Keys below it, down to the faulty value.
        kind: pydantic's type of the fault.
    """
    loc = tuple(k if isinstance(k, (int, str)) else str(k) for k in (key, *below))
    return InitErrorDetails(
        type=PydanticCustomError(kind, "{message}", {"message": message}), loc=loc, input=given
    )


def _mentions(annotation: Any, *kinds: Any) -> bool:
    """Returns whether a type hint names one of `kinds`, at any depth; a dict's keys do not count."""
    if annotation in kinds:
        return True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return BaseModel in kinds
    parts = typing.get_args(annotation)
    return any(_mentions(part, *kinds) for part in parts[typing.get_origin(annotation) is dict :])


def _no_numbers(value: Any, is_text: bool) -> list[tuple[tuple, Any]]:
    """Returns (keys, value) of what pydantic takes for a number and YAML does not, in a value: itself, or what it holds.

    These are true and false, and, unless `is_text`, texts such as '2e-3_0', which Python reads as 2e-30.
    """
    if _is_no_number(value, is_text):
        return [((), value)]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [((key, *below), found) for key, item in inner for below, found in _no_numbers(item, is_text)]


def _is_no_number(value: Any, is_text: bool) -> bool:
    if not isinstance(value, str) or is_text:
        return isinstance(value, bool)
    if value.isascii() and "_" not in value and value == value.strip():
        return False
    return _reads_as_number(value)  # otherwise pydantic refuses it


def _reads_as_number(value: str) -> bool:
    """Returns whether Python reads a text as a number."""
    try:
        float(value)
    except ValueError:
        return False
    return True
