"""Writes and reads checkpoints that survive a kill.

A checkpoint is a folder of safetensors files, an optimizer's state (by torch.save), facts.json and
manifest.json (the sha256 sum of every file). It is written under another name, synced to the disk and renamed,
so it exists whole or not at all. Later damage shows in the sums, and the checkpoint before it is used.
"""

import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from trainer.distributed import is_main, told
from trainer.mistakes import Mistake
from trainer.storage import files, records
from trainer.storage.files import json_bytes
from trainer.storage.weights_file import from_bytes, to_bytes, unpickled

logger = logging.getLogger(__name__)
_ENTRY = r"[\w.\-]+"
_ENDINGS = (".safetensors", ".pt", ".json")


class _Sum(TypedDict):
    sha256: str


class _Manifest(TypedDict):
    files: dict[str, _Sum]


def save(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    keep: int = 2,
    states: Mapping[str, Mapping[str, Any]] = {},
    about: Mapping[str, Mapping[str, Any]] = {},
) -> Path:
    """Writes a new checkpoint into `folder`; returns its path, folder/NNNNNNNN.

    The number is facts["step"], but at least one more than the newest checkpoint's. Afterwards the `keep` newest valid
    checkpoints remain; all older ones are removed, and so is what a killed writer left. Only one writer at a time is
    allowed.

    Args:
        folder: The folder of all checkpoints of a training.
        tensors: {NAME: {key: tensor}}, each written as NAME.safetensors (any device, any strides, in order).
        facts: A mapping of JSON's types: tuples come back as lists, keys as text.
        keep: Number of checkpoints to keep, at least 1.
        states: {NAME: an optimizer's state_dict}, each written as NAME.pt by torch.save.
        about: {NAME: what is known of those tensors}, kept in the header of their file ("facts").
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}; at least 1 checkpoint is kept")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for parent in [*folder.resolve().parents][
        :3
    ]:  # of a training, its stage's, all checkpoints', the run's folder
        files.sync_folder(parent)
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
    with files.naming(final):
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


def load(
    folder: Path, kind: Any = dict[str, Any], needed: Iterable[str] = ()
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]] | None:
    """Reads the newest valid checkpoint of `folder`; returns (tensors, facts) as given to `save`, or None without one.

    Tensors are on the CPU, and the states are among them. A damaged checkpoint is skipped with a warning. All processes
    of a run must call this: the main process chooses the checkpoint, and Mistake is raised on one that cannot read it.

    Args:
        folder: The folder of all checkpoints of a training.
        kind: The type that the facts must have, see `records.read`.
        needed: Names of tensors and states that must be there.
    """
    if is_main() and Path(folder).is_dir():
        # A writer may have been killed between the renaming and the sync: what the run goes on from must be on the disk.
        files.sync_folder(Path(folder))
    name, content = _newest(Path(folder), kind, needed) if is_main() else ("", None)
    name = told(name)
    if name and not is_main():
        content = _content(Path(folder) / name, kind, needed)
    return content


def _newest(folder: Path, kind: Any, needed: Iterable[str]) -> tuple[str, Any]:
    """Returns the name and the content of the newest valid checkpoint; ("", None) without one."""
    for path in _checkpoints(folder):
        try:
            return path.name, _content(path, kind, needed)
        except Mistake as error:
            logger.warning("skipped a damaged checkpoint: %s", error)
    return "", None


def _content(
    path: Path, kind: Any, needed: Iterable[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Reads one checkpoint; returns (tensors, facts). Raises Mistake if it is damaged."""
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
    facts = records.parsed(content["facts.json"], path / "facts.json", kind)
    missing = sorted(set(needed) - tensors.keys())
    if missing:
        raise Mistake(f"{path}: has no {', '.join(missing)}")
    return tensors, facts


def newest(folder: Path) -> Path | None:
    """Returns the newest checkpoint of `folder`, None without one. It may be damaged."""
    return next(iter(_checkpoints(Path(folder))), None)


def damage(folder: Path) -> str | None:
    """Returns what is wrong with the newest checkpoint of `folder`; None if it is whole, or there is none."""
    found = newest(folder)
    try:
        if found is not None:
            _verified(found)
    except Mistake as error:
        return str(error)
    return None


def newest_facts(folder: Path) -> dict[str, Any] | None:
    """Reads the facts of the newest checkpoint without a look at its other files; None if there are none to be read."""
    found = newest(folder)
    try:
        facts = json.loads((found / "facts.json").read_bytes()) if found else None
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _checkpoints(folder: Path) -> list[Path]:
    """Returns the numbered folders, newest first."""
    found = [path for path in folder.glob("*") if re.fullmatch(r"\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def _verified(path: Path) -> dict[str, bytes]:
    """Returns the contents of a checkpoint's files. Raises Mistake if one is missing or its sum differs from the manifest."""
    try:
        sums = records.read(path / "manifest.json", _Manifest)["files"]
        for name in sums:
            if not re.fullmatch(_ENTRY, name):
                raise Mistake(f"{path}: the manifest names {name[:80]!r}, which is no file of it")
        there = {file.name for file in path.iterdir() if file.suffix in _ENDINGS} - {"manifest.json"}
        if there - sums.keys():
            raise Mistake(f"{path}: the manifest does not name {', '.join(sorted(there - sums.keys()))}")
        content = {name: files.read_bytes(path / name) for name in sums}
        for name, data in content.items():
            if hashlib.sha256(data).hexdigest() != sums[name]["sha256"]:
                raise Mistake(f"{path}: {name} is not what was written")
        if "facts.json" not in content:
            raise Mistake(f"{path}: facts.json is missing")
    except OSError as error:
        raise Mistake(f"{path}: {error}") from error
    return content


def _is_valid(path: Path) -> bool:
    try:
        _verified(path)
    except Mistake:
        return False
    return True


def _checked(name: str) -> str:
    if not re.fullmatch(_ENTRY, name):
        raise ValueError(f"checkpoint entry {name!r}: letters, digits and . _ - make a file name")
    return name


def _pickled(state: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(dict(state), file)
    return file.getvalue()
