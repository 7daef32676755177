"""The part of a picture that a view shows: cut out of the whole picture, and resized to the input."""

import math
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from trainer.recipe.augment import RandomResizedCrop

if TYPE_CHECKING:  # Pillow is not needed to read a recipe
    from PIL import Image


class Cuts(NamedTuple):
    """Which part of each image a view shows. numbers: float32 [N, 4] in [0, 1), on the CPU."""

    settings: RandomResizedCrop
    numbers: Tensor

    def of(self, index: Tensor) -> "Cuts":
        """Returns the cuts of the images `index` [M]."""
        return Cuts(self.settings, self.numbers[index.cpu()])


def box(
    numbers: list[float], width: int, height: int, aspect: float, settings: RandomResizedCrop
) -> tuple[int, int, int, int]:
    """Returns the part of a picture: left, top, width, height in pixels. It lies inside, and has a pixel at least.

    The same numbers name the same part of a picture at any size, up to whole pixels.

    Args:
        numbers: Four in [0, 1): area, ratio, left, top.
        width: Of the picture.
        height: Of the picture.
        aspect: Width over height of the input.
        settings: The ranges of area and ratio. The logarithm of the ratio is uniform.
    """
    (least, most), (narrow, wide) = settings.scale, settings.ratio
    area = (least + numbers[0] * (most - least)) * width * height
    ratio = aspect * math.exp(math.log(narrow) + numbers[1] * math.log(wide / narrow))
    across, along = math.sqrt(area * ratio), math.sqrt(area / ratio)
    fits = min(1.0, width / across, height / along)  # a part that is too long or too high becomes smaller
    cut_width, cut_height = (
        max(1, min(whole, round(side * fits))) for side, whole in ((across, width), (along, height))
    )
    left, top = round(numbers[2] * (width - cut_width)), round(numbers[3] * (height - cut_height))
    return left, top, cut_width, cut_height


def cut(
    picture: "Image.Image | np.ndarray | Tensor",
    numbers: list[float],
    settings: RandomResizedCrop,
    height: int,
    width: int,
    filter: str,
) -> Tensor:
    """Returns the part of a picture that these numbers name, as uint8 [C, height, width], antialiased; maybe not contiguous.

    picture: an open image (L or RGB), uint8 [H, W, C], or a tensor uint8 [C, H, W]. filter: `bicubic` or `bilinear`.
    """
    if not isinstance(picture, Tensor | np.ndarray):
        left, top, across, along = box(numbers, *picture.size, width / height, settings)
        part = np.asarray(picture.crop((left, top, left + across, top + along)))
        pixels = _as_tensor(part if part.ndim == 3 else part[:, :, None])
    else:
        pixels = picture if isinstance(picture, Tensor) else _as_tensor(picture)
        left, top, across, along = box(numbers, pixels.shape[2], pixels.shape[1], width / height, settings)
        pixels = pixels[:, top : top + along, left : left + across]
    return _resized(pixels, height, width, filter)


def resized(pixels: np.ndarray, height: int, width: int, filter: str) -> np.ndarray:
    """Returns a picture uint8 [H, W, C] at another size, antialiased. filter: `bicubic` or `bilinear`."""
    return _resized(_as_tensor(pixels), height, width, filter).permute(1, 2, 0).contiguous().numpy()


def _resized(pixels: Tensor, height: int, width: int, filter: str) -> Tensor:
    """Returns an image uint8 [C, H, W] at another size, antialiased; maybe not contiguous."""
    if pixels.device.type == "cpu":
        # Channels last, by the strides of all four axes, is what torch computes quickest and without a copy at the end.
        channels_last = pixels.permute(1, 2, 0).contiguous().unsqueeze(0).permute(0, 3, 1, 2)
        return interpolate(channels_last, (height, width), mode=filter, antialias=True)[0]
    found = interpolate(pixels[None].float(), (height, width), mode=filter, antialias=True)[0]
    return found.round().clamp(0, 255).byte()


def _as_tensor(pixels: np.ndarray) -> Tensor:
    if pixels.flags.writeable:
        return torch.from_numpy(pixels).permute(2, 0, 1)
    with warnings.catch_warnings():  # of memory that must not be written: it is only read
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(pixels).permute(2, 0, 1)
