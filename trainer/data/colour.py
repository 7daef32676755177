"""Augmentations of colour and sharpness. The result for an image depends on itself and its own amount alone."""

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional


def saturated(images: Tensor, factors: Tensor) -> Tensor:
    """Returns images float [N, 3, H, W] in [0, 1] with their distance from grey times a factor [N, 1] each."""
    grey = _grey(images)
    return (grey + (images - grey) * factors[:, :, None, None]).clamp(0, 1)


def greyed(images: Tensor, chosen: Tensor) -> Tensor:
    """Returns images [N, 3, H, W], those where `chosen` [N, 1] is True without their colour."""
    return torch.where(chosen[:, :, None, None], _grey(images), images)


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Returns images float [N, 3, H, W] in [0, 1], the hues of each turned by a fraction [N, 1] of the circle (-0.5 to 0.5)."""
    return _each(images, turns, functional.adjust_hue_image)


def blurred(images: Tensor, deviations: Tensor, most: float) -> Tensor:
    """Returns images float [N, C, H, W] in [0, 1], each blurred by a Gaussian.

    Args:
        images: The images.
        deviations: [N, 1], standard deviation in pixels. Below 0.1 an image stays as it is.
        most: The greatest deviation; the kernel reaches three of them to each side, and at most to the image's far edge.
    """
    sides = (2 * min(math.ceil(3 * most), side - 1) + 1 for side in images.shape[:1:-1])
    kernel = list(sides)

    def blur(image: Tensor, deviation: float) -> Tensor:
        return image if deviation < 0.1 else functional.gaussian_blur_image(image, kernel, [deviation] * 2)

    return _each(images, deviations, blur).clamp(0, 1)


def _each(images: Tensor, amounts: Tensor, function) -> Tensor:
    """Returns function(image, amount) of each image. One at a time, because the kernels take one amount for all."""
    return torch.stack(
        [function(image, amount) for image, amount in zip(images, amounts.flatten().tolist(), strict=True)]
    )


def _grey(images: Tensor) -> Tensor:
    """Returns the brightness [N, 1, H, W] of images [N, 3, H, W], by ITU-R 601-2."""
    red, green, blue = images.split(1, dim=1)
    # Separate operations: a fused one may round otherwise at the end of a batch.
    return red * 0.299 + green * 0.587 + blue * 0.114
