"""Reads an image file as a network's input, alike in training, evaluation, prediction and exports."""

import contextlib
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from trainer.data.reading import Reading
from trainer.mistakes import Mistake
from trainer.storage.files import check_regular

if TYPE_CHECKING:
    from torch import Tensor

# Formats that Pillow lists but reads only through another program, or that hold no image.
NOT_READ = {"EPS", "MPEG", "HDF5", "GRIB", "BUFR", "WMF", "PDF"}
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SPARE = 1.5
BATCH = 64  # images that are classified at a time
REACH = {"bicubic": 2, "bilinear": 1}  # of the filters, to each side, in pixels of the smaller image
FEW_LEVELS = 32  # an image with fewer levels of brightness is black to a network


def endings() -> set[str]:
    """Returns the suffixes of the files that Pillow can read, in lower case: '.jpg', '.jfif', '.avif' ..."""
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
    at_least: int | None = None,
) -> Image.Image:
    """Opens an image with 8 bits per channel, rotated by its EXIF orientation, without transparency.

    Args:
        path: The file, or an open image.
        mode: 'L' (grey) or 'RGB'.
        background: (R, G, B), 0 to 255, under transparent pixels.
        depth: Bits of the samples in 16-bit files; 2^depth - 1 is white.
        at_least: The side in pixels that the image will be made smaller to. A JPEG file may then be decoded at a half, a
            quarter or an eighth of its size, which is quicker; its sides stay `SPARE` times as long as that.

    Raises:
        Mistake: With the file's name, if it is not an image, is damaged, or has other samples (32 bits,
            floats).
    """
    name = getattr(path, "filename", None) or path  # of an open image the file that it came from
    try:
        if isinstance(path, np.ndarray):
            path = Image.fromarray(path)
        if not isinstance(path, Image.Image):
            check_regular(path)
        with contextlib.nullcontext(path) if isinstance(path, Image.Image) else Image.open(path) as image:
            if at_least is not None:
                image.draft(None, (math.ceil(SPARE * at_least),) * 2)
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith(("I", "F")):
                upright = _from_deep(upright, depth)
            upright = _on_background(upright, background)
            if upright.mode == "LAB":  # which becomes L by way of RGB alone
                upright = upright.convert("RGB")
            return upright.convert(mode)
    except Mistake as error:
        raise Mistake(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise Mistake(f"{name}: is no image that can be read: {error}") from None


def _deep_samples(image: Image.Image) -> np.ndarray:
    """Returns the samples [H, W] of a grey image above 8 bits. Raises Mistake if they exceed 16 bits."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() >= 2**16:
        raise Mistake(f"has pixels of {values.dtype} up to {values.max():g}; 8 and 16 bits are allowed")
    return values


def _from_deep(image: Image.Image, depth: int) -> Image.Image:
    """Scales the samples of a 16-bit grey image to 8 bits."""
    values = _deep_samples(image)  # Pillow's own conversion would clip them at 255
    return Image.fromarray(np.round(np.minimum(values / (2**depth - 1), 1) * 255).astype(np.uint8))


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if not image.has_transparency_data:
        return image
    transparent = image.convert("RGBA")
    opaque = Image.new("RGBA", transparent.size, (*background, 255))
    return Image.alpha_composite(opaque, transparent).convert("RGB")


def brightest(path: str | Path) -> int | None:
    """Returns the greatest sample of a 16-bit grey file, None for other files. Decodes the whole image.

    Raises:
        Mistake: As `open_image`; and for a 16-bit colour image so dark that its upper 8 bits, the only ones
            that Pillow reads, have fewer than `FEW_LEVELS` levels.
    """
    try:
        check_regular(path)
        with Image.open(path) as image:
            deep_colour = _is_deep_colour(path, image)
            image.draft(None, (1, 1))  # a JPEG file, of 8 bits, is read to its end all the same, and quicker
            image.load()
            if image.mode.startswith(("I", "F")):
                return int(_deep_samples(image).max())
            level = int(np.asarray(image).max()) if deep_colour else 255
    except Mistake as error:
        raise Mistake(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except Exception as error:
        raise Mistake(f"{path}: is no image that can be read: {error}") from None
    if level < FEW_LEVELS:
        raise Mistake(
            f"{path}: has 16 bits a channel, of which samples use the lowest {level.bit_length() + 8}: of 8 bits only "
            f"{level + 1} levels would be left. Save it with 8 bits a channel"
        )
    return None


def _is_deep_colour(path: str | Path, image: Image.Image) -> bool:
    """Returns whether an image of several channels has 16 bits in each, of which Pillow reads the upper 8."""
    if image.format == "PNG":
        with open(path, "rb") as file:
            head = file.read(26)
        return len(head) == 26 and head[24] == 16 and struct.unpack("B", head[25:26])[0] in (2, 4, 6)
    return any("16" in str(tile[3]) for tile in getattr(image, "tile", ()) if image.mode in ("RGB", "RGBA"))


def mode_of(channels: int, path: object) -> str:
    """Returns Pillow's mode of images of so many channels. Raises Mistake, with the path, for others than 1 and 3."""
    if channels not in (1, 3):
        raise Mistake(f"{path}: the network takes {channels} channels; images have 1 or 3")
    return "L" if channels == 1 else "RGB"


def read_image(path: str | Path | Image.Image | np.ndarray, reading: Reading) -> "Tensor":
    """Returns an image file as a uint8 tensor [C, H, W]: `read_pixels`."""
    import torch  # here: images are read where torch is not installed too

    return torch.from_numpy(read_pixels(path, reading))


def read_pixels(path: str | Path | Image.Image | np.ndarray, reading: Reading) -> np.ndarray:
    """Returns an image file as uint8 [C, H, W], cropped and resized as in `reading`.

    Raises:
        Mistake: As `open_image`, and for other numbers of channels than 1 and 3.
    """
    channels, height, width = reading.shape
    at_least = math.ceil(max(height, width) / reading.crop) if reading.draft else None
    image = open_image(path, mode_of(channels, path), reading.background, reading.depth, at_least)
    fit = _cut_whole_pixels if reading.cut == "whole pixels" else _FITS[reading.fit]
    pixels = np.array(fit(image, height, width, reading))
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _middle_box(image: Image.Image, height: int, width: int, reading: Reading) -> Image.Image:
    """Resizes the middle box, with the input's aspect ratio, to height x width."""
    # The box is cropped while resizing, so that an image of 100,000 x 1 pixels never becomes large.
    scale = min(image.width / width, image.height / height) * reading.crop
    box_width, box_height = scale * width, scale * height
    # Rounding may take a side of the box beyond the image by a part in 1e15, which Pillow refuses.
    left, top = max(0.0, (image.width - box_width) / 2), max(0.0, (image.height - box_height) / 2)
    box = (left, top, min(left + box_width, image.width), min(top + box_height, image.height))
    return _resized(image, (width, height), reading.filter, box)


def _resized(
    image: Image.Image, size: tuple[int, int], name: str, box: tuple[float, float, float, float]
) -> Image.Image:
    """Resizes a box (left, top, right, bottom) of an image to (width, height): first across, then down.

    Pillow rounds to 8 bits between the two passes. Which of them comes first depends on its version and on the sizes, so each
    pass is a call of its own here.
    """
    left, top, right, bottom = box
    reach = math.ceil(REACH[name] * max((bottom - top) / size[1], 1)) + 1
    first, last = max(0, math.floor(top) - reach), min(image.height, math.ceil(bottom) + reach)
    if last - first < image.height:
        image = image.crop((0, first, image.width, last))
    across = image.resize((size[0], image.height), RESAMPLING[name], box=(left, 0, right, image.height))
    return across.resize(size, RESAMPLING[name], box=(0, top - first, size[0], bottom - first))


def _squashed(image: Image.Image, height: int, width: int, reading: Reading) -> Image.Image:
    """Resizes the whole image to height x width."""
    return _resized(image, (width, height), reading.filter, (0, 0, *image.size))


def _padded(image: Image.Image, height: int, width: int, reading: Reading) -> Image.Image:
    """Resizes the whole image to fit inside height x width, and centres it on the background."""
    scale = min(width / image.width, height / image.height)
    inner_width, inner_height = (max(1, int(side * scale + 0.5)) for side in image.size)
    padded = Image.new("RGB", (width, height), reading.background).convert(image.mode)
    inner = _squashed(image, inner_height, inner_width, reading)
    padded.paste(inner, ((width - inner_width) // 2, (height - inner_height) // 2))
    return padded


_FITS = {"crop": _middle_box, "pad": _padded, "squash": _squashed}


def _cut_whole_pixels(image: Image.Image, height: int, width: int, reading: Reading) -> Image.Image:
    """Resizes the image to cover height x width, then crops the middle (packed files of version 1)."""
    scale = max(height / image.height, width / image.width)
    # Crops what is not needed before resizing, except for the margin that the filter reads.
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
        image = _resized(image, size, reading.filter, (0, 0, *image.size))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
