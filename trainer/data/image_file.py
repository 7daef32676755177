"""One image file as a network wants it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.mistakes import Mistake


def open_image(path: str | Path, mode: str) -> Image.Image:
    """An image file as grey ('L') or 'RGB', 8 bits a channel; of 16 bits the upper half.

    Raises Mistake naming the file when it is no image, a damaged one, or one of other numbers (32 bits, fractions).
    """
    try:
        with Image.open(path) as image:
            if not image.mode.startswith(("I", "F")):
                return image.convert(mode)
            values = np.asarray(image)  # Pillow's own conversion would cut 16 bits off at 255
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise Mistake(f"{path}: is no image that can be read: {error}") from None
    if values.dtype.kind == "f" or values.min() < 0 or values.max() >= 2**16:
        raise Mistake(
            f"{path}: has pixels of {values.dtype} up to {values.max():g}; 8 and 16 bits are allowed"
        )
    return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert(mode)


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """An image file as uint8 [C, H, W]: grey for one channel, RGB for three; the shorter side is fitted, the rest cut.

    Raises Mistake as `open_image`.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise Mistake(f"{path}: the network wants {channels} channels; images have 1 or 3")
    image = open_image(path, "L" if channels == 1 else "RGB")
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()
