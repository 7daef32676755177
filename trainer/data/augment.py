"""Augmentation. A view is a number: the augmented image is a function of (seed, view, index) alone.

`draw` returns the random numbers of one view for all samples at once. `apply` turns a batch of stored images
and their random numbers into the input of a network. The result for an image depends only on its own numbers,
so a teacher's output for (view, index) can be kept and reused.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainer.data.crops import Cuts
from trainer.mistakes import Mistake
from trainer.recipe.augment import Augment

_CONTROL_POINTS = 4  # along each side of the image, for `elastic`
# Random numbers that each setting needs for one image, in the order of their columns.
_NUMBERS = {
    "flip": 1,
    "shift": 2,
    "rotate": 1,
    "scale": 1,
    "shear": 1,
    "elastic": 2 * _CONTROL_POINTS**2,
    "brightness": 1,
    "contrast": 1,
    "erase": 5,
    "random_resized_crop": 4,
    "saturation": 1,
    "hue": 1,
    "grayscale": 1,
    "blur": 1,
    "rand_augment": 2,
    "trivial_augment": 3,
}


def num_parameters(augment: Augment) -> int:
    """Returns P, the number of random numbers for each image of a view. Settings that are off need none."""
    return sum(_counts(augment).values())


def _counts(augment: Augment) -> dict[str, int]:
    """Returns how many numbers each setting that is on needs, in the order of their columns."""
    found = {name: count for name, count in _NUMBERS.items() if getattr(augment, name)}
    if augment.rand_augment is not None:
        found["rand_augment"] *= augment.rand_augment.ops
    return found


def cuts_of(augment: Augment, parameters: Tensor) -> Cuts | None:
    """Returns which part of its picture each image of a view shows; None without `random_resized_crop`.

    parameters: float32 [N, P], as drawn.
    """
    if augment.random_resized_crop is None:
        return None
    counts = _counts(augment)
    numbers = parameters.split(list(counts.values()), dim=1)[list(counts).index("random_resized_crop")]
    return Cuts(augment.random_resized_crop, numbers.cpu())


def draw(augment: Augment, seed: int, view: int, num_samples: int) -> Tensor:
    """Draws the random numbers of a view.

    They are the same on every machine and with every version of the libraries, because NumPy guarantees both
    the seeding and the raw stream of a bit generator. The row of a sample does not depend on num_samples.

    Args:
        augment: The settings of the augmentation.
        seed: The seed of the data, not negative.
        view: The number of the view, not negative.
        num_samples: The number of images in the source.

    Returns:
        float32 [num_samples, P] in [0, 1), row i for sample i.
    """
    # The word "view" separates this stream from others that are seeded with the same two numbers.
    words = np.random.SeedSequence(seed, spawn_key=(int.from_bytes(b"view"), view))
    count = num_parameters(augment)
    raw = np.random.PCG64(words).random_raw(num_samples * count)
    return torch.from_numpy((raw >> 40).astype(np.float32) * np.float32(2**-24)).view(num_samples, count)


def apply(augment: Augment, images: Tensor, parameters: Tensor, zoom: float = 1.0) -> Tensor:
    """Augments a batch of images, on their device. With all settings off, the result is exactly images / 255.

    Args:
        augment: The settings of the augmentation.
        images: uint8 [N, C, H, W], already cut out of their pictures where a setting says so (`cuts_of`).
        parameters: float32 [N, P], the rows of `draw` for these images.
        zoom: How many times as large as the data's the images are. Amounts in pixels are of the data's, so that a
            view shows the same part of the image at every size.

    Returns:
        float32 [N, C, H, W] in [0, 1].

    Raises:
        Mistake: If the parameters do not belong to these settings, or a shift is as large as the image.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}; they are uint8 [N, C, H, W]")
    counts = _counts(augment)
    needed = (len(images), sum(counts.values()))
    if parameters.shape != needed:
        raise Mistake(f"parameters: got {tuple(parameters.shape)} where these settings need {needed}")
    if augment.shift * zoom >= min(images.shape[2:]):
        raise Mistake(f"shift: got {augment.shift * zoom:g} pixels; the images are {tuple(images.shape[2:])}")
    if not counts:
        return images.float().div_(255)
    columns = parameters.to(images.device).split(list(counts.values()), dim=1)
    number = dict(zip(counts, columns, strict=True))

    if augment.flip:
        images = _mirrored(images, number["flip"][:, 0] < 0.5)
    # torchvision takes long to import, and reading a recipe comes this way.
    if augment.rand_augment is not None or augment.trivial_augment:
        from trainer.data.policies import rand_augment, trivial_augment
    if augment.rand_augment is not None:
        images = rand_augment(images, number["rand_augment"], augment.rand_augment)
    if augment.trivial_augment:
        images = trivial_augment(images, number["trivial_augment"])
    means = images.sum(dim=(1, 2, 3)) / (255 * images.shape[1:].numel()) if augment.contrast else None
    shift = _whole(number["shift"], augment.shift) if augment.shift else None
    if shift is not None and zoom != 1:
        shift = (shift * zoom).round().long()
    if augment.rotate or augment.scale or augment.shear or augment.elastic:
        grid = _grid(augment, number, shift, images.shape[2:], zoom)
        # Rounding errors may put an interpolated value slightly above 1.
        out = functional.grid_sample(images.float().div_(255), grid, align_corners=False).clamp_(0, 1)
    else:
        moved = images if shift is None else _shifted(images, shift, math.ceil(augment.shift * zoom))
        out = moved.float().div_(255)

    if augment.brightness:
        out = out * _factor(number["brightness"], augment.brightness)[:, :, None, None]
    if augment.contrast:
        # The mean of the image in whole numbers, because a sum of integers is the same in any order.
        assert means is not None
        mean = means[:, None, None, None]
        out = mean + (out - mean) * _factor(number["contrast"], augment.contrast)[:, :, None, None]
    if augment.brightness or augment.contrast:
        out = out.clamp(0, 1)
    if augment.saturation or augment.hue or augment.grayscale or augment.blur:
        from trainer.data.colour import blurred, greyed, saturated, turned
    if augment.saturation:
        out = saturated(out, _factor(number["saturation"], augment.saturation))
    if augment.hue:
        out = turned(out, _between(number["hue"], augment.hue))
    if augment.grayscale:
        out = greyed(out, number["grayscale"] < augment.grayscale)
    if augment.blur:
        out = blurred(out, number["blur"] * augment.blur * zoom, augment.blur * zoom)
    if augment.erase:
        out = out.masked_fill(_rectangles(number["erase"], augment.erase, images.shape[2:]), 0)
    return out


def _mirrored(images: Tensor, chosen: Tensor) -> Tensor:
    """Returns the images [N, C, H, W], those where `chosen` [N] is True with left and right exchanged."""
    if images.device.type != "cpu":
        return torch.where(chosen[:, None, None, None], images.flip(3), images)
    # Half as much to compute (a GPU would wait for which ones), and index_select copies whole images, as assigning does not.
    which = chosen.nonzero().flatten()
    row = torch.arange(len(images))
    row[which] = torch.arange(len(images), len(images) + len(which))
    return torch.cat([images, images.index_select(0, which).flip(3)]).index_select(0, row)


def _between(numbers: Tensor, limit: float) -> Tensor:
    """Maps [0, 1) linearly to [-limit, limit)."""
    return (2 * numbers - 1) * limit


def _factor(numbers: Tensor, fraction: float) -> Tensor:
    return 1 + _between(numbers, fraction)


def _whole(numbers: Tensor, limit: int) -> Tensor:
    """Maps [0, 1) to the integers from -limit to limit, each equally likely."""
    # The largest float below 1, times a count, may be rounded up to the count: hence the clamp.
    return (numbers * (2 * limit + 1)).floor().clamp(max=2 * limit).long() - limit


def _shifted(images: Tensor, shift: Tensor, limit: int) -> Tensor:
    """Moves each image right and down by its own number of whole pixels, as a window of the padded image."""
    padded = functional.pad(images, (limit,) * 4)
    windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)  # nothing is copied yet
    right, down = shift.unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, limit - down, limit - right]


def _grid(
    augment: Augment, number: dict[str, Tensor], shift: Tensor | None, shape: Sequence[int], zoom: float
) -> Tensor:
    """Returns where in the stored image each output pixel is sampled, as grid_sample's [N, H, W, 2].

    In pixels from the image's centre: the output position minus the shift, sheared, rotated and divided by
    the scale, plus the elastic displacement. Products and sums are separate operations, so that rounding does
    not depend on an image's position in the batch.
    """
    height, width = shape
    any_number = next(iter(number.values()))
    zero = any_number.new_zeros(len(any_number))

    def amount(name: str, limit: float) -> Tensor:
        return _between(number[name][:, 0], limit) if name in number else zero

    angle = torch.deg2rad(amount("rotate", augment.rotate))
    shear = torch.tan(torch.deg2rad(amount("shear", augment.shear)))
    scale = 1 + amount("scale", augment.scale)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    right, down = (zero, zero) if shift is None else shift.to(zero.dtype).unbind(1)

    # A pixel at p from the centre is at 2 p / side in grid_sample's coordinates, with align_corners=False.
    across = torch.arange(width, device=zero.device) - (width - 1) / 2 - right[:, None]
    along = torch.arange(height, device=zero.device) - (height - 1) / 2 - down[:, None]
    # (x, y) as one complex number: a single addition is three times as fast as one for each coordinate.
    per_column, per_row = (
        torch.complex(position * (to_x * (2 / width))[:, None], position * (to_y * (2 / height))[:, None])
        for position, to_x, to_y in [(across, cos, sin), (along, shear * cos - sin, shear * sin + cos)]
    )
    grid = torch.view_as_real(per_column[:, None, :] + per_row[:, :, None])
    if augment.elastic:
        control = _between(number["elastic"], augment.elastic * zoom).view(
            -1, 2, _CONTROL_POINTS, _CONTROL_POINTS
        )
        for axis, side in enumerate((width, height)):
            grid[..., axis] += _smooth(control[:, axis] * (2 / side), height, width)
    return grid


def _smooth(control: Tensor, height: int, width: int) -> Tensor:
    """Interpolates control points [N, 4, 4] cubically over the image; returns [N, H, W]."""
    points = torch.eye(_CONTROL_POINTS, device=control.device)[None, None]
    down, across = (
        functional.interpolate(points, size=(_CONTROL_POINTS, side), mode="bicubic", align_corners=True)[0, 0]
        for side in (height, width)
    )
    # Explicit sums, because the summation order of a matrix product changes with the number of images.
    rows: Any = sum(control[:, :, point, None] * across[point] for point in range(_CONTROL_POINTS))
    smooth: Any = sum(rows[:, point, None, :] * down[point][:, None] for point in range(_CONTROL_POINTS))
    return smooth


def _rectangles(numbers: Tensor, fraction: float, shape: Sequence[int]) -> Tensor:
    """Returns bool [N, 1, H, W]: True in a random rectangle of a random `fraction` of the images."""
    height, width = shape
    chosen, area, ratio, top, left = numbers.unbind(1)
    area = (0.02 + area * (0.33 - 0.02)) * (height * width)
    ratio = torch.exp(_between(ratio, float(np.log(10 / 3))))
    sides = (torch.sqrt(area * ratio), torch.sqrt(area / ratio))
    inside = []
    for start, side, limit in zip((top, left), sides, shape, strict=True):
        side = side.round().clamp(1, limit)
        start = (start * (limit - side + 1)).floor().clamp(max=limit - side)
        position = torch.arange(limit, device=numbers.device)
        inside.append((position >= start[:, None]) & (position < (start + side)[:, None]))
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :] & (chosen < fraction)[:, None, None])[:, None]
