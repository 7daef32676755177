"""Reads and writes our own JSON files.

Anyone may have cut or edited them, and a disk may have altered them: each is checked against the shape and the sum that were written.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainer.mistakes import Mistake
from trainer.storage.files import read_bytes, write_bytes

SHOWN = 80  # characters of what was got that a message shows
ALTERED = "its checksum differs"
SUM = "sha256"  # the key of the sum of everything else in a file


def write(path: Path, value: dict[str, Any], **format: Any) -> None:
    """Writes a JSON file with its sum, whole or not at all. format: of `json.dumps`."""
    write_bytes(path, json.dumps({**value, SUM: _sum(value)}, **format).encode())


def _sum(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read(path: Path, kind: Any, advice: str = "") -> Any:
    """Reads a JSON file of ours.

    Args:
        path: The file.
        kind: The type that its value must have: a TypedDict, dict[str, Any] ... Further keys are allowed.
        advice: What the user can do when it does not.

    Returns the value, without the sum that `write` has put into it. (Files of older versions have none.)

    Raises:
        Mistake: With the file's name, what is wrong and the advice.
    """
    return parsed(read_bytes(path), path, kind, advice, summed=True)


def parsed(text: str | bytes, where: object, kind: Any, advice: str = "", *, summed: bool = False) -> Any:
    """Returns the value of JSON that this program wrote; see `read`. where: its name in messages. summed: whether it may have a sum."""
    try:
        value = json.loads(text)
        if summed and isinstance(value, dict) and SUM in value and value.pop(SUM) != _sum(value):
            raise ValueError(ALTERED)
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        at = ".".join(map(str, first["loc"])) or "the whole"
        why = f"{_short(at)}: {first['msg'][0].lower()}{first['msg'][1:]}, got {_short(repr(first['input']))}"
    except RecursionError:
        why = "nested too deeply"
    except ValueError as error:
        why = str(error) if str(error) == ALTERED else f"no JSON ({_short(str(error))})"
    else:
        return value
    raise Mistake(f"{where}: is damaged: {why}{advice and f'; {advice}'}")


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
