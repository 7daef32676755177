"""Checkpoints that survive a kill, weights files without pickles, and the lock of a run's folder.

A checkpoint is a folder of safetensors files, an optimizer's state (by torch.save), facts.json and
manifest.json (the sha256 sum of every file). It is written under another name, forced to the disk and renamed,
so it is there whole or not at all; what is damaged later is seen by its sums, and the one before it is used.
"""

import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.mistakes import Mistake
from trainer.storage import files
from trainer.storage.files import json_bytes
from trainer.storage.weights_file import from_bytes, to_bytes, unpickled

logger = logging.getLogger(__name__)


def save(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    keep: int = 2,
    states: Mapping[str, Mapping[str, Any]] = {},
    about: Mapping[str, Mapping[str, Any]] = {},
) -> Path:
    """Write a new checkpoint into `folder` and return its path, folder/NNNNNNNN.

    tensors: NAME -> {key: tensor}, each written as NAME.safetensors (any device, any strides, in order).
    states: NAME -> an optimizer's state_dict, each written as NAME.pt by torch.save.
    about: NAME -> what is known of those tensors, kept in their file's own header ("facts").
    facts: what JSON can hold, so tuples come back as lists and keys as text.

    The number is facts["step"], or one above the newest checkpoint's where there is no step or it is not
    above. Afterwards the `keep` newest valid checkpoints are there and all older ones are removed. One writer
    at a time: what a killed writer left is cleared away.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}; at least 1 checkpoint is kept")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(files.PARTIAL + "*"):
        shutil.rmtree(leftover)
    newest = max((int(path.name) for path in _checkpoints(folder)), default=-1)
    final = folder / f"{max(newest + 1, int(facts.get('step', 0))):08d}"

    headers = {name: {"facts": json.dumps(facts)} for name, facts in about.items()}
    content = {
        f"{_checked(name)}.safetensors": to_bytes(entry, name, headers.get(name))
        for name, entry in tensors.items()
    }
    content |= {f"{_checked(name)}.pt": _pickled(state) for name, state in states.items()}
    content["facts.json"] = json_bytes(facts)
    sums = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in content.items()
    }
    content["manifest.json"] = json_bytes({"files": sums})

    partial = folder / f"{files.PARTIAL}{final.name}"
    partial.mkdir()
    for name, data in content.items():
        files.write_through(partial / name, data)
    files.sync_folder(partial)
    os.rename(partial, final)
    files.sync_folder(folder)

    valid = 0
    for path in _checkpoints(folder):
        if valid >= keep:
            shutil.rmtree(path)
        elif path == final or _is_valid(path):
            valid += 1
    return final


def load(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]] | None:
    """Read the newest valid checkpoint of `folder`: (tensors, facts) as given to `save`, the states among the
    tensors, which are on the CPU.

    A damaged one is skipped with a warning that names it. None when there is no valid one.
    """
    for path in _checkpoints(Path(folder)):
        try:
            content = _verified(path)
            tensors = {
                name.removesuffix(".safetensors"): from_bytes(data, path / name)[0]
                for name, data in content.items()
                if name.endswith(".safetensors")
            } | {
                name.removesuffix(".pt"): unpickled(io.BytesIO(data), path / name)
                for name, data in content.items()
                if name.endswith(".pt")
            }
            return tensors, json.loads(content["facts.json"])
        except Mistake as error:
            logger.warning("skipped a damaged checkpoint: %s", error)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The numbered folders, newest first."""
    found = [path for path in folder.glob("*") if re.fullmatch(r"\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def _verified(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint, each with the sum its manifest says. Mistake if anything is amiss."""
    try:
        sums = json.loads((path / "manifest.json").read_bytes())["files"]
        content = {name: (path / name).read_bytes() for name in sums}
        for name, data in content.items():
            if hashlib.sha256(data).hexdigest() != sums[name]["sha256"]:
                raise Mistake(f"{name} is not what was written")
        if "facts.json" not in content:
            raise Mistake("facts.json is missing")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Mistake(f"{path}: {error or type(error).__name__}") from error
    return content


def _is_valid(path: Path) -> bool:
    try:
        _verified(path)
    except Mistake:
        return False
    return True


def _checked(name: str) -> str:
    if not re.fullmatch(r"[\w.\-]+", name):
        raise ValueError(f"checkpoint entry {name!r}: letters, digits and . _ - make a file name")
    return name


def _pickled(state: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(dict(state), file)
    return file.getvalue()
