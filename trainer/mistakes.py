"""The exception for a user's mistake, and the search for the name that was probably meant.

Any other exception is a fault of the program: see `__main__`.
"""

import difflib
from collections.abc import Iterable

MOST_NAMES = 40  # a message lists no more names than this


class Mistake(ValueError):
    """A fault that the user can mend: in a recipe, a file, a setting. The command line prints one line and exits with 2."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """Returns the known name that `word` was probably meant to be, or None if nothing is close."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns ' (did you mean ...?)', or if nothing is close '; there are: ...' with up to `MOST_NAMES` names, or ''."""
    known = list(known)
    near = closest(word, known)
    if near is not None:
        return f" (did you mean {near!r}?)"
    return f"; there are: {', '.join(known)}" if 0 < len(known) <= MOST_NAMES else ""
