"""Checkpoints that survive a kill, weights files without pickles, and the lock of a run's folder.

A checkpoint is a folder of safetensors files with facts.json and manifest.json (the sha256 sum of every
file). It is written under another name, forced to the disk and renamed, so it is there whole or not at all;
what is damaged later is seen by its sums, and the one before it is used.
"""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from trainer import files
from trainer.mistakes import Mistake

logger = logging.getLogger(__name__)

ORDER = "key_order"  # in a safetensors header: the keys in order, and the mark of our own files
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
NESTS = ("state_dict", "model_state_dict", "model", "module", "net")
PREFIXES = ("module.", "model.", "_orig_mod.", "state_dict.")


def digest(state: Mapping[str, Tensor]) -> str:
    """A digest of named tensors: equal only for bit-equal weights. It stands in kept runs and reports: it must not change."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def save(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write a new checkpoint into `folder` and return its path, folder/NNNNNNNN.

    tensors: NAME -> {key: tensor}, each written as NAME.safetensors (any device, any strides, in order).
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

    content = {f"{_checked(name)}.safetensors": _to_bytes(entry, name) for name, entry in tensors.items()}
    content["facts.json"] = _json(facts)
    sums = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()
    }
    content["manifest.json"] = _json({"files": sums})

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


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Read the newest valid checkpoint of `folder`: (tensors, facts) as given to `save`, the tensors on the
    CPU.

    A damaged one is skipped with a warning that names it. None when there is no valid one.
    """
    for path in _checkpoints(Path(folder)):
        try:
            content = _verified(path)
            tensors = {
                name.removesuffix(".safetensors"): _from_bytes(data, path / name)[0]
                for name, data in content.items()
                if name.endswith(".safetensors")
            }
            return tensors, json.loads(content["facts.json"])
        except Mistake as error:
            logger.warning("skipped a damaged checkpoint: %s", error)
    return None


def save_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the tensors as one safetensors file, whole or not at all; a file of that name is replaced.

    metadata: text that goes into the file's header.
    """
    files.write_bytes(path, _to_bytes(tensors, path, metadata))


def load_file(path: Path) -> dict[str, Tensor]:
    """Read the weights in a safetensors file, or in a pickle (.pth, .pt, .bin, .ckpt, .tar) of tensors alone.

    Weights nested under "state_dict", "model" and the like are found, and a prefix that every key carries
    ("module.", "model.", "_orig_mod.", "state_dict.") is taken off, also several in turn; a file that
    `save_file` wrote comes back as it was. Mistake naming the file when it is missing, damaged, holds no
    weights, or is a pickle with code in it, which is never run.
    """
    path = Path(path)
    if not path.is_file():
        raise Mistake(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        tensors, ours = _from_bytes(path.read_bytes(), path)
        return tensors if ours else _without_prefixes(tensors)
    if path.suffix in PICKLES:
        return _without_prefixes(_weights_in(_unpickled(path), path))
    raise Mistake(
        f"{path}: got a file ending in {path.suffix!r}; allowed: .safetensors, {', '.join(PICKLES)}"
    )


def optimizer_tensors(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part an optimizer's state_dict into its tensors and the rest as JSON can hold it: (tensors, facts).

    The tensors are named by their place ("state/0/exp_avg"). `optimizer_state` puts both together again
    exactly. ValueError for a value that is no tensor, number, text, None, dict, list or tuple.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _parted(state_dict, "", tensors)


def optimizer_state(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Put together the state_dict that `optimizer_tensors` parted."""
    return _joined(facts, tensors)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process, so that a second run cannot write into it.

    Mistake, saying who holds it and since when, if another holder is alive. The lock goes with the
    process however it ends, and its forked children (a data loader's workers) have no part in it; the file
    .lock stays and means nothing by itself. Where the system has no such locks (some network disks) a warning
    is logged and nothing is held.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".holder"
    held = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout:
        raise Mistake(f"{folder}: another run is working in this folder ({_holder(holder)})") from None
    except OSError as error:
        logger.warning("%s: not locked against a second run: %s", folder, error)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    files.write_bytes(holder, _json({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_bytes())
    except OSError:  # it has the lock but has not written its name yet
        return "holder unknown"
    return f"process {who['pid']} on {who['host']}, since {who['since']}"


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


def _json(value: Any) -> bytes:
    """Non-finite floats as Python writes them (NaN, Infinity), which it reads back too."""
    return json.dumps(value, indent=1).encode()


def _to_bytes(
    tensors: Mapping[str, Tensor], where: object, metadata: Mapping[str, str] | None = None
) -> bytes:
    """The tensors in the safetensors format, with the order of the keys, which the format does not keep."""
    copies = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where}: {key!r} is a {type(tensor).__name__}; only tensors are saved")
        # A copy of its own: the format refuses strides and tensors that share memory (tied weights).
        copies[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        return safetensors.torch.save(copies, {**(metadata or {}), ORDER: json.dumps(list(copies))})
    except KeyError as error:
        raise Mistake(f"{where}: safetensors has no type {error}") from error


def _from_bytes(data: bytes, where: object) -> tuple[dict[str, Tensor], bool]:
    """The tensors in the order they were given, and whether the file is one of ours."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if ORDER not in header.get("__metadata__", {}):
            return tensors, False
        return {key: tensors[key] for key in json.loads(header["__metadata__"][ORDER])}, True
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise Mistake(f"{where}: this is no whole safetensors file ({error})") from error


def _unpickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols: they are read or refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"this one asks for {named[1]}" if named else "this one holds something else, or is damaged"
        raise Mistake(
            f"{path}: refused: a pickle can run code, so only tensors are read, and {found}; "
            "save model.state_dict() alone, or safetensors"
        ) from error
    except Exception as error:  # whatever a damaged pickle or archive makes torch stumble over
        why = f"{type(error).__name__} {error}".strip().splitlines()[0]
        raise Mistake(f"{path}: cannot be read; is it damaged, or no file of weights? ({why})") from error


def _weights_in(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state_dict in what was loaded: the thing itself, or nested in it."""
    while isinstance(loaded, Mapping):
        if loaded and all(isinstance(k, str) and isinstance(value, Tensor) for k, value in loaded.items()):
            return {key: value.detach() for key, value in loaded.items()}
        nested = [loaded[key] for key in NESTS if isinstance(loaded.get(key), Mapping)]
        if not nested:
            found = ", ".join(f"{key!r} ({type(value).__name__})" for key, value in list(loaded.items())[:8])
            raise Mistake(f"{path}: no weights found; it holds {found or 'nothing'}; looked under {NESTS}")
        loaded = nested[0]
    raise Mistake(f"{path}: no weights found; it holds a {type(loaded).__name__}")


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if tensors and all(key.startswith(prefix) for key in tensors):
            return _without_prefixes({key.removeprefix(prefix): value for key, value in tensors.items()})
    return tensors


def _parted(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Lists and plain values as they are; all else as an object with one key that names what it is."""
    if isinstance(value, Tensor):
        assert place not in tensors, place
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, Mapping):
        return {
            "dict": [
                [key, _parted(item, f"{place}/{key}".lstrip("/"), tensors)] for key, item in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        items = [_parted(item, f"{place}/{position}", tensors) for position, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"optimizer state {place!r}: a {type(value).__name__} cannot be saved without a pickle")


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_joined(item, tensors) for item in value]
    if not isinstance(value, Mapping):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_joined(item, tensors) for item in content)
    return {key: _joined(item, tensors) for key, item in content}
