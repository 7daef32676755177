"""Reads YAML into a plain mapping, with the line of each value."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.mistakes import Mistake, brief
from trainer.recipe.shipped import find_recipe
from trainer.recipe.yaml_faults import in_words

MOST_BYTES = 2**18  # of a recipe's text
MOST_VALUES = 10_000  # once its anchors are unfolded; more is a mistake or an attack
DEEPEST = 50
MOST_OF_A_VALUE = 60  # characters of a key or a value in a message


class RecipeError(Mistake):
    """One or more faults of a recipe; the message has a line for each."""


@dataclass
class Text:
    """A recipe as it was written: its plain mapping, and the line of each path.

    Attributes:
        file: The file.
        plain: The mapping, of plain values.
        marks: {path: (line, column)}, from 1.
        faults: (path, message, path whose line is shown) of keys that no mapping can have.
        source: The text itself.
        changed: Paths that `change` has set.
        notes: Lines that the author should read.
    """

    file: Path
    plain: dict[str, Any]
    marks: dict[tuple, tuple[int, int]]
    faults: list[tuple[tuple, str, tuple]]
    source: str = ""
    changed: set[tuple] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def mark(self, path: tuple) -> tuple[int, int]:
        """Returns line and column of a path, or of the nearest path above it; (0, 0) for one that `change` has set."""
        while path not in self.marks and path not in self.changed and path:
            path = path[:-1]
        return (0, 0) if any(path[: len(c)] == c for c in self.changed) else self.marks.get(path, (1, 1))

    def fault(self, path: tuple, message: str, near: tuple | None = None) -> str:
        """Returns `file:line: path: message`, with the line of `near` if given."""
        line = self.mark(path if near is None else near)[0]
        return f"{f'{self.file}:{line}' if line else 'changes'}: {where(path)}: {message}"


def where(path: tuple) -> str:
    """Formats a path as people write it: stages[1].losses[3].at."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{_as_written(key)}" for key in path)
    return text.removeprefix(".") or "recipe"


class _Loader(yaml.SafeLoader):
    """Reads scalars by YAML 1.2, as editors do: 2e-3 is a number, `no` and `on` are words."""

    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes if YAML 1.1 or 1.2 would read it as something else."""


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
    # Python's int(text, 0) would refuse 010.
    digits = loader.construct_scalar(node)
    return int(digits, 8 if digits.startswith("0o") else 16 if digits.startswith("0x") else 10)


_Loader.add_constructor(_TAG + "int", _whole_number)


def value(text: str) -> Any:
    """Reads one value as in a recipe. Raises RecipeError if it is not YAML."""
    return _read(Path("value"), text)[0]


def dump(plain: dict[str, Any]) -> str:
    """Writes a plain mapping as YAML that reads back the same."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def parse(path: str | Path) -> Text:
    """Reads a recipe's text without checking its keys. path: of a file, or a shipped recipe's bare name.

    Raises RecipeError for a file that cannot be read, is not YAML, or is not a mapping.
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
        got = "nothing" if plain is None else "a list" if isinstance(plain, list) else short(plain)
        line, _ = reader.marks.get((), (1, 1))
        raise RecipeError(
            f"{path}:{line}: a recipe is a mapping (name: ..., data: ..., stages: ...); got {got}"
        )
    found = Text(path, plain, reader.marks, reader.faults, text)
    for entry_path in _entries(plain):
        _take_new_names(found, entry_path)
    return found


# Renamed keys {old: new}, by section. The old names still work.
RENAMED: dict[str, dict[str, str]] = {
    "stages": {"keep": "exclude"},
    "teacher": {"share": "weight"},
    "teachers": {"share": "weight"},
}


def _entries(plain: dict[str, Any]) -> Iterator[tuple]:
    """Yields the paths of the mappings that may have a renamed key."""
    for section in RENAMED:
        value = plain.get(section)
        if isinstance(value, dict):
            yield (section,)
        elif isinstance(value, list):
            yield from ((section, number) for number, entry in enumerate(value) if isinstance(entry, dict))


def _take_new_names(text: Text, path: tuple) -> None:
    """Renames old keys of one entry, and notes it. Somebody else's stage (`python:`) may have any key."""
    entry = at_path(text.plain, path)
    assert isinstance(entry, dict)
    if str(entry.get("stage", "")).startswith("python:"):
        return
    for old, new in RENAMED[path[0]].items():
        if old in entry and new in entry:
            text.faults.append(((*path, old), f"is called {new} now, and {new} is given too", (*path, old)))
            del entry[old]
        elif old in entry:
            renamed = [(new if key == old else key, value) for key, value in entry.items()]
            entry.clear()
            entry.update(renamed)
            for marked in [mark for mark in text.marks if mark[: len(path) + 1] == (*path, old)]:
                text.marks[(*path, new, *marked[len(path) + 1 :])] = text.marks[marked]
            text.notes.append(
                text.fault((*path, new), f"{old} is called {new} now (the old name still works)")
            )


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
        line, problem = in_words(error, text)
        raise RecipeError(f"{path}:{line}: is not YAML: {problem}") from None
    except RecursionError:
        raise RecipeError(f"{path}: is nested too deep: that is no recipe") from None


class _Reader:
    """Turns YAML's nodes into plain values, and records the line of each.

    Every alias becomes a separate value, so that a change at one path changes no other.
    """

    def __init__(self, path: Path, loader: yaml.SafeLoader) -> None:
        self.file, self.loader = path, loader
        self.marks: dict[tuple, tuple[int, int]] = {}
        self.faults: list[tuple[tuple, str, tuple]] = []
        self.num_values = 0

    def read(self, node: yaml.Node, path: tuple, holders: tuple) -> Any:
        line, _ = _mark(node)
        self.num_values += 1
        self.marks.setdefault(path, _mark(node))
        if node in holders:
            raise RecipeError(f"{self.file}:{line}: {where(path)}: the anchor holds itself")
        if self.num_values > MOST_VALUES:
            raise RecipeError(
                f"{self.file}:{line}: holds more than {MOST_VALUES:,} values once its anchors are unfolded: "
                "that is no recipe"
            )
        if len(holders) > DEEPEST:
            raise RecipeError(f"{self.file}:{line}: is nested too deep: that is no recipe")
        holders = (*holders, node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.read(item, (*path, number), holders) for number, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, holders)
        raise RecipeError(
            f"{self.file}:{line}: {where(path)}: the tag {node.tag.replace(_TAG, '!!')} is not known here"
        )

    def _mapping(self, node: yaml.MappingNode, path: tuple, holders: tuple) -> dict:
        inherited: dict = {}
        own: dict = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                self.marks[(*path, "<<")] = _mark(key)
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in reversed(sources):  # the first wins
                    if isinstance(source, yaml.MappingNode):
                        inherited |= self.read(source, path, holders)
                    else:
                        self._fault((*path, "<<"), "a mapping, or a list of mappings, is allowed")
        first: dict[str | int, int] = {}  # {key: its line}
        for key, value in node.value:
            name = "<<" if key.tag == _TAG + "merge" else self._scalar(key, path)
            if not isinstance(name, (str, int)) or isinstance(name, bool):
                got = short(name) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                near = (*path, _mark(key))  # it has no path of its own
                self.marks[near] = _mark(key)
                self._fault(path, f"got {got} as a key; a name is allowed (in quotes if need be)", near)
                continue
            self.marks[(*path, name)] = _mark(key)
            if name in first:
                self._fault((*path, name), f"is given twice, first on line {first[name]}")
            first.setdefault(name, _mark(key)[0])
            if key.tag != _TAG + "merge":
                own[name] = self.read(value, (*path, name), holders)
        return inherited | own

    def _scalar(self, node: yaml.Node, path: tuple) -> Any:
        """Returns a node's value; None if it is not a scalar. Raises RecipeError for tags that plain values do not have."""
        if not isinstance(node, yaml.ScalarNode):
            return None
        try:
            if node.tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str"):
                return self.loader.construct_object(node)
        except (ValueError, KeyError, IndexError):  # '!!int x', '!!float ""', or thousands of digits
            pass
        message = f"{short(node.value)} is no {node.tag.replace(_TAG, '!!')}"
        raise RecipeError(
            f"{self.file}:{_mark(node)[0]}: {where(path)}: cannot be read: {message} that is known here"
        )

    def _fault(self, path: tuple, message: str, near: tuple | None = None) -> None:
        self.faults.append((path, message, near or path))


def _mark(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def change(text: Text, name: str, value: Any) -> None:
    """Sets the value at a path such as 'stages.1.training.epochs'. Raises RecipeError for an entry that cannot exist."""
    keys = [key for key in re.split(r"[.\[\]]+", name) if key]
    if keys and len(keys) == (2 if keys[0] == "teacher" else 3):
        keys[-1] = RENAMED.get(keys[0], {}).get(keys[-1], keys[-1])
    if not keys:
        raise RecipeError(f"changes: {name!r} is no path; 'stages.1.training.epochs' is one")
    into: Any = text.plain
    path: tuple = ()
    for number, key in enumerate(keys, start=1):
        if isinstance(into, list):
            if not (key.isascii() and key.isdigit()) or int(key) >= len(into):
                raise RecipeError(
                    f"changes: {name}: {where(path)} has no entry {key!r}; it has {len(into)}, from 0 on"
                )
            key = int(key)
        elif not isinstance(into, dict):
            raise RecipeError(f"changes: {name}: {where(path)} is {short(into)}, which holds no {key!r}")
        path = (*path, key)
        if number == len(keys):
            into[key] = value
            text.changed.add(path)
        elif isinstance(into, dict) and into.get(key) is None:
            into[key] = {}
            text.changed.add(path)
        into = into[key]


def _as_written(key: Any) -> str:
    text = str(key)
    return brief(text if text.isprintable() else repr(text), MOST_OF_A_VALUE)


def holds(plain: Any, key: Any) -> bool:
    """Returns whether a list or mapping has an entry `key`."""
    if isinstance(plain, list):
        return isinstance(key, int) and key < len(plain)
    return isinstance(plain, dict) and key in plain


def at_path(plain: Any, path: tuple) -> dict | list:
    """Returns the mapping or list at a path, or an empty one."""
    for key in path:
        plain = plain[key] if holds(plain, key) else None
    return plain if isinstance(plain, (dict, list)) else {}


def short(value: Any) -> str:
    """Formats a value for a message; a long one loses its middle."""
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return brief(text, MOST_OF_A_VALUE)
