"""Exports a packed file's network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.exporting.export import export_all, subject_of
from trainer.exporting.subject import NotInstalled
from trainer.packing import network as packed
from trainer.recipe.recipe import read, targets_of
from trainer.reporting.tables import export_table
from trainer.runs.evaluate_file import images_of, opened


def export_file(
    file: Path,
    to: Sequence[Any],
    folder: Path,
    recipe_path: Path | None = None,
    force: bool = False,
    allow_python: bool = False,
) -> list[dict[str, Any]]:
    """Exports the network of a packed file to several targets, prints their table and returns its rows.

    Args:
        file: The packed file.
        to: Names of the exports shelf, or mappings with the key `to` and the target's settings.
        folder: Where the targets' folders are made.
        recipe_path: A recipe, or the bare name of a shipped one, on whose test images the exports are proven; without it they
            are compared on random inputs.
        force: Whether earlier exports are replaced.
        allow_python: Whether targets and the recipe may name `python:module:name`, whose code then runs.

    Raises:
        Mistake: For a file, recipe or target that does not allow it; at the end, for targets whose program or package is not
            installed.
        RuntimeError: For an export whose answers are not the network's.
    """
    targets = targets_of(to, allow_python)
    recipe = None if recipe_path is None else read(recipe_path, None, allow_python)[0]
    content, network, header = opened(file, recipe)
    data = None
    if recipe is not None:
        data = images_of(file, header, recipe, recipe_path, torch.device("cpu"))
    subject = subject_of(
        network,
        header["shape"],
        classes=header["classes"],
        mean=header["mean"],
        std=header["std"],
        packed=content,
        data=data,
        reading=packed.reading(content, str(file)) if header["mean"] else None,
    )
    rows, missing = export_all(subject, targets, folder, force)
    if rows:
        print(export_table(rows))
    for row in rows:
        print(f"{folder / row['stage']}: {', '.join(row['files'])}")
        print(*(f"{row['stage']}: {note}" for note in row["notes"]), sep="\n", end="\n" * bool(row["notes"]))
    if missing:
        raise NotInstalled("\n".join(missing))
    return rows
