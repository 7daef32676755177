"""What a network is given of a picture: the size, the part of it, and how samples are taken."""

from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.mistakes import Mistake

FILTERS = ("bicubic", "bilinear")
DEPTHS = (8, 10, 12, 14, 16)


@dataclass(frozen=True)
class Reading:
    """How a picture becomes the uint8 [C, H, W] that a network is given.

    Args:
        shape: (C, H, W) with C = 1 (grey) or 3 (RGB).
        crop: The middle box of the input's proportions, `crop` times as large as fits in the picture, is taken.
        filter: How it is resized: `bicubic` or `bilinear`, antialiased.
        background: (R, G, B), 0 to 255, that transparent pixels are laid on.
        depth: Bits of the samples in files of 16 bits: 12 where 4095 is white.
        cut: The rule of packed files of version 1 is `whole pixels`: the picture is resized first, then cut.
    """

    shape: tuple[int, int, int]
    crop: float = 1.0
    filter: str = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)
    depth: int = 16
    cut: str = field(default="box", compare=True)

    def settings(self) -> dict[str, Any]:
        """What differs from the default, for a packed file's header; the shape stands there already."""
        plain, usual = asdict(self), asdict(Reading(self.shape))
        found = {key: value for key, value in plain.items() if value != usual[key]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def reading_of(shape: tuple[int, int, int], settings: dict[str, Any]) -> Reading:
    """The `Reading` of `settings`, which may come from anybody's file. Raises Mistake for what it cannot be."""
    try:
        background = tuple(settings.get("background", (255, 255, 255)))
        made = Reading((shape[0], shape[1], shape[2]), **{**settings, "background": background})
        whole = isinstance(made.depth, int) and all(isinstance(value, int) for value in made.background)
        right = (
            made.filter in FILTERS
            and made.cut in ("box", "whole pixels")
            and 0 < made.crop <= 1
            and made.depth in DEPTHS
            and len(made.background) == 3
            and all(0 <= value <= 255 for value in made.background)
        )
    except (TypeError, AttributeError):
        whole = right = False
    if not (whole and right):
        raise Mistake(f"how its images are read is not known here: {settings}")
    return made


# What a packed file of version 1 meant: resized as a whole, the shorter side fitted, bilinear; then cut.
def reading_of_version_1(shape: tuple[int, int, int]) -> Reading:
    return Reading((shape[0], shape[1], shape[2]), filter="bilinear", cut="whole pixels")
