"""Loads a packed file as a network with its classes, its image preprocessing and its predictions."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trainer.data.image_file import BATCH, read_image
from trainer.data.images import normalize
from trainer.data.reading import Reading
from trainer.mistakes import Mistake
from trainer.packing import headers
from trainer.packing import network as packed
from trainer.storage.files import read_bytes

Images = Tensor | str | Path | Image.Image | np.ndarray | Iterable[str | Path | Image.Image | np.ndarray]


def load(path: str | Path, into: nn.Module | None = None) -> nn.Module:
    """Loads the network of a packed file, in evaluation mode.

    Args:
        path: The file.
        into: A network to fill, for files without a spec to rebuild it from. It is unchanged if it does not
            fit.

    Returns:
        The network, with the attribute `classes`, their names in order. If the file was packed with shape and
        mean, it also has `preprocess(images)`, which returns the input [N, C, H, W] for files, PIL images or
        uint8 tensors [N, C, H, W], and `predict(images)`, which returns the name of each image's class.

    Raises:
        Mistake: With the file's name, if it is damaged, needs `into`, or does not fit it.
    """
    data = read_bytes(path)
    network, header = packed.decode(data, str(path), into)
    model: Any = network  # of any type, because it gets new attributes
    model.classes = header["classes"]
    if header["shape"] and header["mean"]:
        prepare = partial(
            preprocess, reading=headers.reading(data, str(path)), mean=header["mean"], std=header["std"]
        )
        model.preprocess = prepare
        model.predict = partial(_predict, model, prepare, header["classes"])
    return model


def preprocess(images: Images, reading: Reading, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns a network's input [N, C, H, W], bit for bit as in training and evaluation.

    Args:
        images: A path, a PIL image or an array [H, W] or [H, W, 3], or several; or a uint8 tensor [C, H, W]
            or [N, C, H, W] of the input's size, which is only scaled and normalised.
        reading: How image files are resized and cropped.
        mean: Of the normalisation, for each channel.
        std: Of the normalisation, for each channel.

    Raises:
        Mistake: For a tensor of another type or size, and for files that cannot be read.
    """
    stacked: Tensor
    if isinstance(images, Tensor):
        stacked = images if images.dim() == 4 else images[None]
        if stacked.dtype != torch.uint8 or tuple(stacked.shape[1:]) != reading.shape:
            shape = "x".join(map(str, reading.shape))
            raise Mistake(
                f"images: got {stacked.dtype} {tuple(stacked.shape)}; uint8 [N, {shape}] is allowed, or image files"
            )
    else:
        several = [images] if isinstance(images, (str, Path, Image.Image, np.ndarray)) else images
        stacked = torch.stack([read_image(image, reading) for image in several])
    return normalize(stacked.float() / 255, mean, std)


@torch.inference_mode()
def _predict(model: nn.Module, prepare: Any, classes: Sequence[str], images: Images) -> list[str]:
    """Returns the name of each image's class."""
    inputs = prepare(images)
    labels = torch.cat([model(batch).argmax(-1) for batch in inputs.split(BATCH)]) if len(inputs) else inputs
    return [classes[label] for label in labels.tolist()]
