"""YAML to a checked recipe: every fault at once, each with file:line and the nearest valid name.

No data is touched and no network built here. Reading a recipe is reading signatures: see `bind`. Paths in a
recipe are relative to the folder the program is started in.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainer.mistakes import nearest
from trainer.recipe.keys import (
    Augment,
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
from trainer.recipe.shelves import checker, find, names
from trainer.recipe.text import RecipeError, at_path, change, holds, parse, short


def read(path: str | Path, changes: dict[str, Any] | None = None) -> tuple[Recipe, dict[str, Any]]:
    """The checked recipe of a file, and its plain mapping.

    changes: {'stages.1.training.epochs': 2, ...} ('stages[1].training.epochs' too) set after reading and
    before checking. Raises RecipeError with every fault, `file:line: place: what`, or `changes: place: what`
    where the faulty value is one of the changes.
    """
    text = parse(path)
    for place, value in (changes or {}).items():
        change(text, place, value)
    faults = list(text.faults)
    try:
        recipe = Recipe.model_validate(text.plain)
    except ValidationError as error:
        recipe = _sound_parts(text.plain)
        faults += _explained(text.plain, error)
    faults += [(place, message, place) for place, message in contradictions(recipe, text.plain)]
    if faults:
        once: dict[tuple, str] = {}
        for place, message, near in sorted(faults, key=lambda fault: text.mark(fault[2])):
            # What several places take from one anchor is told once.
            mark = text.mark(near)
            once.setdefault(
                (mark, place[-1:] if any(mark) else place, message), text.fault(place, message, near)
            )
        raise RecipeError("\n".join(once.values()))
    recipe._text = text
    return recipe, text.plain


def _explained(plain: dict[str, Any], error: ValidationError) -> Iterator[tuple[tuple, str, tuple]]:
    """(place, message, place whose line is told), one for each faulty place."""
    by_place: dict[tuple, list] = {}
    for told in error.errors(include_url=False):
        by_place.setdefault(_real_place(plain, told), []).append(told)
    for place, faults in by_place.items():
        if any(len(other) > len(place) and other[: len(place)] == place for other in by_place):
            continue  # of several allowed kinds the one that was meant was looked into
        first = next(
            (told for told in faults if told["type"] in ("entry", "missing", "value_error")), faults[0]
        )
        near = place
        if first["type"] == "entry":
            message = first["msg"]
        elif first["type"] == "missing":
            message, near = "is missing, and required", place[:-1]
        elif first["type"] == "extra_forbidden":  # of the one checker that is not ours
            message = f"is no key here{nearest(str(place[-1]), Augment.model_fields)}"
        elif first["type"] == "value_error":
            message = first["msg"].removeprefix("Value error, ")
            given = at_path(plain, place)
            near = next(((*place, word) for word in re.findall(r"[a-z_]+", message) if word in given), place)
        elif first["loc"][-1] == "[key]":
            message = f"got {short(first['input'])} as a key; a name is allowed (in quotes if need be)"
        else:
            # Of several allowed kinds, the one whose range was missed is the one that was meant.
            meant = [
                told for told in faults if told["type"].startswith(("greater", "less", "too_", "finite"))
            ] or faults
            allowed = dict.fromkeys(_allowed(told["msg"]) for told in meant)
            message = f"got {short(first['input'])}; it should {' or '.join(allowed)}"
        yield place, message, near


def _real_place(plain: Any, told: dict) -> tuple:
    """The keys of a fault's place that are the recipe's: pydantic adds names of types where several fit."""
    place: list = []
    for key in told["loc"]:
        if holds(plain, key):
            place.append(key)
            plain = plain[key]
    return (*place, told["loc"][-1]) if told["type"] == "missing" else tuple(place)


def _allowed(message: str) -> str:
    """'be a valid integer' of pydantic's 'Input should be a valid integer, unable to parse string ...'."""
    message = message.partition(" should ")[2] or f"be otherwise: {message}"
    message = re.sub(r", (unable|got) .*| or instance of \w+| after validation", "", message)
    return (
        message.replace("valid dictionary", "mapping")
        .replace("valid tuple", "list")
        .replace("valid list", "list")
    )


def _sound_parts(plain: dict[str, Any]) -> Recipe:
    """The sections, teachers and stages of a faulty recipe that are right by themselves, else None."""

    def sound(kind: Any, given: Any) -> Any:
        try:
            return TypeAdapter(kind).validate_python(given)
        except ValidationError:
            return None

    def each(kind: Any, given: Any) -> list:
        return [sound(kind, one) for one in given] if isinstance(given, list) else []

    return Recipe.model_construct(
        data=sound(DataEntry, plain.get("data")),
        student=sound(Student, plain.get("student")),
        teacher=sound(TeacherEntry, plain.get("teacher")),
        teachers=each(TeacherEntry, plain.get("teachers")) or None,
        combine=plain.get("combine"),
        stages=each(Stage, plain.get("stages")),
        cache=sound(Recipe.model_fields["cache"].annotation, plain.get("cache")),
    )


def schema() -> dict[str, Any]:
    """The JSON Schema of recipes, made from the signatures of all shelf files."""
    made = Recipe.model_json_schema()
    definitions = made["$defs"]
    shelves = (
        ("stage", StageKeys),
        ("loss", TermKeys),
        ("dataset", DataKeys),
        ("model", StudentKeys),
        ("model", TeacherKeys),
    )
    for key, base in shelves:
        alternatives = []
        for name in names(key):
            function = find(key, name)
            entry = checker(function, base).model_json_schema()
            for inner, definition in entry.pop("$defs", {}).items():
                definitions.setdefault(inner, definition)
            if key == "model" and name in ("timm", "python"):
                entry["properties"][key] = {
                    "type": "string",
                    "pattern": "^python:" if name == "python" else "^(timm/|hf-hub:)",
                }
            else:
                entry["properties"][key] = {"const": name}
            entry["description"] = inspect.cleandoc(function.__doc__ or "")
            alternatives.append(entry)
        definitions[base.__name__] = {"oneOf": alternatives}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}
