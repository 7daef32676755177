"""How a picture is brought to a network's input: the one answer, for training, measuring, predicting and exports."""

import contextlib
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trainer.data.reading import Reading
from trainer.mistakes import Mistake

# Formats that Pillow lists and only some other program reads, or that hold no picture.
NOT_READ = {"EPS", "MPEG", "HDF5", "GRIB", "BUFR", "WMF", "PDF"}
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
FEW_LEVELS = 32  # a picture of fewer levels of brightness is black to a network


def endings() -> set[str]:
    """Endings of the files that Pillow can read, in lower case: '.jpg', '.jfif', '.avif' ..."""
    return {
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in NOT_READ
    }


def open_image(
    path: str | Path | Image.Image | np.ndarray,
    mode: str,
    background: tuple[int, int, int] = (255, 255, 255),
    depth: int = 16,
) -> Image.Image:
    """An image file upright, as grey ('L') or 'RGB', 8 bits a channel, transparent pixels laid on the background.

    Args:
        path: The file, or a picture that is open already. Its EXIF orientation is followed.
        mode: 'L' or 'RGB'.
        background: Under transparent pixels.
        depth: Bits of the samples where the file has 16: the brightest of them is white.

    Raises:
        Mistake: Naming the file, when it is no image, a damaged one, or one of other numbers (32 bits, fractions).
    """
    try:
        if isinstance(path, np.ndarray):
            path = Image.fromarray(path)
        with contextlib.nullcontext(path) if isinstance(path, Image.Image) else Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith(("I", "F")):
                upright = _from_deep(upright, depth)
            return _on_background(upright, background).convert(mode)
    except Mistake as error:
        raise Mistake(f"{path}: {error}") from None
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise Mistake(f"{path}: is no image that can be read: {error}") from None


def _deep_samples(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() >= 2**16:
        raise Mistake(f"has pixels of {values.dtype} up to {values.max():g}; 8 and 16 bits are allowed")
    return values


def _from_deep(image: Image.Image, depth: int) -> Image.Image:
    values = _deep_samples(image)  # Pillow's own conversion would cut them off at 255
    return Image.fromarray(np.round(np.minimum(values / (2**depth - 1), 1) * 255).astype(np.uint8))


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if not image.has_transparency_data:
        return image
    picture = image.convert("RGBA")
    ground = Image.new("RGBA", picture.size, (*background, 255))
    return Image.alpha_composite(ground, picture).convert("RGB")


def brightest(path: str | Path) -> int | None:
    """The greatest sample of a grey file of 16 bits; None for others. Opens the whole picture.

    Raises Mistake as `open_image`, and for a colour picture of 16 bits so dark that of the upper 8, which Pillow gives,
    fewer than `FEW_LEVELS` are used.
    """
    try:
        with Image.open(path) as image:
            deep_colour = _is_deep_colour(path, image)
            image.load()
            if image.mode.startswith(("I", "F")):
                return int(_deep_samples(image).max())
            level = int(np.asarray(image).max()) if deep_colour else 255
    except Mistake as error:
        raise Mistake(f"{path}: {error}") from None
    except Exception as error:
        raise Mistake(f"{path}: is no image that can be read: {error}") from None
    if level < FEW_LEVELS:
        raise Mistake(
            f"{path}: has 16 bits a channel, of which samples use the lowest {level.bit_length() + 8}: of 8 bits only "
            f"{level + 1} levels would be left. Save it with 8 bits a channel"
        )
    return None


def _is_deep_colour(path: str | Path, image: Image.Image) -> bool:
    """Whether a picture with several channels has 16 bits in each, of which Pillow gives the upper 8."""
    if image.format == "PNG":
        with open(path, "rb") as file:
            head = file.read(26)
        return len(head) == 26 and head[24] == 16 and struct.unpack("B", head[25:26])[0] in (2, 4, 6)
    return any("16" in str(tile[3]) for tile in getattr(image, "tile", ()) if image.mode in ("RGB", "RGBA"))


def read_image(path: str | Path | Image.Image | np.ndarray, reading: Reading) -> Tensor:
    """An image file as the uint8 [C, H, W] that the reading says.

    Raises Mistake as `open_image`, and for a number of channels that pictures do not have.
    """
    channels, height, width = reading.shape
    if channels not in (1, 3):
        raise Mistake(f"{path}: the network wants {channels} channels; images have 1 or 3")
    image = open_image(path, "L" if channels == 1 else "RGB", reading.background, reading.depth)
    fitted = _cut_whole_pixels if reading.cut == "whole pixels" else _middle_box
    pixels = torch.from_numpy(np.array(fitted(image, height, width, reading)))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _middle_box(image: Image.Image, height: int, width: int, reading: Reading) -> Image.Image:
    # The box is cut while resizing: a picture of 100,000 x 1 is never made large.
    scale = min(image.width / width, image.height / height) * reading.crop
    box_width, box_height = scale * width, scale * height
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize((width, height), RESAMPLING[reading.filter], box=box)


def _cut_whole_pixels(image: Image.Image, height: int, width: int, reading: Reading) -> Image.Image:
    scale = max(height / image.height, width / image.width)
    # What will be cut off is cut off before resizing, but for what the filter looks at.
    reach_x, reach_y = (int(np.ceil((side / scale + 8) / 2)) for side in (width, height))
    middle_x, middle_y = image.width // 2, image.height // 2
    if image.width > 64 * width or image.height > 64 * height:
        image = image.crop(
            (
                max(0, middle_x - reach_x),
                max(0, middle_y - reach_y),
                min(image.width, middle_x + reach_x),
                min(image.height, middle_y + reach_y),
            )
        )
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, RESAMPLING[reading.filter])
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
