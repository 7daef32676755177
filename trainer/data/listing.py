"""The picture files below a folder and the class of each, and what was passed over."""

import os
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainer.data.image_file import endings
from trainer.mistakes import Mistake


@dataclass
class Listing:
    """Picture files in the order of their paths; classes[i] is the class of files[i], '' where it lies in no subfolder.

    folders: names of all class folders, those without a picture among them. passed_over: how many files have each other
    ending. num_links: links that lead to what is listed already.
    """

    files: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    num_links: int = 0

    def counts(self) -> Counter[str]:
        return Counter(self.classes)

    def described(self) -> str:
        """What was passed over, for the line that says what was found; '' where nothing was."""
        parts = []
        if self.passed_over:
            most = sorted(self.passed_over.items(), key=lambda item: (-item[1], item[0] or "~"))[:5]
            told = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in most)
            parts.append(f"{self.passed_over.total()} files by their ending ({told})")
        if self.num_links:
            parts.append(f"{self.num_links} link{'s' * (self.num_links > 1)} to what is there already")
        return f"; passed over: {' and '.join(parts)}" if parts else ""


def list_images(folder: Path) -> Listing:
    """Lists every picture file below a folder once, however links and loops lead to it. Dot files are left out.

    The class is the name of the topmost subfolder, in Unicode's composed form. A file that lies below the folder counts
    where it lies; one from elsewhere that links lead to counts at the first of them.
    Raises Mistake for a folder that is not there, and for names that are not UTF-8.
    """
    if not folder.is_dir():
        raise Mistake(f"there is no folder {folder}")
    known, found = endings(), Listing()
    seen: set[tuple[int, int]] = set()
    for path, by_link in _reached(folder):
        inside = path.relative_to(folder)
        _refuse_other_encodings(path)
        ending = path.suffix.lower()
        if path.is_dir() or _identity(path) in seen:
            found.num_links += 1
        elif ending not in known:
            found.passed_over[ending] += not by_link
        else:
            seen.add(_identity(path))
            found.files.append(str(path))
            found.classes.append(composed(inside.parts[0]) if len(inside.parts) > 1 else "")
    order = sorted(range(len(found.files)), key=lambda i: _path_key(found.files[i]))
    found.files, found.classes = [found.files[i] for i in order], [found.classes[i] for i in order]
    below = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    found.folders = in_order({composed(name) for name in below})
    return found


def _reached(folder: Path) -> Iterator[tuple[Path, bool]]:
    """(path, whether a link led to it) of the files below a folder, and of folders that a link leads to once more.

    What lies here itself comes first, then what links lead to. Each folder is entered once.
    """
    entered: set[tuple[int, int]] = set()
    own, linked = deque([folder]), deque[Path]()
    while own or linked:
        by_link = not own
        path = linked.popleft() if by_link else own.popleft()
        if path.is_file():
            yield path, by_link
        elif path.is_dir():
            if _identity(path) in entered:
                yield path, by_link
                continue
            entered.add(_identity(path))
            for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
                if not entry.name.startswith("."):
                    (linked if by_link or entry.is_symlink() else own).append(Path(entry.path))


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _refuse_other_encodings(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise Mistake(
            f"the name {shown} is not UTF-8: rename it (convmv does so for a whole folder)"
        ) from None


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): what a Mac decomposes is the same name."""
    return unicodedata.normalize("NFC", name)


def in_order(names: set[str]) -> list[str]:
    """Names in natural order (2 before 10), a function of the names alone."""
    return sorted(names, key=_natural)


def _natural(name: str) -> tuple:
    # Digits compare as numbers; names that are then equal (1, 01) and those that differ in case only, by themselves.
    parts = re.split(r"([0-9]+)", name.lower())
    return [(0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part) for part in parts], name


def _path_key(path: str) -> tuple:
    return _natural(composed(path))


def notes_on_names(found: set[str], raw: set[str]) -> list[str]:
    """What should be said of class names: several spellings of one, and names that only their case tells apart."""
    notes = []
    if len(raw) > len(found):
        twice = Counter(composed(name) for name in raw)
        same = [name for name, count in twice.items() if count > 1]
        notes.append(
            f"class {', '.join(map(repr, in_order(set(same))))} is spelt in two Unicode forms: taken as one"
        )
    folded = Counter(name.casefold() for name in found)
    for name in in_order({name for name in found if folded[name.casefold()] > 1}):
        notes.append(
            f"class {name!r} differs from another one by upper and lower case only: taken as its own"
        )
    return notes
