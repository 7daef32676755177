"""Reads our own JSON files. Anyone may have cut or edited them, so each is checked against the shape that was written."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainer.mistakes import Mistake
from trainer.storage.files import read_bytes

SHOWN = 80  # characters of what was got that a message shows


def read(path: Path, kind: Any, advice: str = "") -> Any:
    """Reads a JSON file of ours.

    Args:
        path: The file.
        kind: The type that its value must have: a TypedDict, dict[str, Any] ... Further keys are allowed.
        advice: What the user can do when it does not.

    Raises:
        Mistake: With the file's name, what is wrong and the advice.
    """
    return parsed(read_bytes(path), path, kind, advice)


def parsed(text: str | bytes, where: object, kind: Any, advice: str = "") -> Any:
    """Returns the value of JSON that this program wrote; see `read`. where: its name in messages."""
    try:
        value = json.loads(text)
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        at = ".".join(map(str, first["loc"])) or "the whole"
        why = f"{_short(at)}: {first['msg'][0].lower()}{first['msg'][1:]}, got {_short(repr(first['input']))}"
    except RecursionError:
        why = "nested too deeply"
    except ValueError as error:
        why = f"no JSON ({_short(str(error))})"
    else:
        return value
    raise Mistake(f"{where}: is damaged: {why}{advice and f'; {advice}'}")


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
