"""Networks as packed files: the architecture's spec and the weights, through the codec, and back."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer import codec, compress
from trainer.context import Data
from trainer.teacher import build


def facts(data: Data) -> dict[str, Any]:
    """What a packed file must know of the images: shape (C, H, W), mean and std per channel, class names."""
    return {"shape": list(data.shape), "mean": list(data.mean), "std": list(data.std), "classes": list(data.classes)}


def _compact(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Class names that only count ('0', '1' ...) are stored as their number."""
    classes = facts["classes"]
    return {**facts, "classes": len(classes) if classes == [str(i) for i in range(len(classes))] else classes}


def _full(header: Mapping[str, Any]) -> dict[str, Any]:
    classes = header["classes"]
    return {**header, "classes": [str(i) for i in range(classes)] if isinstance(classes, int) else classes}


def rebuilds(header: Mapping[str, Any]) -> bool:
    """Whether a file's network is built by the program itself: from the models shelf or from timm.

    A file that names code (`python:module:function`) or a hub must not have it run or fetched by whoever looks at it:
    such a network is brought by the reader.
    """
    return "net" in header and not str(header["net"].get("model")).startswith(("python:", "hf-hub:"))


def encode(model: nn.Module, spec: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> bytes:
    """The bytes of a packed network; they decode to exactly the tensors the network computes with.

    spec: {"model": name, settings} as in a recipe, None for a network that the reader must bring himself.
    facts: {"shape", "mean", "std", "classes"}.
    """
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in compress.dense_state(model).items()}
    header = _compact(facts) if spec is None else {"net": dict(spec), **_compact(facts)}
    steps = grid_steps(tensors)
    if not rebuilds(header):
        return codec.encode(header, tensors, steps)
    order = layout(header)
    if set(order) != set(tensors):
        odd = sorted(set(order) ^ set(tensors))
        raise ValueError(f"the network is not what {dict(spec)} builds: {', '.join(odd)} are in one of them only")
    # A masked weight has left its place among its module's parameters: the spec's order is what a reader knows.
    return codec.encode(header, {name: tensors[name] for name in order}, steps, layout=order)


def grid_steps(tensors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Step of each float32 vector that holds few-bit integers times a power of two, such as `compress.to_grid` leaves.

    The step is the largest power of two that all are multiples of; vectors that reach more than 255 of it have none.
    """
    steps = {}
    for name, array in tensors.items():
        values = array.astype(np.float64)
        if array.dtype != np.float32 or array.ndim != 1 or not values.any() or not np.isfinite(values).all():
            continue
        if np.signbit(values[values == 0]).any():  # -0.0 is no multiple
            continue
        fractions, exponents = np.frexp(np.abs(values[values != 0]))
        integers = np.ldexp(fractions, 24).astype(np.int64)  # float32 has so many bits
        lowest = np.log2(integers & -integers).astype(np.int64) + exponents - 24
        step = 2.0 ** int(lowest.min())
        if np.abs(values).max() <= 255 * step:
            steps[name] = step
    return steps


def header(data: bytes, name: str = "file") -> dict[str, Any]:
    """The facts of a packed file, and the spec of its network under "net". Raises ValueError naming the file."""
    return _full(codec.read_header(data, name))


def tensors(data: bytes, name: str = "file") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a packed file by name, and its facts. Raises ValueError naming the file when it is damaged."""
    header = codec.read_header(data, name)
    _, arrays = codec.decode(data, name, layout=layout if rebuilds(header) else None)
    return {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}, _full(header)


def account(data: bytes, name: str = "file") -> tuple[list[dict], dict[str, Any]]:
    """Where each byte of a packed file goes, and its facts."""
    header = codec.read_header(data, name)
    return codec.account(data, name, layout=layout if rebuilds(header) else None), _full(header)


def decode(data: bytes, name: str = "file", into: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a packed file, in evaluation mode, and its facts.

    into: a network to fill, for files of networks that are on no shelf. Raises ValueError naming the file when it is
    damaged, when it needs `into`, or when the network does not fit.
    """
    state, header = tensors(data, name)
    if into is None and not rebuilds(header):
        told = f"{header['net']['model']!r}, which" if "net" in header else "a network that"
        raise ValueError(f"{name}: holds the weights of {told} is on no shelf: give the network as `into`")
    model = into if into is not None else build(header["net"], tuple(header["shape"]), len(header["classes"]))
    compress.bake(model)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{name}: does not fit the network: {str(error)[:600]}") from None
    return model.eval(), header


def layout(header: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Names, shapes and types of the tensors of the network that the header names, without allocating it."""
    header = _full(header)
    with torch.device("meta"):
        model = build(header["net"], tuple(header["shape"]), len(header["classes"]))
    return {
        name: (tuple(tensor.shape), np.dtype(str(tensor.dtype).removeprefix("torch.")))
        for name, tensor in model.state_dict().items()
    }


def digest(state: Mapping[str, Tensor]) -> str:
    """A digest of named tensors: equal only for bit-equal weights."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def load(path: str | Path, into: nn.Module | None = None) -> nn.Module:
    """The network of a packed file, in evaluation mode (see `decode`)."""
    return decode(Path(path).read_bytes(), str(path), into)[0]
