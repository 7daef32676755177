"""Packs a network (its spec and its weights) into a file's bytes, and unpacks it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.compression.states import bake, dense_state, plain_key
from trainer.compression.weights import refuse_computed
from trainer.data.images import Data
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.networks.output import take_output
from trainer.packing import container
from trainer.packing.headers import check, check_settings, compact, full, read_header
from trainer.packing.headers import header as header
from trainer.packing.headers import reading as reading
from trainer.packing.headers import rebuilds as rebuilds


def facts_of(data: Data) -> dict[str, Any]:
    """Returns a packed file's facts of the images: shape, mean and std, class names, and how an image file is read.

    shape: (C, H, W). mean, std: per channel. reading: what differs from the default (`image_file.Reading`).
    """
    return {
        "shape": list(data.shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "classes": list(data.classes),
        "reading": {} if data.reading is None else data.reading.settings(),
    }


def encode(model: nn.Module, spec: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> bytes:
    """Packs a network into bytes, which decode to exactly the tensors that it computes with.

    Args:
        model: The network; masked and shared weights are packed as such.
        spec: {"model": name, settings} as in a recipe; None for a network that the reader must bring.
        facts: {"shape", "mean", "std", "classes"} of the images, see `facts_of`.

    Raises:
        Mistake: For a tensor of another type, a weight that a hook computes, and if spec does not build this network.
    """
    header, tensors, order = _parts(model, spec, facts)
    return container.encode(header, tensors, grid_steps(tensors), layout=order)


def can_encode(model: nn.Module, spec: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> None:
    """Raises Mistake for a network that `encode` refuses, or that could not be loaded from the file.

    Nothing is encoded; the network is built from its spec once more. The arguments are those of `encode`.
    """
    header, tensors, order = _parts(model, spec, facts)
    if order is None:
        return
    built = build(header["net"], tuple(header["shape"]), len(facts["classes"]))
    wrong = _misfits(built, {name: torch.from_numpy(array) for name, array in tensors.items()})
    if wrong:
        raise Mistake(f"the network is not what {header['net']['model']!r} builds: {_few(wrong)}")


def _parts(
    model: nn.Module, spec: Mapping[str, Any] | None, facts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, tuple[tuple[int, ...], np.dtype]] | None]:
    """Returns the header, the tensors in the file's order, and the layout, None for a network that the reader brings."""
    refuse_computed(model)
    tensors = {}
    for name, tensor in dense_state(model).items():
        kind = (
            str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, Tensor) else type(tensor).__name__
        )
        if kind not in container.DTYPES:
            raise Mistake(
                f"{name!r} is of type {kind}, which cannot be packed: {', '.join(container.DTYPES)} can"
            )
        tensors[name] = tensor.detach().cpu().numpy()
    header = compact(facts) if spec is None else {"net": dict(spec), **compact(facts)}
    check(header)
    if not rebuilds(header):
        return header, tensors, None
    order = layout(header)
    if set(order) != set(tensors):
        odd = sorted(set(order) ^ set(tensors))
        raise Mistake(
            f"the network is not what {header['net']['model']!r} builds: {_few(odd)} are in one of them only"
        )
    # A masked weight comes later in the state_dict than in the plain network, whose order the reader knows.
    return header, {name: tensors[name] for name in order}, order


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"


def grid_steps(tensors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns {name: step} of float32 tensors that hold small integers times a step, as `to_grid` and even codebooks do.

    The step is the greatest that divides all values. Tensors with a value beyond 255 steps are left out, and weights (two
    dimensions or more) that use less than half of the integers between their least and greatest: a codebook costs less.
    """
    steps = {}
    for name, array in tensors.items():
        values = array.astype(np.float64)
        if array.dtype != np.float32 or not array.ndim or not values.any() or not np.isfinite(values).all():
            continue
        if np.signbit(values[values == 0]).any():  # -0.0 is no multiple
            continue
        distinct = np.unique(values[values != 0])
        fractions, exponents = np.frexp(np.abs(distinct))
        lowest = int(exponents.min())
        if len(distinct) > 510 or exponents.max() - lowest > 30:
            continue
        integers = np.ldexp(fractions, exponents - lowest + 24).astype(np.int64)  # float32 has 24 bits
        step = math.ldexp(int(np.gcd.reduce(integers)), lowest - 24)
        span = (max(0.0, distinct[-1]) - min(0.0, distinct[0])) / step
        if np.abs(distinct).max() <= 255 * step and (array.ndim == 1 or span <= 2 * len(distinct)):
            steps[name] = step
    return steps


def tensors(data: bytes, name: str = "file") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of a packed file by name, and its facts. Raises Mistake, with the file's name, if damaged."""
    header = read_header(data, name)
    _, arrays = container.decode(data, name, layout=layout if rebuilds(header) else None)
    # ascontiguousarray makes a vector of a scalar
    return {
        key: torch.from_numpy(np.ascontiguousarray(a).reshape(a.shape)) for key, a in arrays.items()
    }, full(header)


def account(data: bytes, name: str = "file") -> tuple[list[dict], dict[str, Any]]:
    """Returns where each byte of a packed file goes (`container.account`), and its facts."""
    header = read_header(data, name)
    return container.account(data, name, layout=layout if rebuilds(header) else None), full(header)


def decode(
    data: bytes, name: str = "file", into: nn.Module | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the network of a packed file, in evaluation mode, and the file's facts.

    Args:
        data: The file's bytes.
        name: The file's name, for messages.
        into: A network to fill, for files of networks that are on no shelf. It is unchanged if it does not fit.

    Raises:
        Mistake: For damaged data, for a file that needs `into`, and if names, shapes, types or ties of the network's
            tensors differ from the file's.
    """
    state, header = tensors(data, name)
    if into is None and not rebuilds(header):
        whose = f"{header['net']['model']!r}, which" if "net" in header else "a network that"
        raise Mistake(
            f"{name}: holds the weights of {whose} is on no shelf: give the network as `into`; on the command line --model "
            "python:module:function or --recipe names it"
        )
    model = into if into is not None else build(header["net"], tuple(header["shape"]), len(header["classes"]))
    wrong = _misfits(model, state)
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise Mistake(f"{name}: does not fit the network: {'; '.join(wrong[:4])}{more}")
    bake(model)
    model.load_state_dict(state)
    take_output(model, (header.get("net") or {}).get("output"))
    return model.eval(), header


def _misfits(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Returns why a network cannot hold exactly these tensors; [] if it can."""
    own = dense_state(model)
    wrong = [f"{key!r} is missing from the file" for key in own if key not in state]
    wrong += [f"{key!r} is not in the network" for key in state if key not in own]
    for key in own.keys() & state.keys():
        ours, read = own[key], state[key]
        if ours.shape != read.shape:
            wrong.append(f"{key!r} is {tuple(read.shape)} in the file and {tuple(ours.shape)} in the network")
        elif ours.dtype != read.dtype:
            wrong.append(f"{key!r} is {read.dtype} in the file and {ours.dtype} in the network")
    tied: dict[int, str] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        key = plain_key(path)
        first = tied.setdefault(id(parameter), key)
        if first in state and key in state and not torch.equal(state[first], state[key]):
            wrong.append(f"{first!r} and {key!r} are one in the network and differ in the file")
    return sorted(wrong)


def layout(header: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns names, shapes and types of the tensors of the network that the header names, without allocating it."""
    header = full(header)
    check_settings(header)
    with torch.device("meta"):
        model = build(header["net"], tuple(header["shape"]), len(header["classes"]))
    return {
        name: (tuple(tensor.shape), np.dtype(str(tensor.dtype).removeprefix("torch.")))
        for name, tensor in model.state_dict().items()
    }
