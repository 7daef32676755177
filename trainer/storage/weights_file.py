"""Writes weights as safetensors, and reads them from safetensors or from pickles of tensors alone, which run no code."""

import argparse
import hashlib
import json
import pathlib
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import safetensors
import safetensors.torch
import torch
from numpy._core import multiarray
from torch import Tensor

from trainer.mistakes import Mistake
from trainer.storage import files

ORDER = "key_order"  # in a safetensors header: the keys in order; it marks our own files
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")


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


def read_file(path: Path) -> tuple[Any, dict[str, str]]:
    """Reads a file of weights: its content, and the text in its header.

    Args:
        path: A safetensors file, or a pickle (.pth, .pt, .bin, .ckpt, .tar) of tensors and plain values.

    Returns:
        What it holds (of safetensors {key: tensor}; ours in the order given), and {} or a safetensors header's text.

    Raises:
        Mistake: Naming the file when it is missing, damaged, or a pickle with code in it, which is never run.
    """
    path = Path(path)
    files.check_regular(path)
    if not path.is_file():
        raise Mistake(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        return from_bytes(path.read_bytes(), path)
    if path.suffix in PICKLES:
        return unpickled(path, path), {}
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


def from_bytes(data: bytes, where: object) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors, those of our own files in their order, and the text in the header. Raises Mistake for a damaged file."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
        order = json.loads(metadata.pop(ORDER)) if ORDER in metadata else list(tensors)
        if not isinstance(order, list) or sorted(map(str, order)) != sorted(tensors):
            raise ValueError(f"{ORDER} names other keys than the file has")
        return {key: tensors[key] for key in order}, metadata
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise Mistake(f"{where}: this is no whole safetensors file ({error})") from error


def unpickled(file: Path | BinaryIO, path: Path) -> Any:
    """Returns the content of a pickle of tensors and plain values. path: its name in messages.

    Raises Mistake for a pickle with anything else in it, and for a damaged one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols: they are read or refused
            with torch.serialization.safe_globals(_harmless()):
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"this one asks for {named[1]}" if named else "this one holds something else, or is damaged"
        raise Mistake(
            f"{path}: refused: a pickle can run code, so only tensors are read, and {what}. If you trust it, convert it:\n"
            f"  loaded = torch.load({str(path)!r}, weights_only=False, map_location='cpu')\n"
            f"  torch.save(loaded.state_dict() if hasattr(loaded, 'state_dict') else loaded['state_dict'], 'weights.pth')"
        ) from error
    except Exception as error:  # a damaged pickle or archive may raise anything in torch
        why = f"{type(error).__name__} {error}".strip().splitlines()[0][:160]
        raise Mistake(f"{path}: cannot be read; is it damaged, or no file of weights? ({why})") from error


def _harmless() -> list[Any]:
    """Returns classes beside tensors that other trainers' files hold, and that do nothing when they are made."""
    # numpy has two names for each of these, before and since its version 2.
    scalar, reconstruct = multiarray.scalar, multiarray._reconstruct
    moved = [
        (function, f"{package}.multiarray.{function.__name__}")
        for package in ("numpy.core", "numpy._core")
        for function in (scalar, reconstruct)
    ]
    types = {type(numpy.dtype(kind)) for kind in (*"?bBhHiIlLqQefd", "U", "S")}
    return [
        argparse.Namespace,
        pathlib.PosixPath,
        pathlib.PurePosixPath,
        numpy.ndarray,
        numpy.dtype,
        *types,
        *moved,
    ]
