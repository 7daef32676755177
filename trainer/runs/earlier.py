"""Moves what a changed recipe no longer has into the run's folder earlier/, and takes over equal stages of other runs."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.mistakes import Mistake
from trainer.packing.headers import header
from trainer.recipe.keys import StageKeys
from trainer.recipe.stages import name_of
from trainer.storage import checkpoint, files


def stage_folder(here: Path, number: int, name: str) -> Path:
    """Returns the folder of a stage's checkpoint in a run's folder."""
    return here / "checkpoints" / f"{number:02d}-{name}"


def set_aside(here: Path, keep: int, recipe: bytes) -> Path | None:
    """Moves everything that belongs to a run's recipe but its first stages into a new folder earlier/N.

    These are the report, the packed files and the checkpoints of the stages from `keep` on. The recipe is written there
    last: a folder without it is one that a kill has left unfinished, and the same call finishes it. After every single
    operation the run's folder holds a run of the old recipe of which some of the last stages are missing.

    Args:
        here: The run's folder.
        keep: How many stages stay.
        recipe: The text of the recipe that the moved files belong to.

    Returns:
        The new folder, None if there is nothing to move.
    """
    moved = list(_after(here, keep))
    folders = _numbered(here / "earlier")
    unfinished = [folder for folder in folders if not (folder / "recipe.yaml").exists()]
    target = None
    if moved:
        target = here / "earlier" / f"{1 + max((int(folder.name) for folder in folders), default=0)}"
        if unfinished and not any((unfinished[0] / path.relative_to(here)).exists() for path in moved):
            target = unfinished[0]
        for path in moved:
            to = target / path.relative_to(here)
            to.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, to)
            files.sync_folder(to.parent)
            files.sync_folder(path.parent)
    for folder in dict.fromkeys([*unfinished, *([target] if target else [])]):
        files.write_bytes(folder / "recipe.yaml", recipe)
    return target or next(iter(unfinished), None)


def _after(here: Path, keep: int) -> Iterator[Path]:
    """Yields what is to be moved, in this order: the report, packed files, and checkpoints from the last to the first."""
    stages = sorted(
        (
            (int(path.name.partition("-")[0]), path)
            for path in (here / "checkpoints").glob("*-*")
            if re.match(r"\d\d+-", path.name)
        ),
        reverse=True,
    )
    names = ["done"]
    page = here / "report.md"  # it names the plots, so it goes after them
    if page.is_file():
        names += re.findall(r"\]\(([\w.-]+\.png)\)", page.read_text(encoding="utf-8", errors="replace"))
    for number, path in stages:
        facts = (checkpoint.newest_facts(path) or {}) if number >= keep else {}
        names += [name for name, _ in _written(facts, keep)]
    names += ["report.html", "report.json", "report.md"]
    yield from (here / name for name in dict.fromkeys(names) if (here / name).exists())
    yield from (path for number, path in stages if number >= keep)


def _numbered(folder: Path) -> list[Path]:
    """Returns the folders whose names are numbers, the newest first."""
    found = [path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


class Source(NamedTuple):
    """A folder of checkpoints whose first stages up to `number` are equal. facts: of the checkpoint of that stage."""

    folder: Path
    number: int
    facts: dict[str, Any]


def sources_of(here: Path, more: Iterable[Path] = ()) -> list[Path]:
    """Returns the folders that a run may take stages over from: its own earlier ones, more, and runs with a report beside it."""
    beside = [
        path for path in sorted(here.parent.glob("*")) if path != here and (path / "report.json").is_file()
    ]
    return [*_numbered(here / "earlier"), *more, *beside]


def take_over(
    here: Path, stages: Sequence[StageKeys], inputs: Sequence[str], sources: Iterable[Path]
) -> Source | None:
    """Copies the checkpoints of equal stages of another run, as many as one of them has, and the files that they wrote.

    Args:
        here: The run's folder.
        stages: The stages that may be taken over.
        inputs: Their digests, see `inputs_of`.
        sources: Folders of other runs.

    Returns:
        The source; None if no other run has more equal stages than this one has finished.
    """
    finished = [n for n, stage in enumerate(stages) if _facts(here, n, stage)]
    first = 1 + max(finished, default=-1)
    found = [equal for source in sources if (equal := _most_equal(source, stages, inputs, first))]
    for source in sorted(found, key=lambda source: -source.number):
        try:
            for name, size in _written(source.facts, first):
                if size is None:
                    shutil.copytree(source.folder / name, here / name, dirs_exist_ok=True)
                else:
                    files.write_bytes(here / name, (source.folder / name).read_bytes())
            for number in range(first, source.number + 1):  # so that a kill leaves the first ones
                _copy(source.folder, here, number, name_of(stages[number]))
        except OSError:  # it is being moved or removed just now
            continue
        return source
    return None


def equal_stage(number: int, stage: StageKeys, inputs: Sequence[str], sources: Iterable[Path]) -> Path | None:
    """Returns the checkpoint's folder of an equal stage, whatever the stages before it were; None if there is none."""
    for source in sources:
        known = (_facts(source, number, stage) or {}).get("inputs")
        if isinstance(known, list) and len(known) > number and known[number] == inputs[number]:
            return stage_folder(source, number, name_of(stage))
    return None


def _most_equal(
    source: Path, stages: Sequence[StageKeys], inputs: Sequence[str], first: int
) -> Source | None:
    for number in reversed(range(first, len(stages))):
        facts = _facts(source, number, stages[number])
        if (
            facts
            and facts.get("inputs") == list(inputs[: number + 1])
            and first_broken(source, facts) is None
        ):
            return Source(source, number, facts)
    return None


def first_broken(here: Path, facts: dict[str, Any]) -> tuple[int, Path] | None:
    """Returns the first stage whose packed file or export is gone or damaged, and that file; None if all are whole."""
    for row in facts["rows"] if isinstance(facts.get("rows"), list) else ():
        for name, size in _written({"rows": [row]}):
            path = here / name
            try:
                data = None if size is None else files.read_bytes(path)
                whole = path.is_dir() if data is None else len(data) == size and bool(header(data, name))
            except Mistake:
                whole = False
            if not whole:
                return row["index"], path
    return None


def _facts(here: Path, number: int, stage: StageKeys) -> dict[str, Any] | None:
    return checkpoint.newest_facts(stage_folder(here, number, name_of(stage)))


def _written(facts: dict[str, Any], keep: int = 0) -> Iterator[tuple[str, int | None]]:
    """Yields (name, bytes) of the files and folders that the stages from `keep` on have written; a folder has no bytes."""
    rows = facts.get("rows")
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict) or row.get("index", -1) < keep:
            continue
        for key, size in (("file", row.get("file_bytes")), ("folder", None)):
            if re.fullmatch(r"\w[\w.-]*", str(row.get(key) or "")):
                yield row[key], size


def _copy(source: Path, here: Path, number: int, name: str) -> None:
    """Copies the newest checkpoint of a stage, by links to the same files where the disk has them."""
    newest = checkpoint.newest(stage_folder(source, number, name))
    if newest is None:
        return
    to = stage_folder(here, number, name) / newest.name
    partial = to.with_name(f"{files.PARTIAL}{to.name}")
    if partial.exists():
        shutil.rmtree(partial)  # a kill has left it
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(newest, partial, copy_function=_link)
    files.sync_folder(partial)
    os.rename(partial, to)
    files.sync_folder(to.parent)


def _link(source: str, to: str) -> str:
    try:
        os.link(source, to)
    except OSError:
        shutil.copy2(source, to)
    return to
