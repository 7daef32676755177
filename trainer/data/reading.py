"""The settings that turn an image file into a network's input: size, crop, filter and bit depth."""

from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.mistakes import Mistake

FILTERS = ("bicubic", "bilinear")
FITS = ("crop", "pad", "squash")
DEPTHS = (8, 10, 12, 14, 16)


@dataclass(frozen=True)
class Reading:
    """How an image file becomes the uint8 [C, H, W] that a network takes.

    Args:
        shape: (C, H, W) with C = 1 (grey) or 3 (RGB).
        crop: The middle box with the input's aspect ratio is used, `crop` times as large as fits in the
            image.
        filter: Of the resizing: `bicubic` or `bilinear`, antialiased.
        background: (R, G, B), 0 to 255, under transparent pixels.
        depth: Bits of the samples in 16-bit files: 12 if 4095 is white.
        fit: What becomes of an image of another aspect ratio. `crop` takes the middle box; `pad` takes all of it, with
            the background on two sides; `squash` takes all of it and stretches it.
        cut: `box` crops while resizing. `whole pixels`, as in packed files of version 1, resizes first, then
            crops.
        draft: Whether a JPEG file much larger than the input is decoded at a half, a quarter or an eighth of its size.
    """

    shape: tuple[int, int, int]
    crop: float = 1.0
    filter: str = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)
    depth: int = 16
    fit: str = "crop"
    cut: str = field(default="box", compare=True)
    draft: bool = False

    def settings(self) -> dict[str, Any]:
        """Returns the settings that are not default, without the shape, for a packed file's header."""
        own, default = asdict(self), asdict(Reading(self.shape))
        changed = {key: value for key, value in own.items() if value != default[key]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in changed.items()}


def reading_of(shape: tuple[int, int, int], settings: dict[str, Any]) -> Reading:
    """Returns the `Reading` of settings, maybe of an untrusted file. Raises Mistake if they are not valid."""
    try:
        background = tuple(settings.get("background", (255, 255, 255)))
        reading = Reading((shape[0], shape[1], shape[2]), **{**settings, "background": background})
        integers = isinstance(reading.depth, int) and all(
            isinstance(value, int) for value in reading.background
        )
        valid = (
            reading.filter in FILTERS
            and reading.cut in ("box", "whole pixels")
            and reading.fit in FITS
            and 0 < reading.crop <= 1
            and (reading.fit == "crop" or (reading.cut, reading.crop) == ("box", 1))
            and reading.depth in DEPTHS
            and isinstance(reading.draft, bool)
            and len(reading.background) == 3
            and all(0 <= value <= 255 for value in reading.background)
        )
    except (TypeError, AttributeError):
        integers = valid = False
    if not (integers and valid):
        raise Mistake(f"how its images are read is not known here: {settings}")
    return reading


def reading_of_version_1(shape: tuple[int, int, int]) -> Reading:
    """Returns the `Reading` of packed files of version 1: resized (bilinear) first, then cropped."""
    return Reading((shape[0], shape[1], shape[2]), filter="bilinear", cut="whole pixels")
