"""RandAugment and TrivialAugment: operations drawn for each image from one list of fourteen.

The operations and their ranges are the papers' (Cubuk et al. 2020; Müller and Hutter 2021, the wide ranges).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from trainer.recipe.augment import RandAugment

STRENGTHS = 30  # the greatest; they are whole numbers from 0
_BILINEAR = functional.InterpolationMode.BILINEAR


def rand_augment(images: Tensor, numbers: Tensor, settings: RandAugment) -> Tensor:
    """Returns images uint8 [N, C, H, W] after `ops` operations each. numbers: [N, 2 ops] in [0, 1), operation and sign."""
    strength = settings.magnitude / STRENGTHS
    out = []
    for image, row in zip(images, numbers.tolist(), strict=True):
        for choice, sign in zip(row[::2], row[1::2], strict=True):
            image = _operate(image, choice, strength, sign, _RANDAUGMENT)
        out.append(image)
    return torch.stack(out)


def trivial_augment(images: Tensor, numbers: Tensor) -> Tensor:
    """Returns images uint8 [N, C, H, W] after an operation each. numbers: [N, 3] in [0, 1), operation, strength and sign."""
    return torch.stack(
        [
            _operate(image, choice, math.floor(strength * (STRENGTHS + 1)) / STRENGTHS, sign, _TRIVIALAUGMENT)
            for image, (choice, strength, sign) in zip(images, numbers.tolist(), strict=True)
        ]
    )


# The greatest amount of each operation: a slope, a fraction of the side, degrees, a change of a factor, lost bits.
_RANDAUGMENT = {"shear": 0.3, "move": 150 / 331, "turn": 30.0, "enhance": 0.9, "bits": 4}
_TRIVIALAUGMENT = {"shear": 0.99, "move": 32 / 224, "turn": 135.0, "enhance": 0.99, "bits": 6}


def _operate(image: Tensor, choice: float, strength: float, sign: float, ranges: dict[str, float]) -> Tensor:
    """Returns an image uint8 [C, H, W] after one operation.

    choice: in [0, 1), which one. strength: 0 to 1. sign: below 0.5 an operation that has a direction goes the other way.
    """
    kind, operation = _OPERATIONS[math.floor(choice * len(_OPERATIONS))]
    amount = strength * ranges.get(kind, 1.0)
    if kind in ("shear", "move", "turn", "enhance") and sign < 0.5:
        amount = -amount
    return operation(image, amount)


def _affine(
    image: Tensor, angle: float = 0.0, move: Sequence[float] = (0, 0), shear: Sequence[float] = (0, 0)
) -> Tensor:
    return functional.affine_image(
        image, angle=angle, translate=list(move), scale=1.0, shear=list(shear), interpolation=_BILINEAR
    )


def _degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))


def _posterize(image: Tensor, lost: float) -> Tensor:
    return functional.posterize_image(image, 8 - round(lost))


def _solarize(image: Tensor, strength: float) -> Tensor:
    return functional.solarize_image(image, round(255 * (1 - strength)))


_OPERATIONS: list[tuple[str, Callable[[Tensor, float], Tensor]]] = [
    ("none", lambda image, _: image),
    ("shear", lambda image, slope: _affine(image, shear=(_degrees(slope), 0))),
    ("shear", lambda image, slope: _affine(image, shear=(0, _degrees(slope)))),
    ("move", lambda image, part: _affine(image, move=(round(part * image.shape[2]), 0))),
    ("move", lambda image, part: _affine(image, move=(0, round(part * image.shape[1])))),
    ("turn", lambda image, angle: _affine(image, angle=angle)),
    ("enhance", lambda image, change: functional.adjust_brightness_image(image, 1 + change)),
    ("enhance", lambda image, change: functional.adjust_saturation_image(image, 1 + change)),
    ("enhance", lambda image, change: functional.adjust_contrast_image(image, 1 + change)),
    ("enhance", lambda image, change: functional.adjust_sharpness_image(image, 1 + change)),
    ("bits", _posterize),
    ("none", _solarize),
    ("none", lambda image, _: functional.autocontrast_image(image)),
    ("none", lambda image, _: functional.equalize_image(image)),
]
