"""Lists the image files below a folder, with the class of each and the number of skipped files."""

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
    """The image files below a folder.

    Attributes:
        files: Their paths, in natural order.
        inside: inside[i] is the path of files[i] below the folder, with / between its parts.
        classes: classes[i] is the class of files[i], '' if it is in no subfolder.
        folders: Names of all class folders, including those without images.
        passed_over: The number of skipped files of each other suffix.
        num_links: The number of skipped links to files and folders that are listed already.
        num_special: The number of links to nothing, pipes, sockets and devices, which are skipped too.
        entered: {folder: the time of its last change, in nanoseconds}, of all folders below and itself.
    """

    files: list[str] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    num_links: int = 0
    num_special: int = 0
    entered: dict[str, int] = field(default_factory=dict)

    def keep(self, chosen: list[int]) -> None:
        """Keeps the files at these positions, in this order, and leaves out the others."""
        for name in ("files", "inside", "classes"):
            values = getattr(self, name)
            setattr(self, name, [values[i] for i in chosen])

    def add(self, other: "Listing") -> None:
        """Adds the files of another folder, and what was skipped there."""
        for name in ("files", "inside", "classes"):
            getattr(self, name).extend(getattr(other, name))
        self.folders = in_order({*self.folders, *other.folders})
        self.passed_over.update(other.passed_over)
        self.num_links += other.num_links
        self.num_special += other.num_special

    def described(self) -> str:
        """Returns the end of a message that lists the skipped files; '' if there are none."""
        parts = []
        if self.passed_over:
            most = sorted(self.passed_over.items(), key=lambda item: (-item[1], item[0] or "~"))[:5]
            endings_text = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in most)
            parts.append(f"{self.passed_over.total()} files by their ending ({endings_text})")
        if self.num_links:
            parts.append(f"{self.num_links} link{'s' * (self.num_links > 1)} to what is there already")
        if self.num_special:
            parts.append(f"{self.num_special} that are no files (broken links, pipes, devices)")
        return f"; passed over: {' and '.join(parts)}" if parts else ""


def list_images(folder: Path) -> Listing:
    """Lists every image file below a folder once, even if several links reach it. Skips dot files.

    The class is the name of the topmost subfolder, in Unicode's composed form. A file below the folder is
    listed under its own path, a file outside it under the first link that reaches it.

    Raises:
        Mistake: For a missing folder, and for names that are not UTF-8.
    """
    if not folder.is_dir():
        raise Mistake(f"there is no folder {folder}")
    known, found = endings(), Listing()
    seen: set[tuple[int, int]] = set()
    for path, by_link in _reached(folder, found.entered):
        inside = path.relative_to(folder)
        _refuse_other_encodings(path)
        ending = path.suffix.lower()
        if not path.is_dir() and not path.is_file():
            found.num_special += 1
        elif path.is_dir() or _identity(path) in seen:
            found.num_links += 1
        elif ending not in known:
            found.passed_over[ending] += not by_link
        else:
            seen.add(_identity(path))
            found.files.append(str(path))
            found.inside.append(inside.as_posix())
            found.classes.append(composed(inside.parts[0]) if len(inside.parts) > 1 else "")
    found.keep(sorted(range(len(found.files)), key=lambda i: _path_key(found.files[i])))
    below = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    found.folders = in_order({composed(name) for name in below})
    return found


def _reached(folder: Path, times: dict[str, int]) -> Iterator[tuple[Path, bool]]:
    """Yields (path, whether it was reached by a link) of files, and of folders that were entered before.

    Paths without links come first. Each folder is entered once, and the time of its last change noted in `times`.
    """
    entered: set[tuple[int, int]] = set()
    own, linked = deque([folder]), deque[Path]()
    while own or linked:
        by_link = not own
        path = linked.popleft() if by_link else own.popleft()
        if not path.is_dir():
            yield path, by_link
        else:
            if _identity(path) in entered:
                yield path, by_link
                continue
            entered.add(_identity(path))
            times[str(path.absolute())] = path.stat().st_mtime_ns
            for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
                if not entry.name.startswith("."):
                    (linked if by_link or entry.is_symlink() else own).append(Path(entry.path))


def _identity(path: Path) -> tuple[int, int]:
    """Returns the device and inode of a path, equal for all links to a file."""
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
    """Returns a name in Unicode's composed form (NFC), because macOS stores the same name decomposed."""
    return unicodedata.normalize("NFC", name)


def in_order(names: set[str]) -> list[str]:
    """Sorts names in natural order (2 before 10), independent of the locale."""
    return sorted(names, key=_natural)


def _natural(name: str) -> tuple:
    # Digits compare as numbers, letters without case; the name itself breaks ties (1, 01).
    parts = re.split(r"([0-9]+)", name.lower())
    return [(0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part) for part in parts], name


def _path_key(path: str) -> tuple:
    return _natural(composed(path))


def notes_on_names(found: set[str], raw: set[str]) -> list[str]:
    """Returns notes for the user on class names with several Unicode forms or that differ only in case.

    Args:
        found: The names in composed form.
        raw: The names as they are on disk.
    """
    notes = []
    if len(raw) > len(found):
        forms = Counter(composed(name) for name in raw)
        same = [name for name, count in forms.items() if count > 1]
        notes.append(
            f"class {', '.join(map(repr, in_order(set(same))))} is spelt in two Unicode forms: taken as one"
        )
    folded = Counter(name.casefold() for name in found)
    for name in in_order({name for name in found if folded[name.casefold()] > 1}):
        notes.append(
            f"class {name!r} differs from another one by upper and lower case only: taken as its own"
        )
    return notes
