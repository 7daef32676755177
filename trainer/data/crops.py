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
    numbers: list[float],
    width: int,
    height: int,
    aspect: float,
    settings: RandomResizedCrop,
    fit: str = "crop",
) -> tuple[int, int, int, int]:
    """Returns the part of a picture: left, top, width, height in pixels. It has a pixel at least, and lies inside.

    The same numbers name the same part of a picture at any size, up to whole pixels.

    With `fit` (`Reading.fit`) a thing is as large, and stretched as much, as where the image is measured: `squash` takes
    a part of the picture stretched to the input's shape, `pad` of the picture with its background. The latter is the only
    part that may reach beyond the picture, and then only as far as it is longer: it shows all that there is.

    Args:
        numbers: Four in [0, 1): area, ratio, left, top.
        width: Of the picture.
        height: Of the picture.
        aspect: Width over height of the input.
        settings: The ranges of area and ratio. The logarithm of the ratio is uniform.
    """
    (least, most), (narrow, wide) = settings.scale, settings.ratio
    full = width, height
    if fit == "squash":
        aspect = width / height
    elif fit == "pad":
        full = max(width, round(height * aspect)), max(height, round(width / aspect))
    area = (least + numbers[0] * (most - least)) * full[0] * full[1]
    ratio = aspect * math.exp(math.log(narrow) + numbers[1] * math.log(wide / narrow))
    across, along = math.sqrt(area * ratio), math.sqrt(area / ratio)
    fits = min(1.0, full[0] / across, full[1] / along)  # a part that is too long or too high becomes smaller
    cut_width, cut_height = (
        max(1, min(whole, round(side * fits))) for side, whole in zip((across, along), full, strict=True)
    )
    left = _start(numbers[2], cut_width, width, full[0])
    top = _start(numbers[3], cut_height, height, full[1])
    return left, top, cut_width, cut_height


def _start(number: float, side: int, picture: int, full: int) -> int:
    """Returns where a side of the part starts, from the picture's edge, of a picture in the middle of `full` pixels."""
    edge = (full - picture) // 2
    first, last = sorted((0, picture - side))
    first, last = max(first, -edge), min(last, full - edge - side)
    return first + round(number * (last - first))


def cut(
    picture: "Image.Image | np.ndarray | Tensor",
    numbers: list[float],
    settings: RandomResizedCrop,
    height: int,
    width: int,
    filter: str,
    fit: str = "crop",
    background: tuple[int, int, int] = (255, 255, 255),
) -> Tensor:
    """Returns the part of a picture that these numbers name, as uint8 [C, height, width], antialiased; maybe not contiguous.

    picture: an open image (L or RGB), uint8 [H, W, C], or a tensor uint8 [C, H, W]. filter: `bicubic` or `bilinear`. fit,
    background: as of a `Reading`.
    """
    if isinstance(picture, Tensor):
        pixels = picture
    else:
        array = np.asarray(picture)
        pixels = _as_tensor(array if array.ndim == 3 else array[:, :, None])
    left, top, across, along = box(numbers, pixels.shape[2], pixels.shape[1], width / height, settings, fit)
    part = pixels[:, max(0, top) : top + along, max(0, left) : left + across]
    if part.shape[1:] == (along, across):
        return _resized(part, height, width, filter)
    found = _filled(pixels.shape[0], height, width, background)
    x, inner_width = _within(left, across, part.shape[2], width)
    y, inner_height = _within(top, along, part.shape[1], height)
    found[:, y : y + inner_height, x : x + inner_width] = _resized(part, inner_height, inner_width, filter)
    return found


def _within(start: int, side: int, inner: int, size: int) -> tuple[int, int]:
    """Returns where the `inner` pixels of a part's side lie in the input of `size` pixels, and how many they become."""
    first = min(size - 1, round(max(0, -start) * size / side))
    return first, max(1, min(size - first, round(inner * size / side)))


def _filled(channels: int, height: int, width: int, colour: tuple[int, int, int]) -> Tensor:
    from PIL import Image

    value = Image.new("RGB", (1, 1), colour).convert("L" if channels == 1 else "RGB").tobytes()
    return torch.tensor(list(value), dtype=torch.uint8)[:, None, None].repeat(1, height, width)


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
