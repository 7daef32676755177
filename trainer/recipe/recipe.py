"""Reads YAML into a checked recipe, and reports every fault at once with file:line and the nearest valid name.

Reading a recipe touches no data and builds no network: only signatures are read (see `shelves`). Paths in a recipe are
relative to the folder where the program is started.
"""

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from trainer.mistakes import Mistake
from trainer.recipe.faults import Entry
from trainer.recipe.keys import (
    DataEntry,
    DataKeys,
    Recipe,
    Stage,
    StageKeys,
    Student,
    StudentKeys,
    TeacherEntry,
    TeacherKeys,
    TermKeys,
)
from trainer.recipe.rules import contradictions
from trainer.recipe.shelves import PYTHON, arguments_on_shelves, checker, fields, find, names
from trainer.recipe.targets import ExportKeys, Targets
from trainer.recipe.text import RecipeError, at_path, change, holds, parse, short, where

MOST_FAULTS = 40  # of which a message tells


def read(
    path: str | Path, changes: dict[str, Any] | None = None, allow_python: bool = False
) -> tuple[Recipe, dict[str, Any]]:
    """Reads and checks a recipe; returns it and its plain mapping.

    Args:
        path: The file, or the bare name of a shipped recipe.
        changes: {'stages.1.training.epochs': 2, ...} ('stages[1].training.epochs' too), set before checking.
        allow_python: Whether `python:module:name` is allowed. It imports that module, which runs its code.

    Raises:
        RecipeError: With every fault as `file:line: path: message`, or `changes: path: message` if the faulty value is
            one of the changes.
    """
    text = parse(path)
    for name, value in (changes or {}).items():
        change(text, name, value)
    faults = list(text.faults)
    context = {"allow_python": allow_python}
    try:
        recipe = Recipe.model_validate(text.plain, context=context)
    except ValidationError as error:
        recipe = _sound_parts(text.plain, context)
        faults += _explained(text.plain, error)
    faults += [(at, message, at) for at, message in contradictions(recipe, text.plain)]
    if faults:
        once: dict[tuple, str] = {}
        for at, message, near in sorted(faults, key=lambda fault: text.mark(fault[2])):
            # A fault of an anchor is reported once, not for each alias.
            mark = text.mark(near)
            once.setdefault((mark, at[-1:] if any(mark) else at, message), text.fault(at, message, near))
        lines = list(once.values())
        if len(lines) > MOST_FAULTS:
            lines[MOST_FAULTS:] = [f"and {len(lines) - MOST_FAULTS:,} more faults"]
        raise RecipeError("\n".join(lines))
    recipe._text, recipe._allows_python = text, allow_python
    return recipe, text.plain


Kind = TypeVar("Kind", bound=Entry)


class _Wanted(Entry):
    to: Targets


def targets_of(to: str | Sequence[Any], allow_python: bool = False) -> list[ExportKeys]:
    """Returns checked targets of an export: names, or mappings with the key `to` and the target's settings.

    Raises Mistake, with a line for each fault.
    """
    given = {"to": [to] if isinstance(to, str) else list(to)}
    return checked(_Wanted, given, allow_python).to


def checked(kind: type[Kind], given: dict[str, Any], allow_python: bool = False) -> Kind:
    """Returns settings that were given by no recipe, as an Entry of that kind. Raises Mistake, with a line for each fault."""
    try:
        return kind.model_validate(given, context={"allow_python": allow_python})
    except ValidationError as error:
        faults = [f"{where(path)}: {message}" for path, message, _ in _explained(given, error)]
        raise Mistake("\n".join(faults)) from None


def _explained(plain: dict[str, Any], error: ValidationError) -> Iterator[tuple[tuple, str, tuple]]:
    """Yields (path, message, path whose line is shown), one for each faulty path."""
    by_path: dict[tuple, list] = {}
    for detail in error.errors(include_url=False):
        by_path.setdefault(_real_path(plain, detail), []).append(detail)
    for path, faults in by_path.items():
        if any(len(other) > len(path) and other[: len(path)] == path for other in by_path):
            continue  # of several allowed kinds, the one with a fault further down was meant
        first = next(
            (detail for detail in faults if detail["type"] in ("entry", "missing", "value_error")), faults[0]
        )
        near = path
        if first["type"] == "entry":
            message = first["msg"]
        elif first["type"] == "missing":
            message, near = "is missing, and required", path[:-1]
        elif first["type"] == "value_error":
            message = first["msg"].removeprefix("Value error, ")
            given = at_path(plain, path)
            near = next(((*path, word) for word in re.findall(r"[a-z_]+", message) if word in given), path)
        elif first["loc"][-1] == "[key]":
            message = f"got {short(first['input'])} as a key; a name is allowed (in quotes if need be)"
        else:
            # Of several allowed kinds, the one whose range was missed was meant.
            meant = [
                detail
                for detail in faults
                if detail["type"].startswith(("greater", "less", "too_", "finite"))
            ] or faults
            allowed = dict.fromkeys(_allowed(detail["msg"]) for detail in meant)
            message = f"got {short(first['input'])}; it should {' or '.join(allowed)}"
        yield path, message, near


def _real_path(plain: Any, detail: ErrorDetails) -> tuple:
    """Returns the keys of a fault's path that are the recipe's: pydantic adds names of types if several are allowed."""
    path: list = []
    for key in detail["loc"]:
        if holds(plain, key):
            path.append(key)
            plain = plain[key]
    return (*path, detail["loc"][-1]) if detail["type"] == "missing" else tuple(path)


def _allowed(message: str) -> str:
    """Returns 'be a valid integer' for pydantic's 'Input should be a valid integer, unable to parse string ...'."""
    message = message.partition(" should ")[2] or f"be otherwise: {message}"
    message = re.sub(r", (unable|got) .*| or instance of \w+| after validation", "", message)
    return (
        message.replace("valid dictionary", "mapping")
        .replace("valid tuple", "list")
        .replace("valid list", "list")
    )


def _sound_parts(plain: dict[str, Any], context: dict[str, Any]) -> Recipe:
    """Returns a faulty recipe's sections, teachers and stages that are valid on their own, with None for the others."""

    def sound(kind: Any, given: Any) -> Any:
        try:
            return TypeAdapter(kind).validate_python(given, context=context)
        except ValidationError:
            return None

    def each(kind: Any, given: Any) -> list:
        return [sound(kind, one) for one in given] if isinstance(given, list) else []

    return Recipe.model_construct(  # type: ignore[call-arg]  # what is faulty is left out
        data=sound(DataEntry, plain.get("data")),
        student=sound(Student, plain.get("student")),
        teacher=sound(TeacherEntry, plain.get("teacher")),
        teachers=each(TeacherEntry, plain.get("teachers")) or None,
        combine=plain.get("combine"),
        stages=each(Stage, plain.get("stages")),
        cache=sound(Recipe.model_fields["cache"].annotation, plain.get("cache")),
    )


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of recipes, made from the signatures of all shelf files."""
    made = Recipe.model_json_schema()
    definitions = made["$defs"]
    shelves = (
        ("stage", StageKeys),
        ("loss", TermKeys),
        ("dataset", DataKeys),
        ("model", StudentKeys),
        ("model", TeacherKeys),
        ("to", ExportKeys),
    )
    for key, base in shelves:
        alternatives = []
        for name in names(key):
            for chosen in _choices(find(key, name)):
                alternatives.append(_entry_schema(key, name, base, chosen, definitions))
        own = {"type": "string", "pattern": f"^{PYTHON}"}
        if "python" not in names(key):
            alternatives.append({"type": "object", "properties": {key: own}, "required": [key]})
        if key == "to":  # a bare name too
            alternatives += [{"enum": names(key)}, own]
        definitions[base.__name__] = {"oneOf": alternatives}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def _choices(function: Callable) -> list[tuple[tuple[str, str, Callable], ...]]:
    """Returns every combination of files for a method's `OnShelf` arguments: ((argument, name, function), ...)."""
    shelves = arguments_on_shelves(function)
    files = [[(argument, name, find(key, name)) for name in names(key)] for argument, key in shelves.items()]
    return list(itertools.product(*files))


def _entry_schema(
    key: str,
    name: str,
    base: type,
    chosen: tuple[tuple[str, str, Callable], ...],
    definitions: dict[str, Any],
) -> dict[str, Any]:
    """Returns the schema of a mapping that names one file of a shelf, and the files that this one chooses."""
    function = find(key, name)
    others = tuple((argument, other) for argument, _, other in chosen)
    entry = checker(function, base, others).model_json_schema()
    for inner, definition in entry.pop("$defs", {}).items():
        definitions.setdefault(inner, definition)
    entry["properties"][key] = {"const": name}
    if key == "model" and name in ("timm", "python"):
        pattern = f"^{PYTHON}" if name == "python" else "^(timm/|hf-hub:)"
        entry["properties"][key] = {"type": "string", "pattern": pattern}
        entry["additionalProperties"] = name == "python"
    entry["description"] = inspect.cleandoc(function.__doc__ or "")
    for argument, other_name, other in chosen:
        entry["properties"][argument] |= {"const": other_name}
        if other_name != fields(function)[argument][1]:
            entry["required"] = [*entry.get("required", []), argument]
        entry["description"] += f"\n\n{argument} {other_name}: {inspect.cleandoc(other.__doc__ or '')}"
    return entry
