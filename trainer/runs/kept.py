"""Lists and removes what runs keep in the cache folder: the teacher's answers, results of opening images, downloads."""

import contextlib
import json
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from tabulate import tabulate

from trainer.data import store
from trainer.data.fetch import FILES, cache_folder
from trainer.mistakes import Mistake, nearest
from trainer.storage.files import PARTIAL
from trainer.storage.lock import is_mapped

_HASH = r"[0-9a-f]{24}"  # our folders and files are named by the start of a digest


class Kept(NamedTuple):
    """One entry of the cache folder.

    Attributes:
        name: Its path below the cache folder.
        files: Our files in it; others are neither counted nor removed.
        num_bytes: Their size.
        made_by: What it holds and what made it.
    """

    name: str
    files: list[Path]
    num_bytes: int
    made_by: str


def kept() -> list[Kept]:
    """Returns the entries of the cache folder that this program made, those of one kind together."""
    folder = cache_folder()
    found = []
    for path in sorted((folder / "views").glob("*")):
        if re.fullmatch(_HASH, path.name) and path.is_dir():
            found.append(_entry(f"views/{path.name}", _ours(path, {"records", "facts.json"}), _answers(path)))
    for kind, described in (("examined", _examined), ("listings", _listing)):
        for path in sorted((folder / kind).glob("*.json")):
            if re.fullmatch(_HASH, path.stem) and path.is_file():
                found.append(_entry(f"{kind}/{path.name}", [path], described(path)))
    for path in sorted((folder / store.FOLDER).glob("*")):
        if re.fullmatch(_HASH, path.name) and path.is_dir():
            ours = _ours(path, {"records", "facts.json"})
            found.append(_entry(f"{store.FOLDER}/{path.name}", ours, _pictures(path)))
    for name, names in FILES.items():
        found.append(_entry(name, _ours(folder / name, set(names)), f"trainer fetch {name}"))
    return [entry for entry in found if entry.files]


def _entry(name: str, files: list[Path], made_by: str) -> Kept:
    return Kept(name, files, sum(min(path.stat().st_size, store.on_disk(path)) for path in files), made_by)


def table(entries: Sequence[Kept]) -> str:
    """Returns the entries as a table, with the sum of their sizes."""
    if not entries:
        return f"{cache_folder()}: holds nothing of this program"
    rows = [
        {
            "name": entry.name,
            "bytes": f"{entry.num_bytes:,}",
            "changed": time.strftime("%Y-%m-%d", time.localtime(max(p.stat().st_mtime for p in entry.files))),
            "what it holds": entry.made_by,
        }
        for entry in entries
    ]
    rows.append({"name": "all", "bytes": f"{sum(entry.num_bytes for entry in entries):,}"})
    shown = tabulate(rows, headers="keys", disable_numparse=True, colalign=("left", "right", "left", "left"))
    return f"{cache_folder()}\n\n{shown}"


def remove(names: Sequence[str]) -> list[Kept]:
    """Removes entries by their names, or all without a name; returns them.

    Raises Mistake, before anything is removed, for a name that is not there and for an entry that a run is using.
    """
    known = {entry.name: entry for entry in kept()}
    for name in names:
        if name not in known:
            raise Mistake(
                f"{cache_folder()}: has no entry {name!r}{nearest(name, known)}; trainer cache lists them"
            )
    chosen = [known[name] for name in dict.fromkeys(names)] if names else list(known.values())
    with contextlib.ExitStack() as stack:
        for entry in chosen:
            _hold(stack, entry)
        for entry in chosen:
            for path in entry.files:
                path.unlink(missing_ok=True)
    for entry in chosen:
        folder = cache_folder() / entry.name
        if folder.is_dir():
            (folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else's files stay in it
                folder.rmdir()
    return chosen


def _hold(stack: contextlib.ExitStack, entry: Kept) -> None:
    """Locks an entry until the stack ends. Raises Mistake for one that a run is using."""
    folder = cache_folder() / entry.name
    used = Mistake(f"{folder}: a run is using it; nothing was removed")
    if any(is_mapped(path) for path in entry.files if path.name == "records"):
        raise used
    if folder.is_dir():
        try:
            stack.enter_context(FileLock(folder / ".lock", timeout=0))
        except Timeout:
            raise used from None


def _ours(folder: Path, names: set[str]) -> list[Path]:
    """Returns the files of these names in a folder, and what a killed writer of them has left."""
    left = [f".{name}.part" for name in names]
    return [
        path
        for path in sorted(folder.glob("*"))
        if path.is_file() and (path.name in names or path.name in left or path.name.startswith(PARTIAL))
    ]


def _answers(folder: Path) -> str:
    facts = _json(folder / "facts.json")
    models = " and ".join(_models(facts.get("model")))
    counted = "".join(
        f", {facts[key]:,} {word}"
        for key, word in (("num_samples", "images"), ("views", "views"))
        if isinstance(facts.get(key), int)
    )
    record = facts.get("record")
    fields = ", ".join(record) if isinstance(record, Mapping) else "unknown fields"
    return (
        f"answers ({fields}) of {models or 'a teacher'} to {facts.get('dataset', 'unknown images')}{counted}"
    )


def _pictures(folder: Path) -> str:
    facts = _json(folder / "facts.json")
    shape, side = facts.get("shape"), facts.get("short_side")
    size = (
        f"{side} pixels high or wide"
        if side
        else "x".join(map(str, shape))
        if isinstance(shape, list)
        else "?"
    )
    number = facts.get("num_files")
    counted = f"{number:,} " if isinstance(number, int) else ""
    return f"{counted}pictures, decoded ({size}), from {facts.get('first', 'unknown files')} on"


def _models(specs: Any) -> Iterator[str]:
    for spec in specs if isinstance(specs, list) else ():
        if isinstance(spec, Mapping):
            yield " ".join(str(v) if k == "model" else f"{k}={v}" for k, v in spec.items())


def _examined(path: Path) -> str:
    found = _json(path).get("files")
    if not isinstance(found, Mapping):
        return "which images can be read"
    return f"which of {len(found):,} images can be read, in {_below(found)}"


def _listing(path: Path) -> str:
    found = _json(path).get("listing")
    files = found.get("files") if isinstance(found, Mapping) else None
    return (
        f"the names of {len(files):,} images in {_below(files)}"
        if isinstance(files, list)
        else "names of images"
    )


def _below(found: Collection[str]) -> str:
    """Returns the folder that all paths lie in."""
    return os.path.commonpath(found) if found and all(map(os.path.isabs, found)) else next(iter(found), "")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
