"""A user's mistake has a type of its own, and a message that names what was probably meant.

Whatever else is raised is a fault of the program: see `__main__`.
"""

import difflib
from collections.abc import Iterable

MOST_NAMES = 40  # more than that are not listed in a message


class Mistake(ValueError):
    """What the user can mend: a recipe, a file, a setting. The command line tells it in one line, and ends with 2."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` was probably meant to be, None where nothing is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)', or, when nothing is near, '; there are: ...' with all names if not many."""
    known = list(known)
    near = closest(word, known)
    if near is not None:
        return f" (did you mean {near!r}?)"
    return f"; there are: {', '.join(known)}" if 0 < len(known) <= MOST_NAMES else ""
