"""The exception for a user's mistake, and the search for the name that was probably meant.

Any other exception is a fault of the program: see `__main__`.
"""

import bisect
import difflib
import itertools
import sys
import unicodedata
from collections.abc import Iterable, Sequence

_CONTROL = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of a pair, ends of lines and paragraphs
_TURNS = set(
    "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)  # change the direction of writing
MOST_NAMES = 40  # a message lists no more names than this
ROOM_OF_NAMES = 100  # characters that the names may take
MOST_CHARACTERS = 300  # of one line of a message


class Mistake(ValueError):
    """A fault that the user can mend: in a recipe, a file, a setting. The command line prints one line and exits with 2.

    Its lines have at most `MOST_CHARACTERS`: what is longer loses its middle. Control characters become escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(brief(printable(message)))


def brief(text: str, most: int = MOST_CHARACTERS) -> str:
    """Returns a text each of whose lines has at most `most` characters; the middle of a longer one becomes '...'."""
    return "\n".join(_without_middle(line, most) for line in text.split("\n"))


def _without_middle(line: str, most: int) -> str:
    if len(line) <= most:
        return line
    end = (most - 3) // 2
    return f"{line[: most - 3 - end]}...{line[-end:]}"


class Said(Exception):
    """A command has failed and why has been said: by one of several processes, or for each of several files.

    status: the exit status.
    """

    def __init__(self, words: str, status: int) -> None:
        super().__init__(words)
        self.status = status


def say(message: str) -> None:
    """Prints a message to the user, of one line or several, on the console."""
    message = brief(printable(message))
    print(f"trainer:\n{message}" if "\n" in message else f"trainer: {message}", file=sys.stderr, flush=True)


def message_of(error: Exception) -> str | None:
    """Returns the message for an error that the user can mend; None for a fault of the program."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return brief(f"{error.filename}: {error.strerror}")
    if isinstance(error, (Mistake, OSError, FloatingPointError)):
        return brief(str(error))
    no_room = ("can't allocate memory", "Storage size calculation overflowed")
    if isinstance(error, (OverflowError, MemoryError)) or any(words in str(error) for words in no_room):
        return f"a number is too large, or there is too little memory: {error or type(error).__name__}"
    if isinstance(error, RuntimeError) and "torchvision::" in str(error):
        return (
            f"torch and torchvision do not fit together ({error}): install a matching pair, "
            "such as pip install torch==2.15.0 torchvision==0.29.2"
        )
    return None


def printable(text: str, keep: str = "\n") -> str:
    """Returns text with control characters as escapes: a file's names must not clear a screen or write right to left.

    keep: control characters that stay.
    """
    odd = {c for c in text if (unicodedata.category(c) in _CONTROL or c in _TURNS) and c not in keep}
    return "".join(c.encode("unicode_escape").decode() if c in odd else c for c in text)


def closest(word: str, known: Iterable[str]) -> str | None:
    """Returns the known name that `word` was probably meant to be, or None if nothing is close."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns ' (did you mean ...?)', or if nothing is close '; there are: ...' with the names, or ''.

    Of many names it gives the first; of more than `MOST_NAMES`, none.
    """
    known = list(known)
    near = closest(word, known)
    if near is not None:
        return f" (did you mean {near!r}?)"
    return f"; there are: {listed(known)}" if 0 < len(known) <= MOST_NAMES else ""


def listed(known: Sequence[str]) -> str:
    """Returns names with commas between them: all, or those that have room, and how many there are in all."""
    ends = list(itertools.accumulate(len(name) + 2 for name in known))
    shown = known[: max(1, bisect.bisect_right(ends, ROOM_OF_NAMES))]
    more = f", ... ({len(known)} in all)" if len(shown) < len(known) else ""
    return f"{', '.join(shown)}{more}"
