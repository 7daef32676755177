"""Writes weights as safetensors, and reads them from safetensors or from pickles of tensors alone, which run no code."""

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from trainer.mistakes import Mistake
from trainer.storage import files

ORDER = "key_order"  # in a safetensors header: the keys in order; it marks our own files
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
NESTS = ("state_dict", "model_state_dict", "model", "module", "net")
PREFIXES = ("module.", "model.", "_orig_mod.", "state_dict.")


def digest(state: Mapping[str, Tensor]) -> str:
    """Returns a digest of named tensors, equal only for bit-equal weights. Runs and reports keep it: it must not change."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def save_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as one safetensors file, whole or not at all, and replaces a file of that name.

    metadata: texts for the file's header.
    """
    files.write_bytes(path, to_bytes(tensors, path, metadata))


def load_file(path: Path) -> dict[str, Tensor]:
    """Reads weights from a safetensors file, or from a pickle (.pth, .pt, .bin, .ckpt, .tar) of tensors alone.

    Weights nested under "state_dict", "model" and the like are found, and prefixes that every key has ("module.",
    "model.", "_orig_mod.", "state_dict.") are removed. A file that `save_file` wrote is returned unchanged.
    Raises Mistake, with the file's name, if it is missing, damaged, holds no weights, or is a pickle with code in
    it, which is never run.
    """
    path = Path(path)
    if not path.is_file():
        raise Mistake(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        tensors, ours = from_bytes(path.read_bytes(), path)
        return tensors if ours else _without_prefixes(tensors)
    if path.suffix in PICKLES:
        return _without_prefixes(_weights_in(unpickled(path, path), path))
    raise Mistake(
        f"{path}: got a file ending in {path.suffix!r}; allowed: .safetensors, {', '.join(PICKLES)}"
    )


def to_bytes(
    tensors: Mapping[str, Tensor], where: object, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Returns the tensors in the safetensors format, with the order of the keys, which the format alone does not keep."""
    copies = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where}: {key!r} is a {type(tensor).__name__}; only tensors are saved")
        # A copy, because the format refuses strides and tensors that share memory (tied weights).
        copies[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        return safetensors.torch.save(copies, {**(metadata or {}), ORDER: json.dumps(list(copies))})
    except KeyError as error:
        raise Mistake(f"{where}: safetensors has no type {error}") from error


def from_bytes(data: bytes, where: object) -> tuple[dict[str, Tensor], bool]:
    """Returns the tensors in their order, and whether the file is one of ours. Raises Mistake for a damaged file."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if ORDER not in header.get("__metadata__", {}):
            return tensors, False
        return {key: tensors[key] for key in json.loads(header["__metadata__"][ORDER])}, True
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise Mistake(f"{where}: this is no whole safetensors file ({error})") from error


def unpickled(file: Path | BinaryIO, path: Path) -> Any:
    """Returns the content of a pickle of tensors and plain values. path: its name in messages.

    Raises Mistake for a pickle with anything else in it, and for a damaged one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols, which are read or refused
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"this one asks for {named[1]}" if named else "this one holds something else, or is damaged"
        raise Mistake(
            f"{path}: refused: a pickle can run code, so only tensors are read, and {found}; "
            "save model.state_dict() alone, or safetensors"
        ) from error
    except Exception as error:  # a damaged pickle or archive may raise anything in torch
        why = f"{type(error).__name__} {error}".strip().splitlines()[0]
        raise Mistake(f"{path}: cannot be read; is it damaged, or no file of weights? ({why})") from error


def _weights_in(loaded: Any, path: Path) -> dict[str, Tensor]:
    """Returns the state_dict in a loaded object: the object itself, or nested in it. Raises Mistake if there is none."""
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
