"""Finds a recipe by its bare name: `quickstart`, `records/smallest_error158`.

Imports nothing heavy: `trainer check` starts with it.
"""

import difflib
import importlib.resources
import itertools
from pathlib import Path

from trainer.mistakes import listed
from trainer.recipe.words import first_sentence

ENDINGS = (".yaml", ".yml")


def folder() -> Path:
    """Returns the folder of the shipped recipes: recipes/ of a checkout, or inside the installed package."""
    package = Path(str(importlib.resources.files("trainer")))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """Returns the names of the shipped recipes, those of records/ last."""
    top = folder()
    found = [path.relative_to(top).with_suffix("") for path in top.rglob("*.yaml")]
    return [path.as_posix() for path in sorted(found, key=lambda path: (len(path.parts), path))]


def find(name: str) -> Path:
    """Returns the file of a shipped recipe."""
    return folder() / f"{name}.yaml"


def maker(file: Path) -> str:
    """Returns the name of the shipped recipe whose run makes `file`, runs/NAME/...; empty if there is none."""
    run = file.parts[1] if file.parts[:1] == ("runs",) and len(file.parts) > 2 else ""
    return next((name for name in names() if Path(name).name == run), "")


def told(name: str) -> tuple[str, str]:
    """Returns the first sentence of a shipped recipe, and that of its results, from the comments at its top."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), find(name).read_text("utf-8").splitlines())
    about, _, rest = "\n".join(line.removeprefix("#").strip() for line in lines).partition("\nRun:")
    result = rest.partition("\nExpect:")[2]
    return first_sentence(about), first_sentence(result) or "no result is written down"


def find_recipe(given: str | Path) -> Path:
    """Returns the file that `given` means: an existing file, or the shipped recipe of that name.

    An existing file wins. A folder does not, because a run's own folder may have the recipe's name. A bare name
    is `NAME` or `records/NAME`, without .yaml; anything else is returned unchanged, for the caller to open.
    Raises FileNotFoundError for a bare name that is neither a file nor shipped, with the names, nearest first.
    """
    path = Path(given)
    bare = path.suffix not in ENDINGS and (len(path.parts) == 1 or path.parts[:-1] == ("records",))
    if path.is_file() or not bare:
        return path
    name, known = path.as_posix(), names()
    if name in known:
        return find(name)
    if path.exists():
        return path
    by_nearness = sorted(known, key=lambda one: -max(_likeness(name, one), _likeness(name, Path(one).name)))
    raise FileNotFoundError(
        f"there is no such file, and no shipped recipe of that name; there are: {listed(by_nearness)}"
    )


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
