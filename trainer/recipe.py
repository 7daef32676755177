"""YAML to a checked recipe: every fault at once, each with file:line and the nearest valid name.

No data is touched and no network built here. Reading a recipe is reading signatures: see `bind`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, ValidationError

from trainer import bind
from trainer.data import DataKeys
from trainer.objective import MAPS, MAP_LISTS, WEIGHTS, TermKeys, needs_teacher, wants
from trainer.teacher import StudentKeys, TeacherKeys
from trainer.views import Augment


class RecipeError(ValueError):
    """One or more faults of a recipe; the message has a line for each."""


class StageKeys(bind.Entry):
    """One stage of a recipe."""

    stage: str


Stage = bind.from_shelf("stage", StageKeys)
Student = bind.from_shelf("model", StudentKeys)
TeacherEntry = bind.from_shelf("model", TeacherKeys)


class Recipe(bind.Entry):
    """A recipe. seed: of initial weights, order and dropout (the data section has its own). precision: of training.

    teachers: several instead of one teacher; combine says how they speak as one.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    seed: NonNegativeInt = 0
    data: bind.from_shelf("dataset", DataKeys)
    teacher: TeacherEntry | None = None
    teachers: Annotated[list[TeacherEntry], Field(min_length=2)] | None = None
    combine: Literal["logits", "probabilities", "confidence"] | None = None
    student: Student
    stages: Annotated[list[Stage], Field(min_length=1)]
    track: Literal["wandb"] | None = None
    precision: Literal["no", "fp16", "bf16"] = "no"

    @property
    def teacher_entries(self) -> list[TeacherKeys]:
        return self.teachers or ([self.teacher] if self.teacher else [])


def read(path: str | Path, changes: dict[str, Any] | None = None) -> tuple[Recipe, dict[str, Any]]:
    """The checked recipe of a file, and its plain mapping.

    changes: {'stages.1.training.epochs': 2, ...} set after reading and before checking. Raises RecipeError with every
    fault, `file:line: where: what`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    plain, lines = _parse(path, text)
    for place, value in (changes or {}).items():
        _set(plain, place, value)
    try:
        recipe = Recipe.model_validate(plain)
    except ValidationError as error:
        raise RecipeError("\n".join(_faults(path, plain, lines, error))) from None
    faults = [f"{path}:{_line(lines, place)}: {_where(place)}: {told}" for place, told in _contradictions(recipe)]
    if faults:
        raise RecipeError("\n".join(faults))
    return recipe, plain


def _parse(path: Path, text: str) -> tuple[dict[str, Any], dict[tuple, int]]:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        plain = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: is not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(plain, dict):
        got = "nothing" if plain is None else type(plain).__name__
        raise RecipeError(f"{path}:1: a recipe is a mapping (name: ..., data: ..., stages: ...); got {got}")
    lines: dict[tuple, int] = {}
    repeated: list[str] = []

    def walk(node: yaml.Node, place: tuple) -> None:
        lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        walk(source, place)
                    continue
                if key.value in seen:
                    repeated.append(f"{path}:{key.start_mark.line + 1}: {_where((*place, key.value))}: is given twice")
                seen.add(key.value)
                lines[(*place, key.value)] = key.start_mark.line + 1
                walk(value, (*place, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                walk(item, (*place, number))

    walk(node, ())
    if repeated:
        raise RecipeError("\n".join(repeated))
    return plain, lines


def _set(plain: dict[str, Any], place: str, value: Any) -> None:
    keys = [int(key) if key.isdigit() else key for key in place.split(".")]
    into: Any = plain
    for key in keys[:-1]:
        try:
            into = into[key]
        except (KeyError, IndexError, TypeError):
            if not isinstance(into, dict):
                raise RecipeError(f"--set {place}: the recipe has no such place") from None
            into = into.setdefault(key, {})
    try:
        into[keys[-1]] = value
    except (IndexError, TypeError):
        raise RecipeError(f"--set {place}: the recipe has no such place") from None


def _faults(path: Path, plain: dict, lines: dict[tuple, int], error: ValidationError) -> list[str]:
    told = []
    for fault in error.errors():
        place = _real_place(plain, fault["loc"])
        kind = fault["type"]
        known = _known_keys(plain, place)
        if kind == "extra_forbidden":
            message = f"is no key here{bind.nearest(str(place[-1]), known)}"
        elif kind == "missing":
            message = "is missing, and required"
        else:
            message = fault["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            if kind not in ("entry", "mapping", "value_error"):
                message = f"got {_short(fault['input'])}; {message.replace('input should', 'it should')}"
        line = f"{path}:{_line(lines, place)}: {_where(place)}: {message}"
        if line not in told:
            told.append(line)
    return sorted(told, key=lambda line: int(line[len(str(path)) + 1 :].split(":")[0]))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _real_place(plain: Any, loc: tuple) -> tuple:
    """The keys of a fault's place that are the recipe's; pydantic adds names of types where there are alternatives."""
    place: list = []
    value = plain
    for number, key in enumerate(loc):
        if isinstance(value, dict) and (key in value or number == len(loc) - 1 and isinstance(key, str)
                                        and not key[:1].isupper() and "[" not in key):
            place.append(key)
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            place.append(key)
            value = value[key]
    return tuple(place)


def _known_keys(plain: Any, place: tuple) -> list[str]:
    """The keys that are allowed where `place`'s last one stands."""
    value: Any = plain
    model: Any = Recipe
    for key in place[:-1]:
        value = value[key]
        for shelf, base in (("loss", TermKeys), ("stage", StageKeys), ("dataset", DataKeys),
                            ("model", TeacherKeys if place[0] != "student" else StudentKeys)):
            if isinstance(value, dict) and shelf in value:
                try:
                    model = bind.checker(bind.find(shelf, value[shelf]), base)
                except ValueError:
                    model = base
                break
        else:
            model = _submodel(model, key) if isinstance(key, str) else model
    return list(model.model_fields) if model is not None else []


def _submodel(model: Any, key: str) -> Any:
    field = getattr(model, "model_fields", {}).get(key)
    if field is None:
        return None
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, bind.Entry)), None)


def _line(lines: dict[tuple, int], place: tuple) -> int:
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place, 1)


def _where(place: tuple) -> str:
    text = ""
    for key in place:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text or "recipe"


def _contradictions(recipe: Recipe) -> list[tuple[tuple, str]]:
    """What is right by itself and wrong together: (place, message)."""
    found: list[tuple[tuple, str]] = []
    if recipe.teacher is not None and recipe.teachers is not None:
        found.append((("teachers",), "teacher and teachers are both given; one of them is allowed"))
    if recipe.combine is not None and recipe.teachers is None:
        found.append((("combine",), "has no effect without teachers"))
    has_teacher = bool(recipe.teacher_entries)
    if recipe.student.from_teacher and not has_teacher:
        found.append((("student", "from_teacher"), "there is no teacher in this recipe"))
    if recipe.data.views is not None and recipe.data.augment == Augment():
        found.append((("data", "views"), "has no effect without augment: every view is the same"))
    mixed = recipe.data.mixup > 0 or recipe.data.cutmix > 0
    if mixed and recipe.data.views is not None:
        found.append((("data", "views"), "has no effect with mixup or cutmix: mixed images are never seen twice, "
                                         "so the teacher answers them online"))
    for who, entries in (("teacher", recipe.teacher_entries), ("student", [recipe.student])):
        for number, keys in enumerate(entries):
            place = ("teachers", number) if who == "teacher" and recipe.teachers else (who,)
            found += [((*place, "model"), told) for told in _model_faults(keys.model)]
            if keys.checkpoint is not None and not keys.checkpoint.is_file():
                found.append(((*place, "checkpoint"), f"there is no file {str(keys.checkpoint)!r}"))
    shared = packed = False
    for number, stage in enumerate(recipe.stages):
        place = ("stages", number)
        name = stage.stage
        if name == "train" and stage.who == "teacher" and not has_teacher:
            found.append((place, "trains the teacher, and there is no teacher in this recipe"))
        if getattr(stage, "checkpoint", None) is not None and not stage.checkpoint.is_file():
            found.append(((*place, "checkpoint"), f"there is no file {str(stage.checkpoint)!r}"))
        if name == "distill" and not has_teacher:
            found.append((place, "distils from the teacher, and there is no teacher in this recipe"))
        elif name != "distill" or has_teacher:
            for n, term in enumerate(getattr(stage, "losses", None) or []):
                if needs_teacher(term) and not has_teacher:
                    found.append(((*place, "losses", n), f"loss {term.loss!r} needs a teacher, and there is none"))
        for n, term in enumerate(getattr(stage, "losses", None) or []):
            asks = set(wants(term))
            if term.at is not None and not (MAPS | MAP_LISTS | WEIGHTS) & asks:
                found.append(((*place, "losses", n, "at"),
                              f"loss {term.loss!r} looks at no layers (it wants {', '.join(sorted(asks))})"))
            if mixed and "index" in asks:
                found.append(((*place, "losses", n), f"loss {term.loss!r} knows samples by index: not with mixup, cutmix"))
        if name == "prune" and shared:
            found.append((place, "prunes after sharing: prune first, then share"))
        if packed and name in ("train", "distill", "prune", "share") and getattr(stage, "who", "student") == "student":
            found.append((place, "changes the student after it was packed: the file would be another network's"))
        shared = shared or name == "share"
        packed = packed or name == "pack"
    taught = any(s.stage == "train" and s.who == "teacher" for s in recipe.stages)
    for number, keys in enumerate(recipe.teacher_entries):
        if not taught and keys.checkpoint is None and not getattr(keys, "pretrained", False) and not keys.model.startswith("hf-hub:"):
            place = ("teachers", number) if recipe.teachers else ("teacher",)
            found.append((place, "knows nothing: give it checkpoint, pretrained: true, or a stage train with who: teacher"))
    return found


def _model_faults(name: str) -> list[str]:
    file, rest = bind.split("model", name)
    if file == "timm" and rest and not rest.startswith("hf-hub:"):
        import timm  # here, since it takes seconds and most recipes have no timm network

        if not timm.is_model(rest.split(".")[0]):
            return [f"timm has no model {rest!r}{bind.nearest(rest, timm.list_models())[:400]}"]
    elif rest is None and file in ("timm", "python"):
        return [f"got {name!r}; {'timm/NAME' if file == 'timm' else 'python:module:function'} is allowed"]
    return []


def schema() -> dict[str, Any]:
    """The JSON Schema of recipes, made from the signatures of all shelf files."""
    from pydantic.json_schema import GenerateJsonSchema

    made = Recipe.model_json_schema(schema_generator=GenerateJsonSchema)
    definitions = made.setdefault("$defs", {})
    for key, base in (("stage", StageKeys), ("loss", TermKeys), ("dataset", DataKeys), ("model", StudentKeys), ("model", TeacherKeys)):
        alternatives = []
        for name in bind.names(key):
            entry = bind.checker(bind.find(key, name), base).model_json_schema(ref_template="#/$defs/{model}")
            for inner, definition in entry.pop("$defs", {}).items():
                definitions.setdefault(inner, definition)
            pattern = {"pattern": f"^({name}/|hf-hub:)"} if name == "timm" else {"pattern": "^python:"} if name == "python" else {"const": name}
            entry["properties"][key] = pattern | {"type": "string"}
            entry["description"] = (bind.find(key, name).__doc__ or "").strip()
            alternatives.append(entry)
        definitions[base.__name__] = {"oneOf": alternatives}
    return made
