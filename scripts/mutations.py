"""Changes bytes, JSON and recipes at random, for `fuzz.py`, `chaos.py` and the tests."""

import copy
import math
import random
import re
from typing import Any

ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, -(10**30), 10**400),
    *(0.5, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf),
    *("", "x", "0", "1e9", "../../etc/passwd", "/dev/zero", "a\nb", "\x1b[31m", "é\u202e", "x" * 5000),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [1, "a", None, {}], list(range(300))),
]
ODD_WORDS = [
    *(
        "",
        "~",
        "null",
        "true",
        "no",
        "-1",
        "0",
        "1",
        "1e9",
        "1e400",
        ".nan",
        ".inf",
        "-.inf",
        "0x10",
        "0o9",
        "1_0",
    ),
    *(
        "2e-3_0",
        "[]",
        "{}",
        "[[[[",
        "}}",
        "- -",
        "? ",
        ": :",
        "&a",
        "*a",
        "&a [*a]",
        "<<: *a",
        "!!float ''",
        "!!int x",
    ),
    *(
        "!!python/object/apply:os.system [touch x]",
        "!!binary aGk=",
        "!!set {a}",
        "!x y",
        "|",
        ">-",
        "%YAML 1.2",
    ),
    *(
        "---",
        "...",
        "\t",
        '"',
        "'",
        "#",
        "\u202e",
        "\x00",
        "\x1b[2J",
        "x" * 4000,
        "[" * 200,
        "{a: " * 200,
        "9" * 5000,
    ),
    *(
        "python:os:system",
        "timm/",
        "hf-hub:a/b",
        "lenet5",
        "kl",
        "prune",
        "first",
        "../..",
        "/dev/zero",
        "~/x",
    ),
]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Returns bytes with one to four changes: flipped, cut, put in, repeated, zeroed."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(found) + 1)
        size = chance.choice((1, 1, 2, 8, 64, 1000))
        kind = chance.randrange(7)
        if kind == 0:
            del found[at:]
        elif kind == 1:
            del found[at : at + size]
        elif kind == 2:
            found[at:at] = chance.randbytes(size)
        elif kind == 3:
            found[at : at + size] = bytes(len(found[at : at + size]))
        elif kind == 4:
            other = chance.randrange(len(found) + 1)
            found[at:at] = found[other : other + size]
        elif at < len(found):
            found[at] ^= 1 << chance.randrange(8) if kind == 5 else chance.randrange(1, 256)
    return bytes(found)


def reshaped(value: Any, chance: random.Random) -> Any:
    """Returns a value of JSON's types with one to three entries replaced, removed, renamed or added."""
    found = [copy.deepcopy(value)]
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = list(_places(found))
        holder, key = chance.choice(places)
        kind = chance.randrange(6)
        if kind == 0 and holder is not found:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[chance.choice(("", "x", "net", "__class__", "../x"))] = holder.pop(key)
        elif kind == 2 and isinstance(holder, list) and holder is not found:
            holder.insert(key, copy.deepcopy(chance.choice(ODD_VALUES)))
        elif kind == 3:
            other, inside = chance.choice(places)
            holder[key] = copy.deepcopy(other[inside])
        elif kind == 4 and isinstance(holder[key], int | float):
            holder[key] = holder[key] * chance.choice((-1, 0, 10, 1000, 0.5, 10**9))
        else:
            holder[key] = copy.deepcopy(chance.choice(ODD_VALUES))
    return found[0]


def _places(value: Any):
    """Yields (container, key) of every entry at any depth."""
    entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in entries:
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def respelled(text: str, chance: random.Random) -> str:
    """Returns a recipe's text with one to four changes to words, lines and characters."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        lines = text.split("\n")
        at = chance.randrange(len(lines))
        kind = chance.randrange(9)
        words = list(re.finditer(r"[^\s,:{}\[\]]+", text))
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, chance.choice(lines))
        elif kind == 2:
            lines[at] = " " * chance.randrange(5) + lines[at].lstrip(" ") * chance.choice((1, 1, 2))
        elif kind == 3:
            other = chance.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 4:
            lines = text[: chance.randrange(len(text) + 1)].split("\n")
        if kind <= 4:
            text = "\n".join(lines)
        elif kind == 5 or not words:
            at = chance.randrange(len(text) + 1)
            text = text[:at] + chance.choice(ODD_WORDS) + text[at + chance.randrange(3) :]
        elif kind == 6:
            word, other = chance.choice(words), chance.choice(words)
            text = text[: word.start()] + other[0] + text[word.end() :]
        else:
            word = chance.choice(words)
            text = text[: word.start()] + chance.choice(ODD_WORDS) + text[word.end() :]
    return text
