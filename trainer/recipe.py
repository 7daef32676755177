"""YAML to a checked recipe: every fault at once, each with file:line and the nearest valid name.

No data is touched and no network built here. Reading a recipe is reading signatures: see `bind`. Paths in a
recipe are relative to the folder the program is started in.
"""

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PrivateAttr, TypeAdapter, ValidationError

from trainer import bind
from trainer.keys import (
    Augment,
    CacheKeys,
    DataEntry,
    DataKeys,
    Stage,
    StageKeys,
    Student,
    StudentKeys,
    TeacherEntry,
    TeacherKeys,
    TermKeys,
)
from trainer.mistakes import Mistake, nearest
from trainer.shipped_recipes import find_recipe
from trainer.terms import MAP_LISTS, MAPS, WEIGHTS, asked_of_teacher, needs_teacher, wants

MOST_BYTES = 2**18  # of a recipe's text, and
MOST_VALUES = 10_000  # of what its anchors unfold to: more is a mistake or an attack
DEEPEST = 50


class RecipeError(Mistake):
    """One or more faults of a recipe; the message has a line for each."""


class Recipe(bind.Entry):
    """A recipe.

    name: of the run and its folder. seed: of initial weights, order and dropout (the data section has its
    own). teachers: several instead of one teacher; combine says how they speak as one. cache: where the
    teacher's answers are kept (when not given: in memory, if they are asked for again and take no more than 2
    GiB). precision: of training. threads: of torch in each process (when not given: one for each physical core that
    it may use, divided among the processes of a machine, and no more than OMP_NUM_THREADS says). Paths
    (checkpoint, folder) are relative to the folder the program is started in.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataEntry
    teacher: TeacherEntry | None = None
    teachers: Annotated[list[TeacherEntry], Field(min_length=2)] | None = None
    combine: Literal["logits", "probabilities", "confidence"] | None = None
    student: Student
    stages: Annotated[list[Stage], Field(min_length=1)]
    cache: Literal["off", "memory", "disk"] | CacheKeys | None = None
    track: Literal["wandb"] | None = None
    precision: Literal["no", "fp16", "bf16"] = "no"
    threads: Annotated[int, Field(gt=0, le=4096)] | None = None
    _text: "Text | None" = PrivateAttr(None)

    @property
    def teacher_entries(self) -> list[TeacherKeys]:
        return self.teachers or ([self.teacher] if self.teacher else [])

    @property
    def written(self) -> "Text":
        """What it was read from."""
        return self._text

    def fault(self, place: tuple, message: str) -> str:
        """A message about a place of this recipe, ('stages', 1, 'keep'), with its file and line."""
        if self._text is None:  # not read from a file
            return f"{where(place)}: {message}"
        first, found, rest = message.partition(": ")
        if found and first in _at(self._text.plain, place):  # 'at: ...' is about the entry's own key
            place, message = (*place, first), rest
        return self._text.fault(place, message)


@dataclass
class Text:
    """A recipe as it was written: its plain mapping and where each place of it stands.

    marks: line and column, from 1. faults: (place, message, place whose line is told) of keys that no mapping
    can have. source: the text itself. changed: places set from outside.
    """

    path: Path
    plain: dict[str, Any]
    marks: dict[tuple, tuple[int, int]]
    faults: list[tuple[tuple, str, tuple]]
    source: str = ""
    changed: set[tuple] = field(default_factory=set)

    def mark(self, place: tuple) -> tuple[int, int]:
        """Where a place stands, or else what holds it; (0, 0) for what was set from outside."""
        while place not in self.marks and place not in self.changed and place:
            place = place[:-1]
        return (0, 0) if any(place[: len(c)] == c for c in self.changed) else self.marks.get(place, (1, 1))

    def fault(self, place: tuple, message: str, near: tuple | None = None) -> str:
        """`file:line: place: message`; the line is that of `near` where one is given."""
        line = self.mark(place if near is None else near)[0]
        return f"{f'{self.path}:{line}' if line else 'changes'}: {where(place)}: {message}"


def read(path: str | Path, changes: dict[str, Any] | None = None) -> tuple[Recipe, dict[str, Any]]:
    """The checked recipe of a file, and its plain mapping.

    changes: {'stages.1.training.epochs': 2, ...} ('stages[1].training.epochs' too) set after reading and
    before checking. Raises RecipeError with every fault, `file:line: place: what`, or `changes: place: what`
    where the faulty value is one of the changes.
    """
    text = parse(path)
    for place, value in (changes or {}).items():
        _change(text, place, value)
    faults = list(text.faults)
    try:
        recipe = Recipe.model_validate(text.plain)
    except ValidationError as error:
        recipe = _sound_parts(text.plain)
        faults += _told(text.plain, error)
    faults += [(place, message, place) for place, message in _contradictions(recipe, text.plain)]
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


def where(place: tuple) -> str:
    """A place as people write it: stages[1].losses[3].at."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
    return text.removeprefix(".") or "recipe"


# Reading YAML


class _Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2, as editors read them: 2e-3 is a number, `no` and `on` are words."""

    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """Writes in quotes what would be read as something else, by YAML 1.1 or by 1.2."""


_FLOAT = r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
_TAG = "tag:yaml.org,2002:"
for _kind, _pattern, _first in (
    ("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"^<<$", ["<"]),
):
    for _either in (_Loader, _Dumper):
        _either.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), _first)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # Not by Python's own rule for bases, to which 010 is a fault.
    digits = loader.construct_scalar(node)
    return int(digits, 8 if digits.startswith("0o") else 16 if digits.startswith("0x") else 10)


_Loader.add_constructor(_TAG + "int", _whole_number)


def value(text: str) -> Any:
    """One value as it would be read in a recipe. Raises RecipeError when it is no YAML."""
    return _read(Path("value"), text)[0]


def dump(plain: dict[str, Any]) -> str:
    """A plain mapping as YAML that reads back the same."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def parse(path: str | Path) -> Text:
    """A recipe's text, unchecked but for what is no recipe at all. path: a file's, or a shipped recipe's bare name.

    Raises RecipeError for a file that cannot be read, or is no YAML, or no mapping.
    """
    path = Path(path)
    try:
        path = find_recipe(path)
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise RecipeError(f"{path}: is longer than {MOST_BYTES:,} bytes: that is no recipe")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: is no text: byte {content[error.start]:#04x} is not UTF-8"
        ) from None
    plain, reader = _read(path, text)
    if not isinstance(plain, dict):
        got = "nothing" if plain is None else "a list" if isinstance(plain, list) else _short(plain)
        line, _ = reader.marks.get((), (1, 1))
        raise RecipeError(
            f"{path}:{line}: a recipe is a mapping (name: ..., data: ..., stages: ...); got {got}"
        )
    return Text(path, plain, reader.marks, reader.faults, text)


def _read(path: Path, text: str) -> tuple[Any, "_Reader"]:
    try:
        loader = _Loader(text)
        reader = _Reader(path, loader)
        node = loader.get_single_node()
        return None if node is None else reader.read(node, (), ()), reader
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{path}:{line}: is not YAML: character {error.character:#06x} is not allowed"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f"{error.context}, " if error.problem.startswith("but ") else ""
        problem = (context + error.problem).replace("character '\\t'", "a tab (YAML is indented by spaces)")
        raise RecipeError(f"{path}:{mark.line + 1}: is not YAML: {problem}") from None
    except RecursionError:
        raise RecipeError(f"{path}: is nested too deep: that is no recipe") from None


class _Reader:
    """Turns YAML's nodes into plain values and keeps where each stands.

    Every alias becomes a value of its own, so that a change to one place changes no other.
    """

    def __init__(self, path: Path, loader: yaml.SafeLoader) -> None:
        self.path, self.loader = path, loader
        self.marks: dict[tuple, tuple[int, int]] = {}
        self.faults: list[tuple[tuple, str, tuple]] = []
        self.num_values = 0

    def read(self, node: yaml.Node, place: tuple, holders: tuple) -> Any:
        line, _ = _mark(node)
        self.num_values += 1
        self.marks.setdefault(place, _mark(node))
        if node in holders:
            raise RecipeError(f"{self.path}:{line}: {where(place)}: the anchor holds itself")
        if self.num_values > MOST_VALUES:
            raise RecipeError(
                f"{self.path}:{line}: holds more than {MOST_VALUES:,} values once its anchors are unfolded: "
                "that is no recipe"
            )
        if len(holders) > DEEPEST:
            raise RecipeError(f"{self.path}:{line}: is nested too deep: that is no recipe")
        holders = (*holders, node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.read(item, (*place, number), holders) for number, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, place, holders)
        raise RecipeError(
            f"{self.path}:{line}: {where(place)}: the tag {node.tag.replace(_TAG, '!!')} is not known here"
        )

    def _mapping(self, node: yaml.MappingNode, place: tuple, holders: tuple) -> dict:
        inherited: dict = {}
        own: dict = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                self.marks[(*place, "<<")] = _mark(key)
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in reversed(sources):  # the first wins
                    if isinstance(source, yaml.MappingNode):
                        inherited |= self.read(source, place, holders)
                    else:
                        self._fault((*place, "<<"), "a mapping, or a list of mappings, is allowed")
        seen = set()
        for key, value in node.value:
            name = "<<" if key.tag == _TAG + "merge" else self._scalar(key, place)
            if not isinstance(name, (str, int)) or isinstance(name, bool):
                got = _short(name) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                near = (*place, _mark(key))  # it has no place of its own
                self.marks[near] = _mark(key)
                self._fault(place, f"got {got} as a key; a name is allowed (in quotes if need be)", near)
                continue
            self.marks[(*place, name)] = _mark(key)
            if name in seen:
                self._fault((*place, name), "is given twice")
            seen.add(name)
            if key.tag != _TAG + "merge":
                own[name] = self.read(value, (*place, name), holders)
        return inherited | own

    def _scalar(self, node: yaml.Node, place: tuple) -> Any:
        """A node's value, None where it is no scalar. Only the tags that plain values have are known."""
        if not isinstance(node, yaml.ScalarNode):
            return None
        try:
            if node.tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str"):
                return self.loader.construct_object(node)
        except (ValueError, KeyError):  # '!!int x', or thousands of digits
            pass
        told = f"{_short(node.value)} is no {node.tag.replace(_TAG, '!!')}"
        raise RecipeError(
            f"{self.path}:{_mark(node)[0]}: {where(place)}: cannot be read: {told} that is known here"
        )

    def _fault(self, place: tuple, message: str, near: tuple | None = None) -> None:
        self.faults.append((place, message, near or place))


def _mark(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _change(text: Text, name: str, value: Any) -> None:
    keys = [key for key in re.split(r"[.\[\]]+", name) if key]
    if not keys:
        raise RecipeError(f"changes: {name!r} is no place; 'stages.1.training.epochs' is one")
    into: Any = text.plain
    place: tuple = ()
    for number, key in enumerate(keys, start=1):
        if isinstance(into, list):
            if not (key.isascii() and key.isdigit()) or int(key) >= len(into):
                raise RecipeError(
                    f"changes: {name}: {where(place)} has no entry {key!r}; it has {len(into)}, from 0 on"
                )
            key = int(key)
        elif not isinstance(into, dict):
            raise RecipeError(f"changes: {name}: {where(place)} is {_short(into)}, which holds no {key!r}")
        place = (*place, key)
        if number == len(keys):
            into[key] = value
            text.changed.add(place)
        elif isinstance(into, dict) and into.get(key) is None:
            into[key] = {}
            text.changed.add(place)
        into = into[key]


def _holds(plain: Any, key: Any) -> bool:
    if isinstance(plain, list):
        return isinstance(key, int) and key < len(plain)
    return isinstance(plain, dict) and key in plain


def _at(plain: Any, place: tuple) -> dict | list:
    """The mapping or list at a place, an empty one where there is none."""
    for key in place:
        plain = plain[key] if _holds(plain, key) else None
    return plain if isinstance(plain, (dict, list)) else {}


# Telling what pydantic found


def _told(plain: dict[str, Any], error: ValidationError) -> Iterator[tuple[tuple, str, tuple]]:
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
            given = _at(plain, place)
            near = next(((*place, word) for word in re.findall(r"[a-z_]+", message) if word in given), place)
        elif first["loc"][-1] == "[key]":
            message = f"got {_short(first['input'])} as a key; a name is allowed (in quotes if need be)"
        else:
            # Of several allowed kinds, the one whose range was missed is the one that was meant.
            meant = [
                told for told in faults if told["type"].startswith(("greater", "less", "too_", "finite"))
            ] or faults
            allowed = dict.fromkeys(_allowed(told["msg"]) for told in meant)
            message = f"got {_short(first['input'])}; it should {' or '.join(allowed)}"
        yield place, message, near


def _real_place(plain: Any, told: dict) -> tuple:
    """The keys of a fault's place that are the recipe's: pydantic adds names of types where several fit."""
    place: list = []
    for key in told["loc"]:
        if _holds(plain, key):
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


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# What is right by itself and wrong together


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


def _contradictions(recipe: Recipe, plain: dict[str, Any]) -> Iterator[tuple[tuple, str]]:
    """(place, message) of each. Parts of the recipe that are faulty themselves are None, and left out."""
    several = plain.get("teachers") is not None
    has_teacher = several or plain.get("teacher") is not None
    if several and plain.get("teacher") is not None:
        yield ("teachers",), "teacher and teachers are both given; one of them is allowed"
    if recipe.combine is not None and not several:
        yield ("combine",), "has no effect without teachers"
    entries = [
        (("teachers", n) if several else ("teacher",), keys)
        for n, keys in enumerate(recipe.teacher_entries)
        if keys
    ]
    for place, keys in entries:
        yield from _teacher_faults(place, keys, recipe.combine if several else None, several)
    if recipe.student is not None:
        yield from _model_faults(("student",), recipe.student)
        if recipe.student.from_teacher and not has_teacher:
            yield ("student", "from_teacher"), "there is no teacher in this recipe"
        for other in ("checkpoint", "pretrained"):
            if recipe.student.from_teacher and getattr(recipe.student, other, None):
                yield ("student", "from_teacher"), f"overwrites what {other} loads; one of them is allowed"
    if recipe.data is not None:
        yield from _data_faults(recipe.data, _at(plain, ("data", "augment")))
    yield from _stage_faults(recipe, has_teacher, entries)
    if recipe.cache not in (None, "off"):
        yield from _cache_faults(recipe, has_teacher)


def _cache_faults(recipe: Recipe, has_teacher: bool) -> Iterator[tuple[tuple, str]]:
    if not has_teacher:
        yield ("cache",), "has no effect without a teacher"
        return
    data = recipe.data
    if data is not None and (data.mixup or data.cutmix):
        yield (
            ("cache",),
            "has no effect with mixup or cutmix: mixed images are never seen twice, "
            "so the teacher answers them online",
        )
    elif data is not None and data.augment != Augment() and data.views is None:
        yield (
            ("cache",),
            "has no effect on endless views: give data.views, how many there are before they repeat",
        )
    if None in recipe.stages:
        return
    asked = [asked_of_teacher(stage.losses) for stage in recipe.stages if getattr(stage, "losses", None)]
    keys = recipe.cache if isinstance(recipe.cache, CacheKeys) else CacheKeys()
    for key, kind in (("embeddings", "embedding"), ("maps", "maps")):
        if getattr(keys, key) and not any(kind in kinds for kinds in asked):
            yield ("cache", key), f"has no effect: no loss asks for the teacher's {key}"
    if not any(asked):
        yield ("cache",), "has no effect: no loss asks what the teacher sees"
    elif not any(keys.serve(kinds) for kinds in asked):
        yield (
            ("cache",),
            "has no effect: every stage asks for the teacher's embedding or maps too, "
            "which embeddings and maps: true keep",
        )


def _data_faults(data: DataKeys, augment: dict) -> Iterator[tuple[tuple, str]]:
    for name, amount in augment.items():
        if isinstance(amount, bool) and Augment.model_fields[name].annotation is not bool:
            yield ("data", "augment", name), f"got {_short(amount)}; it should be a valid number"
    if data.mean is not None and data.std is not None and len(data.mean) != len(data.std):
        yield (
            ("data", "std"),
            f"got {len(data.std)} values, and mean has {len(data.mean)}: one for each channel is allowed",
        )
    if data.views is not None and data.augment == Augment():
        yield ("data", "views"), "has no effect without augment: every view is the same"
    if data.keep_views and data.augment == Augment():
        yield ("data", "keep_views"), "has no effect without augment: images as they are need not be made"
    elif data.keep_views and data.views is None and (data.mixup or data.cutmix):
        yield ("data", "keep_views"), "has no effect with mixup or cutmix: mixed images are never seen twice"
    elif data.keep_views and data.views is None:
        yield ("data", "keep_views"), "has no effect on endless views: give data.views, how many there are before they repeat"
    if data.views is not None and (data.mixup or data.cutmix):
        yield (
            ("data", "views"),
            (
                "has no effect with mixup or cutmix: mixed images are never seen twice, "
                "so the teacher answers them online"
            ),
        )


def _model_faults(place: tuple, keys: StudentKeys | TeacherKeys) -> Iterator[tuple[tuple, str]]:
    file, rest = bind.split("model", keys.model)
    if keys.checkpoint is not None:
        if getattr(keys, "pretrained", False):
            yield (*place, "pretrained"), "has no effect with checkpoint, which replaces all weights"
        yield from _no_file((*place, "checkpoint"), keys.checkpoint)
    if rest is None:
        if file in ("timm", "python"):
            allowed = "timm/NAME" if file == "timm" else "python:module:function"
            yield (*place, "model"), f"got {keys.model!r}; {allowed} is allowed"
    elif file == "python":
        module, _, function = rest.partition(":")
        if not function:
            yield (*place, "model"), f"got {keys.model!r}; python:module:function is allowed"
        elif not _is_module(module):
            yield (*place, "model"), f"there is no module {module!r}, installed or in {Path.cwd()}"
    elif not rest.startswith("hf-hub:"):
        import timm  # here, since it takes seconds and most recipes have no timm network

        name = rest.partition(".")[0]
        if not timm.is_model(name):
            yield (*place, "model"), f"timm has no model {name!r}{nearest(name, timm.list_models())}"
        elif rest != name and rest not in timm.list_pretrained(f"{name}.*"):
            known = timm.list_pretrained(f"{name}.*")
            yield (*place, "model"), f"timm has no weights {rest!r}{nearest(rest, known)}"
        elif keys.pretrained and not timm.is_model_pretrained(name):
            yield (*place, "pretrained"), f"timm has no weights of {name!r}"


def _is_module(name: str) -> bool:
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a package above it is missing, or the name is none
        return False
    finally:
        sys.path.pop()


def _teacher_faults(
    place: tuple, keys: TeacherKeys, combine: str | None, several: bool
) -> Iterator[tuple[tuple, str]]:
    yield from _model_faults(place, keys)
    if "share" in keys.model_fields_set and not several:
        yield (*place, "share"), "has no effect with one teacher"
    elif "share" in keys.model_fields_set and combine == "confidence":
        yield (*place, "share"), "has no effect with combine: confidence, which weighs each image by itself"
    if (keys.mean is None) != (keys.std is None):
        yield (
            (*place, "std" if keys.mean is None else "mean"),
            "mean and std go together: give both or neither",
        )
    elif keys.mean is not None and len(keys.mean) != len(keys.std):
        yield (
            (*place, "std"),
            f"got {len(keys.std)} values, and mean has {len(keys.mean)}: one for each channel is allowed",
        )


def _no_file(place: tuple, path: Path) -> Iterator[tuple[tuple, str]]:
    if not path.is_file():
        below = "" if path.is_absolute() else f" in {Path.cwd()}, the folder this was started in"
        yield place, f"there is no file {str(path)!r}{below}"


def _stage_faults(recipe: Recipe, has_teacher: bool, teachers: list) -> Iterator[tuple[tuple, str]]:
    mixed = recipe.data is not None and bool(recipe.data.mixup or recipe.data.cutmix)
    teaching = [n for n, s in enumerate(recipe.stages) if s and s.stage == "train" and s.who == "teacher"]
    changed = shared = packed = False
    for number, stage in enumerate(recipe.stages):
        if stage is None:
            continue
        place = ("stages", number)
        name, losses = stage.stage, getattr(stage, "losses", None) or []
        of_teacher = name == "train" and stage.who == "teacher"
        changes = name in ("train", "distill", "prune", "fold", "share") and not of_teacher
        if of_teacher and not has_teacher:
            yield place, "trains the teacher, and there is no teacher in this recipe"
        if name == "distill" and not has_teacher:
            yield place, "distils from the teacher, and there is no teacher in this recipe"
        if getattr(stage, "checkpoint", None) is not None:
            yield from _no_file((*place, "checkpoint"), stage.checkpoint)
            if changes and changed:
                yield (*place, "checkpoint"), "replaces what the stages before have made of the student"
            if of_teacher and len(recipe.teacher_entries) > 1:
                yield (
                    (*place, "checkpoint"),
                    "would be loaded into every teacher; give each its own, under teachers",
                )
        asks_teacher = name == "distill" or any(needs_teacher(term) for term in losses)
        if (
            asks_teacher
            and has_teacher
            and teaching
            and number < teaching[0]
            and not all(_knows(k) for _, k in teachers)
        ):
            yield place, f"asks a teacher that is taught only later, in stages[{teaching[0]}]"
        if losses and all(term.weight == 0 for term in losses):
            yield (*place, "losses"), "have no effect: all weights are 0"
        for n, term in enumerate(losses):
            yield from _term_faults((*place, "losses", n), term, has_teacher or name == "distill", mixed)
            finishes = hasattr(bind.find("loss", term.loss), "finish")
            if finishes and name in ("prune", "share") and "last" not in stage.keep:
                yield (
                    (*place, "losses", n),
                    f"loss {term.loss!r} sets the last layer anew: not in {name} without keep: [last]",
                )
        if name == "prune" and shared:
            yield place, "prunes after sharing: prune first, then share"
        if name == "fold" and shared:
            yield place, "folds after sharing: fold first, then share"
        if name == "prune" and stage.method == "movement" and recipe.precision == "fp16":
            yield (
                (*place, "method"),
                (
                    "'movement' adds up gradients, and precision fp16 scales them differently from step to "
                    "step: use bf16 or no"
                ),
            )
        if changes and packed:
            yield place, "changes the student after it was packed: the file would be another network's"
        if name == "pack" and packed:
            yield place, "has no effect: the student is packed already"
        changed, shared, packed = changed or changes, shared or name == "share", packed or name == "pack"
    if not teaching and recipe.stages and None not in recipe.stages:
        for place, keys in teachers:
            if not _knows(keys):
                yield (
                    place,
                    "knows nothing: give it checkpoint, pretrained: true, or a stage train with who: teacher",
                )


def _knows(keys: TeacherKeys) -> bool:
    return bool(keys.checkpoint or getattr(keys, "pretrained", False))


def _term_faults(place: tuple, term: TermKeys, has_teacher: bool, mixed: bool) -> Iterator[tuple[tuple, str]]:
    asks = set(wants(term))
    if needs_teacher(term) and not has_teacher:
        yield place, f"loss {term.loss!r} needs a teacher, and there is none"
    if term.at is not None and not (MAPS | MAP_LISTS | WEIGHTS) & asks:
        yield (*place, "at"), f"loss {term.loss!r} looks at no layers (it wants {', '.join(sorted(asks))})"
    if mixed and "index" in asks:
        yield place, f"loss {term.loss!r} knows samples by index: not with mixup, cutmix"


# For editors


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
        for name in bind.names(key):
            function = bind.find(key, name)
            entry = bind.checker(function, base).model_json_schema()
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
