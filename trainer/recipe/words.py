"""Reads words of the command line: counts, lists of numbers, paths, and changes of a recipe."""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.mistakes import Mistake


def path_of(word: str) -> Path:
    """Returns a path with ~ and $HOME expanded, which the shell leaves in quotes and after an =."""
    return Path(os.path.expanduser(os.path.expandvars(word)))


def count(word: str) -> int:
    if not (word.isascii() and word.isdigit()) or int(word) < 1:
        raise argparse.ArgumentTypeError(f"got {word!r}; a number from 1 up is allowed")
    return int(word)


def number(kind: type) -> Callable[[str], Any]:
    """Returns a function that reads a number as a recipe does: Python alone takes 1_0 for 10, and inf."""

    def read(word: str) -> Any:
        if not re.fullmatch(r"[-+.0-9eE]+", word):
            raise ValueError(word)
        return kind(word)

    read.__name__ = kind.__name__  # for argparse: invalid int value: '1_0'
    return read


def numbers(kind: type) -> Callable[[str], list]:
    """Returns a function that reads '3,4,5' as a list of `kind`."""

    def read(words: str) -> list:
        try:
            return [number(kind)(word) for word in words.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"got {words!r}; numbers with commas between them are allowed"
            ) from None

    return read


def changes_of(words: list[str]) -> dict[str, Any]:
    """Returns ['stages.1.training.epochs=2', ...] as {'stages.1.training.epochs': 2, ...}.

    Raises Mistake for a word that is not PATH=VALUE, and for a path given twice.
    """
    from trainer.recipe.text import value  # here: YAML is not needed by every command

    changes: dict[str, Any] = {}
    for word in words:
        path, found, given = word.partition("=")
        if not found:
            raise Mistake(f"--set {word}: PATH=VALUE is allowed, such as stages.1.training.epochs=2")
        if path in changes:
            raise Mistake(f"--set {path}: is given twice")
        try:
            changes[path] = value(given)
        except Mistake as error:
            raise Mistake(f"--set {word}: {str(error).removeprefix('value:1: ')}") from None
    return changes


def first_sentence(text: str) -> str:
    """Returns a text's first sentence, on one line: what is before a full stop that a capital letter follows."""
    return re.split(r"(?<=[.])\s+(?=[A-Z])", text.strip(), maxsplit=1)[0].replace("\n", " ")


def seconds(word: str) -> float:
    """Returns the seconds of a duration: 90s, 30m, 2h."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", word)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"got {word!r}; such as 90s, 30m or 2h is allowed")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
