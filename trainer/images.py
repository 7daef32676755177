"""One image file as a network wants it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """An image file as uint8 [C, H, W]: grey for one channel, RGB for three; the shorter side is fitted, the rest cut.

    Raises ValueError naming the file when it is no image.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"{path}: the network wants {channels} channels; images have 1 or 3")
    try:
        with Image.open(path) as image:
            image = image.convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: is no image that can be read: {error}") from None
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()
